"""A decoder of ours to an ONNX graph."""

import dataclasses
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ...checkpoint import size_on_disk
from ...errors import BitnetError
from ...leaf import Packed, Quantized
from ...models.decoder import DecoderConfig, frequencies
from ...models.folder import TOKENIZER, ModelFolder
from ...packed import unpack_weight
from ...progress import counter
from ...quantize import Scheme, quantize_weights
from ..export import ExportReport
from .graph import Graph, onnx
from .products import PRODUCTS, blocks_of, values

Form = Literal["2bit", "4bit", "int8", "qdq"]
FORMS: tuple[str, ...] = get_args(Form)
FILE, KEY, VERSION = "model.onnx", "bitnet_jax", 1
# Protobuf's limit is 2 GiB for the whole file; nodes and names take the rest.
_LARGEST = 2**31 - 2**26
_SAID = {
    "2bit": "MatMulNBits, ternary codes at 2 bits",
    "4bit": "MatMulNBits, ternary codes at 4 bits",
    "int8": "MatMulInteger, a byte a code",
    "qdq": "QuantizeLinear and DequantizeLinear in pairs, a byte a code",
}


def save(
    model: ModelFolder,
    out: str | os.PathLike,
    form: Form = "2bit",
    *,
    external_above: int = _LARGEST,
    console: Console | None = None,
) -> ExportReport:
    """Write a folder with ``model.onnx`` and ``tokenizer.json``, all or nothing.

    The graph takes ``input_ids`` int64 (batch, length) to ``logits`` float32 (batch, length,
    vocab_size), batch and length free, and computes what the model computes: activations rounded to
    int8 token by token, times codes, scales after the sum.

    | form | a ternary matrix is                   | runs in                                     |
    |------|---------------------------------------|---------------------------------------------|
    | 2bit | MatMulNBits, 2 bits a code            | onnxruntime (tested: 1.32)                  |
    | 4bit | MatMulNBits, 4 bits a code            | older onnxruntimes and other readers too    |
    | int8 | MatMulInteger, a byte a code          | whatever knows opset 21                     |
    | qdq  | QuantizeLinear/DequantizeLinear pairs | the same; meant for TensorRT, untried there |

    With one scale a matrix or an output, sums are exact integers in every form; the two of
    MatMulNBits hold 1 code of 0 more for every 31 to 127 to make them so, see
    `bitnet_jax.interop.onnx.blocks.exact_blocks`. With a scale a group they sum in float32 instead,
    for which onnxruntime unpacks a 2-bit matrix at every run: 4bit is faster there. int8 matrices
    go at 8 bits and int4 ones at 4 (8 in int8 and qdq), tables as they are (ternary ones at 4
    bits), all else in the model's floats.

    Args:
      model: a `Decoder`, float, latent (made ternary by its scheme, as when it runs) or packed.
      out: a new folder.
      form: the table above; a float model is the same in all of them.
      external_above: bytes of weights from which on they go to a file beside the graph, because
        ONNX's format ends at 2 GB.
      console: where to draw a progress bar; None for silence.

    Returns:
      `ExportReport`.

    Raises:
      BitnetError: if the network is no decoder, a form cannot hold a matrix, or the folder exists
        or cannot be written.
    """
    out = Path(os.path.abspath(out))
    if form not in FORMS:
        raise BitnetError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if out.exists():
        raise BitnetError(f"{out}: exists already; give another folder with --out or remove it")
    if not isinstance(model.config, DecoderConfig):
        raise BitnetError(
            f"ONNX: only a decoder of ours can be exported, float or ternary; this is a "
            f"{type(model.config).__name__.removesuffix('Config')} network"
        )
    writer = _Writer(model, form)
    graph = writer.build(console)
    room = out.with_name(f".{out.name}.saving-{os.getpid()}")
    try:
        room.mkdir(parents=True)
        _write(graph, room / FILE, external=writer.graph.nbytes > external_above)
        for name, data in model.files.items():
            (room / name).write_bytes(data)
        (room / TOKENIZER).write_text(model.tokenizer.to_str())
        room.rename(out)
    except OSError as e:
        raise BitnetError(f"{out}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return ExportReport("onnx", out, size_on_disk(out), *writer.told())


def _write(graph: Any, path: Path, external: bool) -> None:
    if external:
        onnx.save_model(
            graph, path, save_as_external_data=True, location=f"{FILE}.data", size_threshold=1024
        )
    else:
        onnx.save_model(graph, path)
    onnx.checker.check_model(str(path), full_check=True)


class _Writer:
    """One decoder's graph under construction; its methods are the modules of `Decoder`."""

    def __init__(self, model: ModelFolder, form: str):
        assert isinstance(model.config, DecoderConfig)
        self.config, self.scheme, self.form = model.config, model.scheme, form
        self.params = model.params["params"]
        self.graph, self.leaves = Graph(), {}
        self.grouped = self.wide = False

    def build(self, console: Console | None) -> Any:
        c, g = self.config, self.graph
        x = self.embedded("input_ids")
        length = g.op("Gather", g.op("Shape", "input_ids"), 1)
        positions = g.op("Range", 0, length, 1)
        with counter(console, "write", c.layers) as done:
            for i in range(c.layers):
                x = self.block(x, f"layer_{i}", positions)
                done()
        logits = self.head(self.norm(x, "norm/scale"))
        about = {
            "version": VERSION,
            "form": self.form,
            "config": dataclasses.asdict(c),
            "leaves": self.leaves,
        }
        return g.model("input_ids", c.vocab_size, logits, {KEY: json.dumps(about)})

    def told(self) -> tuple[str, tuple[str, ...]]:
        """The form in one line, and what differs from our own model."""
        if not self.leaves:
            return "float", ()
        notes = []
        if self.config.dtype != "float32":
            notes.append(f"activations in float32; our own model computes in {self.config.dtype}")
        if self.grouped and self.form == "2bit":
            notes.append(
                "a scale a group: onnxruntime unpacks these matrices at every run; 4bit is faster"
            )
        if self.wide and self.form == "qdq":
            notes.append("int8 matrices are multiplied in float32, because pairs overflow on CPUs")
        return _SAID[self.form], tuple(notes)

    def take(self, path: str) -> Any:
        node = self.params
        for name in path.split("/"):
            if name not in node:
                raise BitnetError(f"{path}: not among the model's parameters; its config needs it")
            node = node[name]
        return node

    def floats(self, path: str) -> str:
        """A float array, stored in its own dtype, as float32."""
        x = np.asarray(self.take(path))
        name = self.graph.constant(path, x)
        if x.dtype == np.float32:
            return name
        cast = lambda: self.graph.op("Cast", name, to=onnx.TensorProto.FLOAT)
        return self.graph.once(("float", path), cast)

    def leaf(self, path: str, scheme: Scheme | None) -> Quantized | None:
        """The quantised matrix at a path; None for one that is multiplied in float."""
        x = self.take(path)
        if isinstance(x, Packed):
            return unpack_weight(x)
        if isinstance(x, Quantized):
            return x
        if not hasattr(x, "astype"):
            raise BitnetError(
                f"{path}: a {type(x).__name__} has no place in ONNX; convert it first"
            )
        return None if scheme is None else quantize_weights(jnp.asarray(x), scheme)

    def record(self, path: str, leaf: Quantized, blocks: Any = None) -> None:
        """What `read.codes_of` needs to know of a matrix."""
        codes, scale = np.asarray(leaf.codes), np.asarray(leaf.scale)
        self.leaves[path] = {
            "kind": type(leaf).__name__,
            "shape": codes.shape,
            "scale": scale.shape,
            "group": leaf.group,
            "crc32": zlib.crc32(scale.tobytes(), zlib.crc32(codes.tobytes())),
            "blocks": blocks and dataclasses.asdict(blocks),
        }

    def dense(self, x: str, layer: str, scheme: Scheme | None, bias: bool = False) -> str:
        g, path = self.graph, f"{layer}/kernel"
        leaf = self.leaf(path, scheme)
        if leaf is None:
            y = g.op("MatMul", x, self.floats(path))
        else:
            bits = {"2bit": 2, "4bit": 4}.get(self.form)
            self.record(path, leaf, bits and blocks_of(leaf, path, bits))
            self.grouped |= leaf.group > 0
            self.wide |= self.leaves[path]["kind"] == "Int8"
            y = PRODUCTS[self.form](g, x, path, leaf)
        return g.op("Add", y, self.floats(f"{layer}/bias")) if bias else y

    def table(self) -> Quantized | None:
        """The embedding's leaf, if it is quantised."""
        leaf = self.leaf("embed/embedding", None)
        if leaf is not None:
            self.record("embed/embedding", leaf)
        return leaf

    def embedded(self, ids: str) -> str:
        g, path, leaf = self.graph, "embed/embedding", self.table()
        if leaf is not None:
            return g.op("Gather", values(g, path, leaf), ids, axis=0)
        rows = g.op("Gather", g.constant(path, np.asarray(self.take(path))), ids, axis=0)
        return g.op("Cast", rows, to=onnx.TensorProto.FLOAT)

    def head(self, x: str) -> str:
        g, path, leaf = self.graph, "embed/embedding", self.table()
        if not self.config.tied:
            return self.dense(x, "head", None)
        rows = self.floats(path) if leaf is None else values(g, path, leaf)
        return g.op("MatMul", x, g.op("Transpose", rows, perm=[1, 0]))

    def norm(self, x: str, path: str) -> str:
        """x / sqrt(mean(x^2) + eps) * scale, in the nodes that runtimes know as RMSNorm."""
        g = self.graph
        mean = g.op("ReduceMean", g.op("Pow", x, 2.0), [-1], keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, float(self.config.norm_eps)))
        return g.op("Mul", g.op("Div", x, root), self.floats(path))

    def block(self, x: str, layer: str, positions: str) -> str:
        g = self.graph
        y = self.norm(x, f"{layer}/attention_norm/scale")
        x = g.op("Add", x, self.attention(y, f"{layer}/attention", positions))
        y = self.norm(x, f"{layer}/mlp_norm/scale")
        return g.op("Add", x, self.mlp(y, f"{layer}/mlp"))

    def mlp(self, x: str, path: str) -> str:
        g, c = self.graph, self.config
        gate = self.dense(x, f"{path}/gate", self.scheme)
        up = self.dense(x, f"{path}/up", self.scheme)
        if c.activation == "silu":
            act = g.op("Mul", gate, g.op("Sigmoid", gate))
        else:
            act = g.op("Relu", gate)
            act = g.op("Mul", act, act)
        y = g.op("Mul", act, up)
        y = self.norm(y, f"{path}/sub_norm/scale") if c.sub_norms else y
        return self.dense(y, f"{path}/down", self.scheme)

    def attention(self, x: str, path: str, positions: str) -> str:
        """Causal attention; a key head and the query heads it serves are one batch of products."""
        g, c = self.graph, self.config
        each = c.heads // c.kv_heads
        query = self.heads(x, path, "query", c.heads)
        key = self.heads(x, path, "key", c.kv_heads)
        value = self.heads(x, path, "value", c.kv_heads, turned=False)
        query, key = (self.rotary(y, positions) for y in (query, key))
        query = g.op("Reshape", query, [0, c.kv_heads, each, -1, c.head_dim])
        key = g.op("Unsqueeze", g.op("Transpose", key, perm=[0, 1, 3, 2]), [2])
        scores = g.op("Mul", g.op("MatMul", query, key), float(c.head_dim) ** -0.5)
        scores = g.op("Where", self.seen(positions), scores, -1e30)
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), g.op("Unsqueeze", value, [2]))
        y = g.op("Reshape", y, [0, c.heads, -1, c.head_dim])
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, c.heads * c.head_dim])
        y = self.norm(y, f"{path}/sub_norm/scale") if c.sub_norms else y
        return self.dense(y, f"{path}/out", self.scheme)

    def heads(self, x: str, path: str, name: str, count: int, turned: bool = True) -> str:
        """A projection as (batch, heads, length, head_dim), normalised where the model does."""
        g, c = self.graph, self.config
        y = self.dense(x, f"{path}/{name}", self.scheme, bias=c.qkv_bias)
        y = g.op("Reshape", y, [0, 0, count, c.head_dim])
        y = self.norm(y, f"{path}/{name}_norm/scale") if c.qk_norm and turned else y
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    def seen(self, positions: str) -> str:
        """Which (query, key) count: keys no later than the query, bool (length, length)."""
        g = self.graph
        make = lambda: g.op("LessOrEqual", positions, g.op("Unsqueeze", positions, [1]))
        return g.once("seen", make)

    def rotary(self, x: str, positions: str) -> str:
        """`bitnet_jax.models.decoder.rotary` of (batch, heads, length, head_dim)."""
        g, c = self.graph, self.config
        half = c.head_dim // 2

        def make():
            radians = np.asarray(frequencies(half, c.rope_base, c.rope_scaling), np.float32)
            at = g.op("Cast", g.op("Unsqueeze", positions, [1]), to=onnx.TensorProto.FLOAT)
            angles = g.op("Mul", at, g.constant("frequencies", radians))
            return g.op("Cos", angles), g.op("Sin", angles)

        cos, sin = g.once("rotary", make)
        a = g.op("Slice", x, [0], [half], [-1])
        b = g.op("Slice", x, [half], [2 * half], [-1])
        return g.op(
            "Concat",
            g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin)),
            g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin)),
            axis=-1,
        )
