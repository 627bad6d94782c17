"""Our quantised leaves as llama.cpp's rows, and rows as leaves: codes and scales, never values."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ...leaf import Int4, Int8, Packed, Quantized, Ternary
from ...packed import pack_weight, unpack_weight
from .blocks import RANGES, size

KINDS = {"ternary": Ternary, "int8": Int8, "int4": Int4}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Codes and scale, a row for each output, or for each entry of a table.

    Attributes:
      codes: int8 (rows, features).
      scale: float32 (rows, groups), ``codes[r, i]`` counts ``scale[r, i // group]``.
      group: features that share a scale; 0 for all.
    """

    codes: np.ndarray
    scale: np.ndarray
    group: int

    @property
    def values(self) -> np.ndarray:
        """codes * scale, float32 (rows, features)."""
        return self.codes * self.per(1)

    def per(self, block: int) -> np.ndarray:
        """The scale of each ``block`` features, (rows, features / block)."""
        blocks = -(-self.codes.shape[1] // block)
        group = self.group or self.codes.shape[1]
        return self.scale[:, np.arange(blocks) * block // group]

    def fits(self, kind: str) -> bool:
        """Whether blocks of a type can hold these codes, each block under one scale."""
        block, (low, high) = size(kind)[0], RANGES[kind]
        fits = self.codes.shape[1] % block == 0 and self.group % block == 0
        return bool(fits and self.codes.min() >= low and self.codes.max() <= high)


def from_leaf(leaf: Quantized | Packed, table: bool = False) -> Rows | np.ndarray:
    """A leaf as rows; as float32 values (rows, features) where its scales lie across the rows.

    Args:
      leaf: of shape (in, out), or (entries, features) for a table.
      table: whether it is one.

    >>> rows = from_leaf(Ternary(jnp.array([[1], [0]], jnp.int8), jnp.array([[0.5]])))
    >>> rows.codes.tolist(), rows.scale.tolist()
    ([[1, 0]], [[0.5]])
    """
    weight = unpack_weight(leaf) if isinstance(leaf, Packed) else leaf
    codes, scale = np.asarray(weight.codes), np.asarray(weight.scale, np.float32)
    if not table:
        scale = np.broadcast_to(scale.T, (codes.shape[1], scale.shape[0]))
        group = weight.group if scale.shape[1] > 1 else 0
        return Rows(np.ascontiguousarray(codes.T), scale, group)
    entries = np.repeat(scale, weight.group or len(codes), axis=0)[: len(codes)]
    if scale.shape[1] > 1:  # a scale a feature, which no row has room for
        return codes * entries
    return Rows(codes, entries, 0)


def from_values(values: np.ndarray, group: int) -> Rows | None:
    """Ternary codes and scales of values that are exactly their product, None if these are not.

    The scale is the largest abs value of each ``group`` features (0: of all) of a row, never a
    mean, so nothing shrinks.

    >>> from_values(np.array([[0.5, 0, -0.5]]), 0).codes.tolist()
    [[1, 0, -1]]
    """
    size = group or values.shape[1]
    starts = np.arange(0, values.shape[1], size)
    scale = np.maximum.reduceat(np.abs(values), starts, axis=1).astype(np.float32)
    rows = Rows(np.sign(values).astype(np.int8), scale, group)
    return rows if (rows.values == values).all() else None


def to_leaf(rows: Rows, kind: str, table: bool = False) -> Packed:
    """Rows to a packed leaf, with as few scales as say the same.

    Args:
      rows: with a scale a block; 0 in a block of zeros is no scale but llama.cpp's quantiser's way
        to write one, and takes its neighbours'.
      kind: ``"ternary"``, ``"int8"`` or ``"int4"``.
      table: rows are a table's entries: one scale a row.

    Raises:
      ValueError: for a table whose rows have several scales.

    >>> blocks = Rows(np.ones((2, 64), np.int8), np.full((2, 2), 0.5, np.float32), 32)
    >>> leaf = to_leaf(blocks, "ternary")
    >>> leaf.shape, leaf.scale.shape
    ((64, 2), (1, 1))
    """
    scale, blocks = _filled(rows.scale), rows.scale.shape[1]
    # The largest group of blocks that share one scale, found from all of them downwards.
    together = next(n for n in range(blocks, 0, -1) if _alike(scale, n))
    few = scale[:, ::together]
    if table:
        if few.shape[1] > 1:
            raise ValueError("a table's row has one scale")
        return _packed(kind, rows.codes, few, 1)
    if few.shape[1] > 1:
        return _packed(kind, rows.codes.T, few.T, together * rows.group)
    few = few[:1] if (few == few[0]).all() else few
    return _packed(kind, rows.codes.T, few.T, 0)


def _packed(kind: str, codes: np.ndarray, scale: np.ndarray, group: int) -> Packed:
    return pack_weight(KINDS[kind](jnp.asarray(codes), jnp.asarray(scale, jnp.float32), group))


def _alike(scale: np.ndarray, together: int) -> bool:
    first = scale[:, np.arange(scale.shape[1]) // together * together]
    return bool((first == scale).all())


def _filled(scale: np.ndarray) -> np.ndarray:
    """Zeros taken from the left, then from the right, then from the largest there is."""
    if scale.all():
        return scale
    for _ in range(2):
        at = np.maximum.accumulate(np.where(scale != 0, np.arange(scale.shape[1]), 0), axis=1)
        scale = np.take_along_axis(scale, at, axis=1)[:, ::-1]
    if (scale[scale.any(1)] == scale.max()).all():
        return np.full_like(scale, scale.max())
    return scale
