"""``dot_general``: the one operator. What its right-hand side is decides what it does."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .leaf import (
    Acting,
    Int4,
    Int8,
    Packed,
    PackedInt8,
    PackedTernary,
    Prequantized,
    Product,
    Quantized,
    Ternary,
    is_quantized,
    split,
)
from .ops import (
    by_platform,
    choose_dense,
    int8_product,
    integer_product,
    mosaic,
    packed_product,
    scaled,
    training,
)
from .packed import unpack_weight
from .quantize import Scheme, grouped, matrix_values, quantize_activations, quantize_weights

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def accumulate(
    x: jax.Array,
    weight: Quantized | PackedTernary | PackedInt8,
    batch_dims: int = 0,
    op: str | None = None,
) -> jax.Array:
    """The integer accumulators: int8 codes of the activations times codes of the weight.

    Args:
      x: int8 (*batch, *rows, in).
      weight: codes (*batch, in, out), or packed ternary ones, or packed 8-bit ones (in, out)
        without groups; packed ones are read as they are.
      batch_dims: number of leading axes the two share.
      op: which op multiplies ternary codes, see `bitnet_jax.ops`; None picks it.

    Returns:
      int32 (*batch, groups, *rows, out): one sum for each group of inputs that shares a scale.

    >>> from bitnet_jax import Ternary
    >>> accumulate(jnp.ones((2, 4), jnp.int8), Ternary(jnp.ones((4, 1), jnp.int8), jnp.ones((2, 1)),
    ...     group=2)).ravel().tolist()
    [2, 2, 2, 2]
    """
    if isinstance(weight, PackedTernary):
        if weight.group % 4 == 0:
            return _packed_sums(x, weight, batch_dims, op)
        weight = unpack_weight(weight)  # a byte whose codes have different scales
    if isinstance(weight, PackedInt8):
        sums = int8_product(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.codes)
        return sums.reshape(1, *x.shape[:-1], sums.shape[-1])
    product = functools.partial(_dense_product, op=op if isinstance(weight, Ternary) else "xla")
    if not weight.group:
        return jnp.expand_dims(product(x, weight.codes, batch_dims), batch_dims)
    blocks, _ = grouped(weight.codes, weight.group)
    groups, size = blocks.shape[-3:-1]
    return product(_by_group(x, groups, size, batch_dims), blocks, batch_dims + 1)


def _pick(op: str | None, rows: int, inputs: int, outputs: int, dtype) -> Callable[[str], str]:
    """platform -> ``"native"`` or ``"xla"``, for rows of a dtype times one-byte ternary codes."""
    if op is not None:
        return lambda platform: "native" if op == "native" else "xla"
    return lambda platform: choose_dense(platform, rows, inputs, outputs, dtype)


def _flat(x: jax.Array, batch_dims: int) -> jax.Array:
    """(*batch, *rows, size) -> (*batch, rows, size)."""
    return x.reshape(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:-1]), x.shape[-1])


def _dense_product(x: jax.Array, codes: jax.Array, batch_dims: int, op: str | None):
    """int8 (*batch, *rows, in) times codes (*batch, in, out), int32 (*batch, *rows, out)."""
    rows, (inputs, outputs) = x.shape[batch_dims:-1], codes.shape[-2:]

    def native(x, codes):
        y = training.ternary_product(_flat(x, batch_dims), codes)
        return y.reshape(*y.shape[:batch_dims], *rows, y.shape[-1])

    forms = {"native": native, "xla": lambda x, codes: integer_product(x, codes, batch_dims)}
    pick = _pick(op, math.prod(rows), inputs, outputs, x.dtype)
    return by_platform(pick, forms, x, codes)


def _by_group(x: jax.Array, groups: int, size: int, batch_dims: int) -> jax.Array:
    """(*batch, *rows, in) -> (*batch, groups, *rows, size), with zeros where inputs end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - x.shape[-1])])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, size), -2, batch_dims)


def _packed_sums(x: jax.Array, weight: PackedTernary, batch_dims: int, op: str | None):
    """`accumulate` of packed codes whose groups, if any, are whole bytes."""
    codes, size = weight.codes, weight.group or weight.in_features
    groups = max(-(-weight.in_features // max(size, 1)), 1)
    if weight.group:
        # Missing rows of bytes may hold anything: the inputs that meet them are zeros.
        pad = [(0, 0)] * (codes.ndim - 2) + [(0, groups * size // 4 - codes.shape[-2]), (0, 0)]
        codes = jnp.pad(codes, pad)
    x = _by_group(x, groups, size, batch_dims)
    rows = x.shape[batch_dims + 1 : -1]
    x = x.reshape(*x.shape[: batch_dims + 1], math.prod(rows), size)
    codes = codes.reshape(*codes.shape[:-2], groups, codes.shape[-2] // groups, codes.shape[-1])
    sums = packed_product(x, codes, size, op=op)
    return sums.reshape(*sums.shape[:-2], *rows, sums.shape[-1])


def _rows_like(scale: jax.Array, rows: int) -> jax.Array:
    """(*batch, groups, out) -> (*batch, groups, 1 for each row axis, out)."""
    return scale.reshape(*scale.shape[:-1], *(1,) * rows, scale.shape[-1])


def _scaled(
    x: jax.Array, weight: Quantized | PackedTernary | PackedInt8, batch_dims: int, op: str | None
):
    """x int8 (*batch, *rows, in) times codes and scale, float32 (*batch, *rows, out)."""
    if weight.group and isinstance(weight, Int8 | Int4):
        # The sums of each group by itself take groups times the room of the result: for 256 rows
        # of tokens and groups of 32 most of a layer's time. These are no ternary codes, whose
        # accumulators every op agrees on, so one product in float32 serves them better.
        batch = tuple(range(batch_dims))
        dims = (((x.ndim - 1,), (batch_dims,)), (batch, batch))
        values = matrix_values(weight)
        return lax.dot_general(x.astype(jnp.float32), values, dims, lax.Precision.HIGHEST)
    sums = accumulate(x, weight, batch_dims, op).astype(jnp.float32)
    # Scales come after the sum: the accumulators stay integers, equal on every path.
    rows = x.ndim - 1 - batch_dims
    y = sums * _rows_like(weight.scale, rows)
    return y.sum(batch_dims) if weight.group else y.squeeze(batch_dims)


# The layers of a network have few shapes: jit traces and lowers a product once for each of them.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _rescaled(codes, scale, weight, batch_dims, dtype, op):
    """`_scaled` times the activations' scale, in dtype; one kernel for many rows on Hopper."""
    plain = lambda *a: (_scaled(a[0], a[2], batch_dims, op) * a[1]).astype(dtype)
    shape, outputs = codes.shape, weight.codes.shape[-1]
    fits = scaled.fits(math.prod(shape[:-1]), shape[-1], outputs, dtype) and mosaic.available()
    if not fits or batch_dims or weight.group or op is not None:
        return plain(codes, scale, weight)

    def kernel(codes, scale, weight):
        weight = unpack_weight(weight) if isinstance(weight, Packed) else weight
        x, scale = codes.reshape(-1, shape[-1]), scale.reshape(-1, 1)
        out = scaled.scaled_product(x, scale, weight.codes, weight.scale, dtype)
        return out.reshape(*shape[:-1], outputs)

    return lax.platform_dependent(codes, scale, weight, cuda=kernel, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _product(x, latent, weight, batch_dims, dtype, precision, op):
    """x (*batch, *rows, in) times weight (*batch, in, out); ``latent`` only receives a gradient."""
    return _product_fwd(x, latent, weight, batch_dims, dtype, precision, op)[0]


def _product_fwd(x, latent, weight, batch_dims, dtype, precision, op):
    codes, scale = quantize_activations(x)
    out = _rescaled(codes, scale, weight, batch_dims, dtype, op)
    # Whether there is a latent weight is structure, so that it stays known to Python.
    trained = None if latent is None else ()
    return out, (codes, scale, weight, trained)


def _product_bwd(batch_dims, dtype, precision, op, residuals, g):
    """dx = g @ q(w).T and dw = q(x).T @ g: the straight-through estimator on both sides."""
    codes, scale, weight, trained = residuals
    weight = unpack_weight(weight) if isinstance(weight, Packed) else weight
    dx = _grad_input(g, weight, batch_dims, dtype, precision, op)
    if trained is None:
        return dx, None, None
    return dx, _grad_weight(codes, scale, g, batch_dims, dtype, precision, op), None


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _grad_input(g, weight, batch_dims, dtype, precision, op):
    """g (*batch, *rows, out) @ q(w).T, float32 (*batch, *rows, in)."""
    batch = tuple(range(batch_dims))

    def by_xla(g, weight):
        qw = matrix_values(weight).astype(dtype)
        dims = (((g.ndim - 1,), (batch_dims + 1,)), (batch, batch))
        return lax.dot_general(g, qw, dims, precision=precision).astype(jnp.float32)

    def native(g, weight):
        # One scale for all outputs goes to the end; one an output goes in front of the sums.
        wide, last = _flat(g, batch_dims).astype(jnp.float32), weight.scale.shape[-1] == 1
        wide = wide if last else wide * weight.scale
        dx = training.ternary_product(wide, weight.codes, transposed=True)
        return (dx * weight.scale if last else dx).reshape(*g.shape[:-1], dx.shape[-1])

    if not isinstance(weight, Ternary) or weight.group:
        return by_xla(g, weight)
    inputs, outputs = weight.codes.shape[-2:]
    pick = _pick(op, math.prod(g.shape[batch_dims:-1]), outputs, inputs, g.dtype)
    return by_platform(pick, {"native": native, "xla": by_xla}, g, weight)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _grad_weight(codes, scale, g, batch_dims, dtype, precision, op):
    """q(x).T @ g, float32 (*batch, in, out)."""
    batch, rows = tuple(range(batch_dims)), tuple(range(batch_dims, g.ndim - 1))

    def by_xla(codes, scale, g):
        qx = (codes * scale).astype(dtype)
        dims = ((rows, rows), (batch, batch))
        return lax.dot_general(qx, g, dims, precision=precision).astype(jnp.float32)

    def in_16_bits(codes, scale, g):
        codes, scale, g = (_flat(a, batch_dims) for a in (codes, scale, g))
        return training.grad_weight(codes, scale[..., 0], g.astype(jnp.float32))

    if not _reduced(precision):
        return by_xla(codes, scale, g)
    count = math.prod(g.shape[i] for i in rows)
    # With AMX too XLA's form takes as long in bfloat16 as in float32: g's dtype does not matter.
    pick = _pick(op, count, codes.shape[-1], g.shape[-1], jnp.float32)
    return by_platform(pick, {"native": in_16_bits, "xla": by_xla}, codes, scale, g)


def _reduced(precision: Any) -> bool:
    """Whether float32 products may be computed from operands of fewer bits."""
    names = ("default", "high", "bfloat16", "tensorfloat32", "bfloat16_3x", "fastest")
    parts = precision if isinstance(precision, tuple) else (precision,)
    return all(p in names or p in (lax.Precision.DEFAULT, lax.Precision.HIGH) for p in parts)


_product.defvjp(_product_fwd, _product_bwd)


def _contract_last(x: jax.Array, contract: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """Bring x to (*batch, *rows, in); contracted axes are flattened into one."""
    rows = [i for i in range(x.ndim) if i not in (*contract, *batch)]
    order = (*batch, *rows, *contract)
    if order != tuple(range(x.ndim)):
        x = lax.transpose(x, order)
    return x.reshape(*x.shape[: len(batch) + len(rows)], -1) if len(contract) != 1 else x


def _latent_matrix(w: jax.Array, contract: Sequence[int], batch: Sequence[int]):
    """Bring w to (*batch, in, out) and say the shape ``out`` had."""
    free = [i for i in range(w.ndim) if i not in (*contract, *batch)]
    order = (*batch, *contract, *free)
    if order != tuple(range(w.ndim)):
        w = lax.transpose(w, order)
    lead, rest = w.shape[: len(batch)], w.shape[len(batch) :]
    size, out = rest[: len(contract)], rest[len(contract) :]
    return w.reshape(*lead, math.prod(size), math.prod(out)), out


def _leaf_matrix(
    w: Quantized | Packed, contract: Sequence[int], batch: Sequence[int]
) -> tuple[Quantized | PackedTernary | PackedInt8, tuple[int, ...]]:
    """A quantised leaf already lies as (*batch, in, out): check it, say out's axes.

    It stays packed if an op reads its bytes as they are.
    """
    stack = w.codes.ndim - 2
    inputs = tuple(range(stack, stack + max(len(w.in_shape), 1)))
    if tuple(batch) != tuple(range(stack)) or tuple(contract) != inputs:
        raise ValueError(
            f"a quantised leaf of shape {w.shape} contracts its axes {inputs}, with the axes "
            f"before them as batch; got contract {tuple(contract)}, batch {tuple(batch)}"
        )
    out = split(w.codes.shape[-1], w.out_shape)
    if isinstance(w, Quantized | PackedTernary):
        return w, out
    if isinstance(w, PackedInt8) and not w.group and not stack:
        return w, out
    return unpack_weight(w), out


def _weight_of(
    rhs: Any, scheme: Scheme, contract: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array | None, Quantized | PackedTernary | PackedInt8, tuple[int, ...]]:
    """(latent matrix or None, quantised matrix, output axes) of whatever stands on the right."""
    if isinstance(rhs, Quantized | Packed):
        weight, out = _leaf_matrix(rhs, contract, batch)
        return None, weight, out
    if isinstance(rhs, Prequantized):
        latent, out = _latent_matrix(rhs.latent.astype(jnp.float32), contract, batch)
        return latent, _leaf_matrix(rhs.weight, contract, batch)[0], out
    latent, out = _latent_matrix(rhs.astype(jnp.float32), contract, batch)
    return latent, quantize_weights(lax.stop_gradient(latent), scheme), out


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array | Quantized | Packed | Prequantized | Acting,
    dimension_numbers: DimensionNumbers,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    *,
    scheme: Scheme | None = Scheme(),
    op: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` with a ternary right-hand side and int8 activations.

    q(x) = codes_x * scale_x (one scale a row), q(w) = codes_w * scale_w (as the scheme says)
    out  = (codes_x @ codes_w as int32) * scale_w * scale_x
    dx   = g @ q(w).T,  dw = q(x).T @ g   (straight-through: w + stop_gradient(q(w) - w))

    Put it into any Flax layer that takes a ``dot_general``:
    ``nn.DenseGeneral(8, dot_general=bitnet_jax.dot_general)``, or, for another scheme,
    ``dot_general=bitnet_jax.with_scheme(Scheme("twn", "channel"))``.

    Args:
      lhs: activations, float, any shape; quantised over the contracted axes together.
      rhs: latent weights (float, any shape), quantised here; or a quantised leaf, packed or not, of
        shape (*batch, *in axes, *out axes), whose codes are multiplied as they are; or a leaf that
        says itself what multiplying by it means (`bitnet_jax.leaf.Acting`).
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: of the backward products; the forward one is exact. None is float32; with
        ``"high"`` or ``"tensorfloat32"``, or less, grad-weight may take 16 bits of each gradient
        (`bitnet_jax.ops.training.grad_weight`) where that is faster.
      preferred_element_type: dtype of the result; by default lhs's.
      out_sharding: as in `jax.lax.dot_general`, for meshes with explicit axes.
      scheme: how latent weights are quantised; None to leave them, and the activations that meet
        them, in float, as `jax.lax.dot_general` does. Quantised leaves carry their own.
      op: which op multiplies ternary codes, a name out of `bitnet_jax.ops.OPS`; None picks the one
        that suits. All give the same accumulators, and gradients equal to float rounding.

    Returns:
      (*batch, *lhs free axes, *rhs free axes). Differentiable in lhs, and in rhs when it is latent.

    Raises:
      ValueError: if a quantised leaf is asked to contract axes that are not its inputs, or the
        contracted sizes differ.

    >>> x, w = jnp.ones((2, 3)), jnp.array([[0.5], [-0.5], [0.5]])
    >>> dot_general(x, w, (((1,), (0,)), ((), ()))).round(4).tolist()
    [[0.5], [0.5]]
    """
    if isinstance(rhs, Acting):
        again = lambda scheme: lambda lhs, rhs: dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding,
            scheme=scheme, op=op,
        )  # fmt: skip
        (contract, _), (batch, _) = dimension_numbers
        call = Product(again(scheme), again(None), tuple(contract), tuple(batch))
        return rhs.product(lhs, call)
    if scheme is None and not is_quantized(rhs):
        return _plain(lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    # float32 from here on; the casts' own transposes give each gradient its dtype back.
    x = _contract_last(lhs, lhs_contract, lhs_batch).astype(jnp.float32)
    latent, weight, out = _weight_of(rhs, scheme or Scheme(), rhs_contract, rhs_batch)
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"lhs contracts {x.shape[-1]} features, rhs {weight.in_features}")
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    y = jnp.asarray(_product(x, latent, weight, len(lhs_batch), dtype, precision, op))
    y = y.reshape(*y.shape[:-1], *out) if len(out) != 1 else y
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _plain(lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding):
    """`jax.lax.dot_general` on latent weights, in the activations' dtype."""
    extra = {} if out_sharding is None else {"out_sharding": out_sharding}
    dtype = preferred_element_type
    rhs = rhs.astype(lhs.dtype)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, dtype, **extra)


@functools.cache
def with_scheme(scheme: Scheme | None) -> Callable[..., jax.Array]:
    """`dot_general` bound to a scheme.

    One object for each scheme, so that modules that hold it compare equal.

    >>> with_scheme(Scheme("twn")) is with_scheme(Scheme("twn"))
    True
    """
    return functools.partial(dot_general, scheme=scheme)
