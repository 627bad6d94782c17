"""The leaves that stand where a kernel stood: codes and scale together, unpacked or packed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from .pytree import pytree


def split(size: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes a flattened axis of this size stands for; itself, if it was never several.

    The first is counted from the size, so that a shard of it has the right shape too.

    >>> split(24, (4, 6)), split(12, (4, 6)), split(24, ())
    ((4, 6), (2, 6), (24,))
    """
    return (size // max(math.prod(shape[1:]), 1), *shape[1:]) if shape else (size,)


def _static(default):
    return dataclasses.field(default=default, metadata={"static": True})


class _Leaf:
    """What unpacked and packed leaves share; a leaf is read like the array it replaces."""

    codes: jax.Array
    scale: jax.Array
    in_features: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., *in axes, *out axes), the kernel's own."""
        *stack, _, out = self.codes.shape
        return (*stack, *split(self.in_features, self.in_shape), *split(out, self.out_shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        """Dtype of the values, which is the scale's."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale in memory."""
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, index):
        """``leaf[...]`` is the leaf itself: how Flax NNX reads a parameter's value."""
        if index is not Ellipsis:
            raise TypeError("a quantised leaf is no array; dequantize it to index its values")
        return self


@dataclasses.dataclass(frozen=True)
class Quantized(_Leaf):
    """Codes and scale together: what `Ternary`, `Int8` and `Int4` have in common.

    Invariants: ``codes`` is int8, shape (..., in, out); ``scale`` is float32, shape
    (..., groups, out) or (..., groups, 1), where groups = ceil(in / group), or 1 for group = 0;
    input i of output o has the value ``codes[i, o] * scale[i // group, o]``.
    Leading axes are stacks (of layers under scan, of copies under vmap).
    A kernel with several input or output axes, (in, heads, head_dim) say, lies flattened to that
    matrix; ``in_shape`` and ``out_shape`` remember the axes and are () where there was one.
    """

    codes: jax.Array
    scale: jax.Array
    group: int = _static(0)
    in_shape: tuple[int, ...] = _static(())
    out_shape: tuple[int, ...] = _static(())

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Length of the contracted axis."""
        return self.codes.shape[-2]


@pytree
@dataclasses.dataclass(frozen=True)
class Ternary(Quantized):
    """A ternary weight: codes in {-1, 0, 1} and their scale, see `Quantized`.

    >>> import jax.numpy as jnp
    >>> weight = Ternary(jnp.array([[1, 0], [-1, 1]], jnp.int8), jnp.array([[0.5]]))
    >>> weight.shape, weight.dtype
    ((2, 2), dtype('float32'))
    """


@pytree
@dataclasses.dataclass(frozen=True)
class Sparse(Ternary):
    """A 3:4 sparse ternary weight: of inputs 4j to 4j+3 exactly one has code 0, see `Quantized`.

    Where the last four is not complete, the missing inputs count as that one.
    """


@pytree
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """An 8-bit weight: codes in [-127, 127] and their scale, see `Quantized`."""


@pytree
@dataclasses.dataclass(frozen=True)
class Int4(Quantized):
    """A 4-bit weight: codes in [-7, 7] and their scale, see `Quantized`."""


@dataclasses.dataclass(frozen=True)
class Packed(_Leaf):
    """A quantised weight with its codes at ``bits`` bits, to stand where a kernel stood.

    Invariants (of 2, 4 and 8 bits; `PackedSparse` has its own): ``codes`` is uint8, shape
    (..., ceil(in * bits / 8), out). With n = 8 / bits codes a
    byte, bits j * bits and up of byte i hold code + offset of input n i + j (offset 1, 8 and 128
    for 2, 4 and 8 bits), so adjacent inputs share a byte and inputs past the end read as code 0.
    ``scale``, ``group``, ``in_shape`` and ``out_shape`` are as in `Quantized`. Only sizes that
    survive vmap and scan are static: the packed axis is counted from the end, and leading axes are
    never written down.
    """

    codes: jax.Array
    scale: jax.Array
    in_features: int = dataclasses.field(metadata={"static": True})
    group: int = _static(0)
    in_shape: tuple[int, ...] = _static(())
    out_shape: tuple[int, ...] = _static(())
    bits: ClassVar[float]
    unpacked: ClassVar[type[Quantized]]


@pytree
@dataclasses.dataclass(frozen=True)
class PackedTernary(Packed):
    """A packed ternary weight: 2 bits a code, four adjacent inputs to a byte, see `Packed`.

    >>> import jax.numpy as jnp
    >>> leaf = PackedTernary(jnp.zeros((2, 3), jnp.uint8), jnp.ones((1, 1)), in_features=5)
    >>> leaf.shape, leaf.nbytes
    ((5, 3), 10)
    """

    bits: ClassVar[float] = 2
    unpacked: ClassVar[type[Quantized]] = Ternary


@pytree
@dataclasses.dataclass(frozen=True)
class PackedSparse(Packed):
    """A packed 3:4 sparse ternary weight: five bits for four adjacent inputs.

    Invariant: ``codes`` is uint8, shape (..., 5 ceil(in / 32), out), in the layout of
    `bitnet_jax.sparse.pack_fours`; the rest is as in `Packed`.
    """

    bits: ClassVar[float] = 1.25
    unpacked: ClassVar[type[Quantized]] = Sparse


@pytree
@dataclasses.dataclass(frozen=True)
class PackedInt4(Packed):
    """A packed 4-bit weight, two adjacent inputs to a byte, see `Packed`."""

    bits: ClassVar[float] = 4
    unpacked: ClassVar[type[Quantized]] = Int4


@pytree
@dataclasses.dataclass(frozen=True)
class PackedInt8(Packed):
    """A packed 8-bit weight, a byte a code, see `Packed`."""

    bits: ClassVar[float] = 8
    unpacked: ClassVar[type[Quantized]] = Int8


PACKED: tuple[type[Packed], ...] = (PackedTernary, PackedSparse, PackedInt4, PackedInt8)


@pytree
@dataclasses.dataclass(frozen=True)
class Prequantized:
    """Latent weights with their codes already computed: quantised once, multiplied many times.

    Inside a loop over microbatches the latent weights do not change, so neither do their codes.
    `dot_general` multiplies ``weight`` and gives ``latent`` the straight-through gradient, the same
    as if it had quantised ``latent`` itself. Made by `bitnet_jax.convert.attach`.
    """

    latent: jax.Array
    weight: Quantized

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latent.shape

    @property
    def ndim(self) -> int:
        return self.latent.ndim

    @property
    def dtype(self):
        return self.latent.dtype

    def __getitem__(self, index):
        return Prequantized(self.latent[index], self.weight[index])


@dataclasses.dataclass(frozen=True)
class Product:
    """A product under way, as an `Acting` leaf sees it.

    Attributes:
      ternary: (lhs, rhs) -> out, the layer's own product with another right-hand side.
      plain: the same in float, without quantising anything.
      contract, batch: axes of lhs that are contracted, and those shared with rhs.
    """

    ternary: Callable[[jax.Array, Any], jax.Array]
    plain: Callable[[jax.Array, Any], jax.Array]
    contract: tuple[int, ...]
    batch: tuple[int, ...]


class Acting:
    """A leaf that says itself what multiplying by it means.

    Parts of training recipes (`bitnet_jax.recipe`) and the probes of `bitnet_jax.calibrate` are
    leaves of this kind: they hold a kernel, latent or quantised or acting itself, so they nest, and
    neither the operator nor the layers know which there are.
    """

    kernel: Any

    def product(self, lhs: jax.Array, call: Product) -> jax.Array:
        """What stands for lhs times the kernel."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.kernel.dtype

    def __getitem__(self, index):
        return self if index is Ellipsis else jax.tree.map(lambda x: x[index], self)


def is_quantized(x: object) -> bool:
    """Whether ``x`` is one of our leaves, packed or not: the ``is_leaf`` of tree functions.

    >>> is_quantized(1.0)
    False
    """
    return isinstance(x, Quantized | Packed | Prequantized | Acting)
