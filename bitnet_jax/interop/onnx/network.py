"""A decoder of ours as nodes of an ONNX graph."""

import dataclasses
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ...embed import in_integers
from ...errors import BitnetError
from ...leaf import Packed, Quantized
from ...models.decoder import DecoderConfig, frequencies
from ...packed import unpack_weight
from ...progress import counter
from ...quantize import Scheme, quantize_weights
from .graph import Graph, Value, onnx
from .products import PRODUCTS, blocks_of, rounded, values

# Names of inputs and outputs, as transformers, optimum and onnxruntime-genai have them.
IDS, MASK, PAST, PRESENT = "input_ids", "attention_mask", "past_key_values", "present"
_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
_BITS = {"2bit": 2, "4bit": 4}  # of a ternary code, in the forms of MatMulNBits


class Network:
    """One decoder's graph under construction; its methods are the modules of `Decoder`.

    Attributes:
      graph: the nodes so far.
      leaves: path to what `read.codes_of` needs to know of each quantised matrix.
      inputs: what the graph is given, by name.
      outputs: what it gives, by name.
    """

    def __init__(
        self,
        config: DecoderConfig,
        scheme: Scheme | None,
        params: Any,
        form: str,
        cache: bool = False,
    ):
        self.config, self.scheme, self.params = config, scheme, params
        self.form, self.cache = form, cache
        self.graph, self.leaves = Graph(), {}
        self.inputs = {IDS: Value(("batch", "length"), _INT64)}
        self.outputs: dict[str, Value] = {}
        if cache:
            self.inputs[MASK] = Value(("batch", "total"), _INT64)

    def build(self, console: Console | None) -> None:
        """Logits of token ids (batch, length), and the cache of all layers where there is one."""
        x, c = self.embedded(IDS), self.config
        with counter(console, "write", c.layers) as done:
            for i in range(c.layers):
                x = self.block(x, i)
                done()
        logits = self.head(self.norm(x, "norm/scale"))
        made = Value(("batch", "length", c.vocab_size), made=logits)
        self.outputs = {"logits": made, **self.outputs}

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
        cast = lambda: self.graph.op("Cast", name, to=_FLOAT)
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
            bits = _BITS.get(self.form)
            self.record(path, leaf, bits and blocks_of(leaf, path, bits))
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
        return g.op("Cast", rows, to=_FLOAT)

    def head(self, x: str) -> str:
        if not self.config.tied:
            return self.dense(x, "head", None)
        g, path, leaf = self.graph, "embed/embedding", self.table()
        rows = self.floats(path) if leaf is None else values(g, path, leaf)
        if leaf is not None and in_integers(leaf):
            x = g.op("Mul", *rounded(g, x))
        return g.op("MatMul", x, g.op("Transpose", rows, perm=[1, 0]))

    def norm(self, x: str, path: str) -> str:
        """x / sqrt(mean(x^2) + eps) * scale, in the nodes that runtimes know as RMSNorm."""
        g = self.graph
        mean = g.op("ReduceMean", g.op("Pow", x, 2.0), [-1], keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, float(self.config.norm_eps)))
        return g.op("Mul", g.op("Div", x, root), self.floats(path))

    def block(self, x: str, i: int) -> str:
        g, layer = self.graph, f"layer_{i}"
        y = self.norm(x, f"{layer}/attention_norm/scale")
        x = g.op("Add", x, self.attention(y, f"{layer}/attention", i))
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

    def attention(self, x: str, path: str, i: int) -> str:
        """Causal attention; a key head and the query heads it serves are one batch of products."""
        g, c = self.graph, self.config
        each = c.heads // c.kv_heads
        query = self.heads(x, path, "query", c.heads)
        key = self.heads(x, path, "key", c.kv_heads)
        value = self.heads(x, path, "value", c.kv_heads, turned=False)
        query, key = self.rotary(query), self.rotary(key)
        key, value = self.cached(key, f"{i}.key"), self.cached(value, f"{i}.value")
        query = g.op("Reshape", query, [0, c.kv_heads, each, -1, c.head_dim])
        key = g.op("Unsqueeze", g.op("Transpose", key, perm=[0, 1, 3, 2]), [2])
        scores = g.op("Mul", g.op("MatMul", query, key), float(c.head_dim) ** -0.5)
        scores = g.op("Where", self.seen(), scores, -1e30)
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), g.op("Unsqueeze", value, [2]))
        y = g.op("Reshape", y, [0, c.heads, -1, c.head_dim])
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, c.heads * c.head_dim])
        y = self.norm(y, f"{path}/sub_norm/scale") if c.sub_norms else y
        return self.dense(y, f"{path}/out", self.scheme)

    def cached(self, new: str, name: str) -> str:
        """Keys or values (batch, kv_heads, length, head_dim), behind those of earlier tokens."""
        if not self.cache:
            return new
        before, c = f"{PAST}.{name}", self.config
        all_ = self.graph.op("Concat", before, new, axis=2)
        shape = lambda axis: ("batch", c.kv_heads, axis, c.head_dim)
        self.inputs[before] = Value(shape("past"))
        self.outputs[f"{PRESENT}.{name}"] = Value(shape("total"), made=all_)
        return all_

    def heads(self, x: str, path: str, name: str, count: int, turned: bool = True) -> str:
        """A projection as (batch, heads, length, head_dim), normalised where the model does."""
        g, c = self.graph, self.config
        y = self.dense(x, f"{path}/{name}", self.scheme, bias=c.qkv_bias)
        y = g.op("Reshape", y, [0, 0, count, c.head_dim])
        y = self.norm(y, f"{path}/{name}_norm/scale") if c.qk_norm and turned else y
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    def places(self) -> tuple[str, str]:
        """Numbers of the tokens, and of all there are with earlier ones: (length,) and (total,)."""
        g = self.graph

        def make():
            length = g.op("Gather", g.op("Shape", IDS), 1)
            if not self.cache:
                return (g.op("Range", 0, length, 1),) * 2
            total = g.op("Gather", g.op("Shape", MASK), 1)
            new = g.op("Range", g.op("Sub", total, length), total, 1)
            return new, g.op("Range", 0, total, 1)

        return g.once("places", make)

    def positions(self) -> str:
        """Of each token, (batch or 1, length); with a cache only what the mask has counts."""
        g, (new, _) = self.graph, self.places()
        if not self.cache:
            return g.op("Unsqueeze", new, [0])
        counted = g.op("Max", g.op("Sub", g.op("CumSum", MASK, 1), 1), 0)
        return g.op("Gather", counted, new, axis=1)

    def seen(self) -> str:
        """Which keys a query sees, no later ones and none the mask leaves out.

        bool (length, total), with a cache (batch, 1, 1, length, total).
        """
        g = self.graph

        def make():
            new, all_ = self.places()
            seen = g.op("LessOrEqual", all_, g.op("Unsqueeze", new, [1]))
            if not self.cache:
                return seen
            there = g.op("Cast", g.op("Unsqueeze", MASK, [1, 2, 3]), to=onnx.TensorProto.BOOL)
            return g.op("And", seen, there)

        return g.once("seen", make)

    def rotary(self, x: str) -> str:
        """`bitnet_jax.models.decoder.rotary` of (batch, heads, length, head_dim)."""
        g, c = self.graph, self.config
        half = c.head_dim // 2

        def make():
            radians = np.asarray(frequencies(half, c.rope_base, c.rope_scaling), np.float32)
            at = g.op("Cast", g.op("Unsqueeze", self.positions(), [1, 3]), to=_FLOAT)
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
