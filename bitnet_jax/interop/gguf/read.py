"""A GGUF file as a model folder: codes as they lie, all other weights as the floats they mean."""

import dataclasses
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ...errors import BitnetError
from ...leaf import Packed, is_quantized
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...progress import counter
from ...quantize import Scheme
from . import names, tokenizer
from .blocks import RANGES, decode, size
from .container import Container, open_gguf
from .rows import KINDS, Rows, from_values, to_leaf

LEVELS = {"ternary": 1, "int4": 7, "int8": 127}
NOTE = "bitnet_jax"  # our own metadata: the scheme, and which tensors are codes of which kind
# Scalings of Llama 3's positions in use, (factor, low, high, length); a file holds only divisors.
_SCALINGS = tuple((float(f), 1.0, 4.0, 8192.0) for f in (8, 32))


def load(
    path: str | os.PathLike, max_length: int | None = None, console: Console | None = None
) -> ModelFolder:
    """Read a model from a GGUF file.

    Ternary matrices (TQ1_0 and TQ2_0, Q2_0 and Q4_0 whose codes are -1, 0 and 1) become packed
    leaves with the file's own codes and scales. What `save` wrote from 8- and 4-bit leaves comes
    back as those. Every other matrix, of any type the `gguf` package knows, becomes float32.
    Leaf by leaf, out of the mapped file.

    Args:
      path: the file, of architecture llama, qwen2, qwen3 or bitnet.
      max_length: longest sequence, at most the file's own.
      console: where to draw a progress bar; None for silence.

    Returns:
      `ModelFolder`; its scheme is None unless all layers are ternary.

    Raises:
      BitnetError: if the file is damaged, or holds another network than our decoder.

    >>> load("none.gguf")
    Traceback (most recent call last):
    bitnet_jax.errors.BitnetError: none.gguf: no such file; give a .gguf
    """
    file = open_gguf(path)
    try:
        config, arch = _config(file, max_length)
        words, files = tokenizer.read(file.fields)
    except BitnetError as e:
        raise e if str(path) in str(e) else BitnetError(f"{path}: {e}") from e
    except (TypeError, ValueError) as e:  # an array where a number should be, say
        raise BitnetError(f"{path}: its metadata makes no network ({e})") from e
    reader = _Leaves(file, config, arch)
    # Weights may be anything, infinite too; numpy need not talk about it.
    with counter(console, "read", config.layers) as done, np.errstate(all="ignore"):
        params = reader.params(done)
    return ModelFolder(config, reader.scheme(), params, words, files)


def _config(file: Container, max_length: int | None) -> tuple[DecoderConfig, str]:
    """The network's shape from the metadata, and the architecture's name."""
    arch = file.fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in names.ARCHS:
        raise BitnetError(f"of architecture {arch!r}; we read {', '.join(names.ARCHS)}")
    if file.fields.get("split.count", 1) != 1:
        raise BitnetError("one of several files; join them with llama-gguf-split --merge")
    known = names.ARCHS[arch]

    def get(name: str, kind: type = int, default: Any = None) -> Any:
        value = file.fields.get(f"{arch}.{name}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, all the same
        valid = isinstance(value, int | float if kind is float else kind)
        if not valid or (kind is not str and not 0 < value < 2**31):
            raise BitnetError(f"its {arch}.{name} is {value!r}; it makes no network")
        # A float32 as the shortest number that is it: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else kind(value)

    width, heads = get("embedding_length"), get("attention.head_count")
    size = get("attention.key_length", default=max(width // heads, 1))
    length = get("context_length")
    table = file.tensors.get("token_embd.weight")
    _only_plain_rope(file.fields, arch, size)
    try:
        config = DecoderConfig(
            vocab_size=table.shape[0] if table else get("vocab_size"),
            width=width,
            layers=get("block_count"),
            heads=heads,
            kv_heads=get("attention.head_count_kv", default=heads),
            hidden=get("feed_forward_length"),
            max_length=min(length, max_length or length),
            rope_base=get("rope.freq_base", float, 10_000.0),
            norm_eps=get("attention.layer_norm_rms_epsilon", float),
            activation=get("hidden_activation", str, known.activation),  # pyright: ignore
            sub_norms=known.sub_norms,
            tied="output.weight" not in file.tensors,
            head_size=0 if size * heads == width else size,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm=known.qk_norm,
        )
    except ValueError as e:
        raise BitnetError(f"its shape makes no network we know: {e}") from e
    return _scaled(file, config), arch


def _only_plain_rope(fields: dict[str, Any], arch: str, size: int) -> None:
    get = lambda name, default: fields.get(f"{arch}.{name}", default)
    kind = get("rope.scaling.type", "none")
    factors = {get("rope.scaling.factor", 1.0), get("rope.scale_linear", 1.0)}
    if kind not in ("none", "linear") or factors != {1.0}:
        raise BitnetError(f"its positions are scaled by {kind!r}, which our decoder does not do")
    for name in ("rope.dimension_count", "attention.value_length"):
        if get(name, size) != size:
            raise BitnetError(f"its {arch}.{name} is not the size of a head, {size}")
    if get("expert_count", 0):
        raise BitnetError("a mixture of experts, which our decoder is not")


def _scaled(file: Container, config: DecoderConfig) -> DecoderConfig:
    """The config with Llama 3's scaled positions, if the file has them."""
    if "rope_freqs.weight" not in file.tensors:
        return config
    found = _floats(file, "rope_freqs.weight").ravel()
    for scaling in _SCALINGS:
        one = dataclasses.replace(config, rope_scaling=scaling)
        divisors = names.rope_divisors(one)
        if divisors.shape == found.shape and np.allclose(divisors, found, rtol=1e-3):
            return one
    raise BitnetError("its rope_freqs are of a scaling of positions we do not know")


def _floats(file: Container, name: str) -> np.ndarray:
    """A tensor's values, float32 (rows, features)."""
    tensor, raw = file.tensors[name], file.raw(name)
    if tensor.kind in ("F32", "F64"):
        return raw.view("<f4" if tensor.kind == "F32" else "<f8").astype(np.float32)
    if tensor.kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if tensor.kind in RANGES:  # Q2_0 among them, which the package does not know yet
        codes, scale = decode(raw, tensor.kind)
        return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    gguf = package()
    try:
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError:
        raise BitnetError(
            f"{file.path}: {name} is {tensor.kind}, which the gguf package does not read; take a "
            "file of another type"
        ) from None


def package() -> Any:
    """The `gguf` package.

    Raises:
      BitnetError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise BitnetError(
            "GGUF files need the gguf package: pip install 'bitnet-jax[gguf]'"
        ) from None
    return gguf


class _Leaves:
    """The tensors of a file, each taken once, as leaves of our tree."""

    def __init__(self, file: Container, config: DecoderConfig, arch: str):
        self.file, self.config, self.arch = file, config, arch
        self.left = set(file.tensors) - {"rope_freqs.weight"}
        self.note = _note(file.fields)
        self.kernels: list[Any] = []

    def params(self, done) -> dict:
        """All variables of the `Decoder`.

        Raises:
          BitnetError: if a tensor is missing, left over, or of another shape.
        """
        config, width = self.config, self.config.width
        params: dict = {
            "embed": {"embedding": self.matrix("token_embd", (config.vocab_size, width))}
        }
        for i in range(config.layers):
            params[f"layer_{i}"] = self.block(i)
            done()
        params["norm"] = {"scale": self.vector("output_norm.weight", width)}
        if not config.tied:
            params["head"] = {"kernel": self.matrix("output", (config.vocab_size, width))}
        if self.left:
            raise BitnetError(f"{self.file.path}: no place for its tensor {min(self.left)!r}")
        return {"params": params}

    def block(self, i: int) -> dict:
        block: dict = {"attention": {}, "mlp": {}}
        for name, path in names.norms(self.config).items():
            at = block
            for part in path[:-1]:
                at = at[part]
            features = {"attn_sub_norm": self.config.heads * self.config.head_dim,
                        "ffn_sub_norm": self.config.hidden, "attn_q_norm": self.config.head_dim,
                        "attn_k_norm": self.config.head_dim}  # fmt: skip
            scale = self.vector(f"blk.{i}.{name}.weight", features.get(name, self.config.width))
            at[path[-1]] = {"scale": scale}
        for name, shape in names.shapes(self.config).items():
            part, ours = names.KERNELS[name]
            leaf = self.matrix(f"blk.{i}.{name}", shape, name)
            self.kernels.append(leaf)
            block[part][ours] = {"kernel": leaf}
            if self.config.qkv_bias and name in names.BIASED:
                bias, order = self.vector(f"blk.{i}.{name}.bias", shape[0]), self.order(name)
                block[part][ours]["bias"] = bias if order is None else bias[order]
        return block

    def take(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.left:
            raise BitnetError(f"{self.file.path}: holds no tensor {name}")
        self.left.discard(name)
        found = self.file.tensors[name].shape
        if found != shape:
            raise BitnetError(f"{self.file.path}: {name} is {found}, expected {shape}")

    def vector(self, name: str, size: int) -> Any:
        self.take(name, (size,))
        return jnp.asarray(_floats(self.file, name)[0])

    def order(self, name: str) -> np.ndarray | None:
        """Which of llama.cpp's rows of a query or key we have at each place; None for others."""
        order = names.row_order(name, self.config, self.arch)
        return None if order is None else np.argsort(order)

    def matrix(self, name: str, shape: tuple[int, int], kind: str = "") -> Any:
        """A kernel (in, out), or a table (entries, features).

        Args:
          name: of the tensor, without ``.weight``.
          shape: (rows, features), as in the file.
          kind: what a block calls it.
        """
        table, scaled = name == "token_embd", np.float32(1)
        if f"{name}.scale" in self.left:
            self.take(f"{name}.scale", (1,))
            scaled = _floats(self.file, f"{name}.scale")[0, 0]
        name = f"{name}.weight"
        self.take(name, shape)
        order = self.order(kind)  # only now: before, the sizes were the file's word
        leaf = self.codes(name, scaled, order, table)
        if leaf is not None:
            return leaf
        rows = _floats(self.file, name) * scaled
        rows = rows if order is None else rows[order]
        return jnp.asarray(rows if table else np.ascontiguousarray(rows.T))

    def codes(self, name: str, scaled: np.float32, order, table: bool) -> Packed | None:
        """The leaf of a tensor of codes; None for one of values."""
        stored = self.file.tensors[name].kind
        kind, group = self.note.get(name, ("" if table else "ternary", None))
        if stored in RANGES:
            codes, scale = decode(self.file.raw(name), stored)
            rows = Rows(codes, scale, size(stored)[0])
        elif group is not None and kind == "ternary":  # ours, with no block that could carry it
            rows = from_values(_floats(self.file, name), group)
        else:
            return None
        if rows is None or not _holds(kind, stored, rows.codes):
            return None
        if not np.isfinite(rows.scale).all():
            raise BitnetError(f"{self.file.path}: {name} has a scale that is no number")
        codes, scale = (x if order is None else x[order] for x in (rows.codes, rows.scale))
        try:
            return to_leaf(Rows(codes, scale * scaled, rows.group), kind, table)
        except ValueError:  # a table whose rows have several scales
            return None

    def scheme(self) -> Scheme | None:
        """The scheme of the layers; None if any is float, which a scheme would make ternary."""
        if not all(is_quantized(leaf) for leaf in self.kernels):
            return None
        leaf = self.kernels[0]
        try:
            return Scheme(**self.note["scheme"])
        except (KeyError, TypeError, ValueError):
            return Scheme(scale=leaf.group or ("channel" if leaf.scale.shape[-1] > 1 else "tensor"))


def _holds(kind: str, stored: str, codes: np.ndarray) -> bool:
    """Whether codes of a stored type are those of a leaf of this kind."""
    if kind not in LEVELS or (stored == "Q8_0") != (kind == "int8"):
        return False
    return bool(np.abs(codes.astype(np.int16)).max() <= LEVELS[kind])


def _note(fields: dict[str, Any]) -> dict[str, Any]:
    """What `save` noted: tensor name to the kind of its codes and group, and ``scheme``."""
    try:
        found = json.loads(fields.get(NOTE, "{}"))
        kinds = {name: (str(kind), int(group)) for name, (kind, group) in found["leaves"].items()}
        return {name: x for name, x in kinds.items() if x[0] in KINDS and x[1] >= 0} | {
            "scheme": found["scheme"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):  # nobody's, or not as we write it
        return {}
