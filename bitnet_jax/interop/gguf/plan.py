"""What each leaf of a model becomes in a GGUF file: decided first, made when it is written."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ...errors import BitnetError
from ...leaf import Acting, Packed, Prequantized, Quantized
from ...models.folder import ModelFolder
from ...quantize import Scheme, quantize_weights
from . import names
from .blocks import encode, size
from .rows import KINDS, Rows, from_leaf

FLOATS = {"F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("<f4")}
_quantize = jax.jit(quantize_weights, static_argnums=1)
# Half a unit in the last of a float16's 11 bits: a scale that moves by more has left its range.
_ROUNDING = 2.0**-11


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write.

    Attributes:
      name, shape: of the file; the shape row-major, (out, in) for a matrix.
      kind: its type, ``"TQ2_0"`` say.
      make: its bytes, as an array of any dtype.
      moved: the largest relative change of a scale or a value, 0 for none.
      leaf: what a reader cannot see by itself: the kind of leaf, and features to a scale.
      ternary: whether it was ternary.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]
    moved: float = 0.0
    leaf: tuple[str, int] | None = None
    ternary: bool = False

    @property
    def nbytes(self) -> int:
        block, width = (1, FLOATS[self.kind].itemsize) if self.kind in FLOATS else size(self.kind)
        return int(np.prod(self.shape)) // block * width


class Plan:
    """What each leaf of a model becomes."""

    def __init__(self, model: ModelFolder, arch: str, types: tuple, floats: str, beside: bool):
        self.config: Any = model.config
        self.params, self.scheme = model.params["params"], model.scheme
        self.arch, self.types, self.floats, self.beside = arch, types, floats, beside

    def tensors(self) -> Iterator[Tensor]:
        config = self.config
        yield from self.matrix("token_embd", self.params["embed"]["embedding"], table=True)
        if config.rope_scaling:
            yield self.vector("rope_freqs.weight", names.rope_divisors(config))
        for i in range(config.layers):
            yield from self.block(i, self.params[f"layer_{i}"])
        yield self.vector("output_norm.weight", self.params["norm"]["scale"])
        if not config.tied:
            yield from self.matrix("output", self.params["head"]["kernel"])

    def block(self, i: int, block: dict) -> Iterator[Tensor]:
        for name, path in names.norms(self.config).items():
            at = block
            for part in path:
                at = at[part]
            yield self.vector(f"blk.{i}.{name}.weight", at["scale"])
        for name, (part, ours) in names.KERNELS.items():
            layer, order = block[part][ours], names.row_order(name, self.config, self.arch)
            yield from self.matrix(f"blk.{i}.{name}", layer["kernel"], order, scheme=self.scheme)
            if "bias" in layer:
                bias = np.asarray(layer["bias"])
                yield self.vector(f"blk.{i}.{name}.bias", bias if order is None else bias[order])

    def vector(self, name: str, x: Any) -> Tensor:
        x = np.asarray(x, np.float32)
        return Tensor(name, x.shape, "F32", lambda: x)

    def matrix(
        self,
        name: str,
        leaf: Any,
        order: np.ndarray | None = None,
        table: bool = False,
        scheme: Scheme | None = None,
    ) -> Iterator[Tensor]:
        """A matrix, and its scale beside it if that is where it goes."""
        if isinstance(leaf, Acting | Prequantized):
            raise BitnetError(f"{name}: still in training ({type(leaf).__name__}); pack it first")
        if isinstance(leaf, Quantized | Packed):
            yield from self.rows(f"{name}.weight", lambda: leaf, order, table)
        elif scheme is not None:  # latent: what the network makes of it when it runs
            yield from self.rows(f"{name}.weight", lambda: _quantize(leaf, scheme), order, table)
        else:
            shape = leaf.shape if table else leaf.shape[::-1]
            make = lambda: _ordered(np.asarray(leaf) if table else np.asarray(leaf).T, order)
            yield self.values(f"{name}.weight", shape, make)

    def values(self, name: str, shape: tuple[int, ...], make: Callable) -> Tensor:
        """Float weights, in the smallest type that holds them or the one that was asked for."""
        kinds = FLOATS if self.floats == "exact" else (self.floats,)
        kind, moved = next(
            (kind, moved)
            for kind in kinds
            if (moved := _moved(make(), FLOATS[kind])) == 0 or kind in ("F32", self.floats)
        )
        if not np.isfinite(moved):
            raise BitnetError(f"{name}: has values that {kind} cannot hold; take floats='BF16'")
        cast = lambda: np.ascontiguousarray(make().astype(FLOATS[kind]))
        return Tensor(name, tuple(shape), kind, cast, moved)

    def rows(self, name: str, leaf: Callable, order: Any, table: bool) -> Iterator[Tensor]:
        """Codes and scales, in the first type whose blocks hold them, or as values.

        The leaf is made again when its turn comes to be written: only one is in memory at a time.
        """
        found, again = from_leaf(leaf(), table), lambda: _ordered(from_leaf(leaf(), table), order)
        if isinstance(found, np.ndarray):
            yield self.values(name, found.shape, again)
            return
        label, shape, group = _label(leaf()), found.codes.shape, found.group
        types = {"ternary": self.types, "int8": ("Q8_0",), "int4": ("Q4_0",)}[label]
        kind = next((kind for kind in types if found.fits(kind)), None)
        layer = name.startswith("blk.")  # llama.cpp looks for scales beside no others
        one = self.beside and layer and bool((found.scale == found.scale[0, 0]).all())
        single = found.scale[0, :1].copy()
        moved = 0.0 if one else _moved(found.scale, FLOATS["F16"])
        half = moved <= _ROUNDING

        def stored() -> Rows:
            rows = again()
            scale = np.ones_like(rows.scale) if one else rows.scale
            return dataclasses.replace(
                rows, scale=scale.astype("f2").astype("f4") if half else scale
            )

        if kind is None or not half:
            tensor = self.values(name, shape, lambda: stored().values)
            moved = max(tensor.moved, moved if half else 0)
        else:
            block = size(kind)[0]
            make = lambda: encode((rows := stored()).codes, rows.per(block), kind)
            tensor = Tensor(name, shape, kind, make)
        # A reader takes blocks of a layer's ternary codes for what they are, and needs no word.
        told = tensor.kind in self.types and label == "ternary" and not table
        note = None if told or (tensor.kind in FLOATS and label != "ternary") else label
        leaf_note = None if note is None else (note, group)
        yield dataclasses.replace(tensor, moved=moved, leaf=leaf_note, ternary=label == "ternary")
        if one:
            yield self.vector(name.replace(".weight", ".scale"), single)


def _label(leaf: Any) -> str:
    kind = leaf.unpacked if isinstance(leaf, Packed) else type(leaf)
    return next(label for label, known in KINDS.items() if issubclass(kind, known))


def _ordered(x: Any, order: np.ndarray | None) -> Any:
    """Rows, or an array of rows, in another order."""
    if order is None:
        return x
    if isinstance(x, Rows):
        return dataclasses.replace(x, codes=x.codes[order], scale=x.scale[order])
    return x[order]


def _moved(x: np.ndarray, dtype: np.dtype) -> float:
    """The largest relative change of values that are cast, infinity for what a type cannot hold."""
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        cast = x.astype(dtype).astype(np.float32)
    if not np.isfinite(cast).all():
        return float("inf")
    size = np.where(x == 0, 1, np.abs(x))
    return float((np.abs(cast - x) / size).max(initial=0))
