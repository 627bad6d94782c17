"""Weights to codes and scale, activations to int8: pure functions in float32.

Every rounding is half to even and every scale is float32, whatever the dtype that came in:
computing them in bfloat16 flips 0.2 % of the codes.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .leaf import Int4, Int8, Quantized, Sparse, Ternary
from .ops import quantise
from .reduce import abs_sum, over

# Clamp of the mean |w| below which a scale would divide by (almost) zero. BitNet b1.58 clamps at
# 1e-5 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"), the sandbox's layer at 1e-8.
# For the integer rules it bounds the largest |w|.
_SMALLEST_SCALE = {"absmean": 1e-5} | dict.fromkeys(
    ("threshold", "twn", "sherry", "int8", "int4"), 1e-8
)
# Share of the mean |w| under which a weight becomes 0; absmean needs none, it rounds.
_THRESHOLD = {"threshold": 0.1, "twn": 0.7}
# Largest |x| of a token is at least this, so that a row of zeros has a finite scale (same paper).
_SMALLEST_ACTIVATION = 1e-5


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How latent weights become codes and scale.

    With m the mean and M the maximum of |w| over the elements that share a scale:

    | rule      | code                                | scale                       |
    |-----------|-------------------------------------|-----------------------------|
    | absmean   | clip(round(w / m), -1, 1)           | m                           |
    | threshold | 0 where abs w < t m, else sign(w)   | m                           |
    | twn       | 0 where abs w < t m, else sign(w)   | mean abs w of the non-zeros |
    | sherry    | 0 for the smallest abs w of four    | mean abs w of the non-zeros |
    |           | inputs 4j..4j+3, else +-1 as w >= 0 |                             |
    | int8      | round(127 w / M)                    | M / 127                     |
    | int4      | round(7 w / M)                      | M / 7                       |

    The last two are not ternary: they are what small models and embeddings are better kept in,
    by the same operator, layers and checkpoints.

    Args:
      rule: ``"absmean"`` (BitNet b1.58, arXiv 2402.17764), ``"threshold"`` (the Phase 4 sandbox,
        t = 0.1), ``"twn"`` (Ternary Weight Networks, arXiv 1605.04711, t = 0.7: close to the
        least squares choice of codes, and exactly the least squares scale for them), ``"sherry"``
        (3:4 sparse, 1.25 bits packed; Tencent AngelSlim; the first of equals is 0), ``"int8"`` or
        ``"int4"`` (symmetric, levels +-127 and +-7).
      scale: what shares a scale: ``"tensor"``, ``"channel"`` (each output has its own), ``"row"``
        (each input has its own: for tables that are looked up by row, embeddings) or an integer,
        the number of consecutive inputs of one output that share one.
      threshold: t above; None takes the rule's own. Only for threshold and twn.

    Raises:
      ValueError: for a rule, scale or threshold that does not exist.

    >>> Scheme("twn", scale=64)
    Scheme(rule='twn', scale=64, threshold=None)
    """

    rule: Literal["absmean", "threshold", "twn", "sherry", "int8", "int4"] = "absmean"
    scale: Literal["tensor", "channel", "row"] | int = "tensor"
    threshold: float | None = None

    def __post_init__(self):
        if self.rule not in _SMALLEST_SCALE:
            raise ValueError(f"rule {self.rule!r}: expected one of {', '.join(_SMALLEST_SCALE)}")
        is_group = isinstance(self.scale, int) and not isinstance(self.scale, bool)
        if not (self.scale in ("tensor", "channel", "row") or (is_group and int(self.scale) > 0)):
            raise ValueError(
                f"scale {self.scale!r}: expected 'tensor', 'channel', 'row' or a group size above 0"
            )
        if self.rule == "sherry" and (self.scale == "row" or (is_group and int(self.scale) % 4)):
            raise ValueError(f"scale {self.scale!r}: rule 'sherry' needs a multiple of 4 inputs")
        if self.threshold is not None and (self.rule not in _THRESHOLD or not self.threshold >= 0):
            raise ValueError(f"threshold {self.threshold!r} does not fit rule {self.rule!r}")


_KINDS: dict[str, type[Quantized]] = {"int8": Int8, "int4": Int4, "sherry": Sparse}
LEVELS = {"int8": 127, "int4": 7}


def grouped(w: jax.Array, group: int) -> tuple[jax.Array, np.ndarray]:
    """(..., in, out) -> (..., groups, group, out) zero-padded, and true rows (groups, 1, 1)."""
    size = w.shape[-2]
    group = group or max(size, 1)
    groups = max(-(-size // group), 1)
    if missing := groups * group - size:
        w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, missing), (0, 0)])
    blocks = w.reshape(*w.shape[:-2], groups, group, w.shape[-1])
    return blocks, rows_of(size, group, groups)[:, None, None]


def rows_of(size: int, group: int, groups: int) -> np.ndarray:
    """How many of ``size`` inputs each group has, float32 (groups,).

    >>> rows_of(10, 4, 3).tolist()
    [4.0, 4.0, 2.0]
    """
    return np.clip(size - np.arange(groups) * group, 1, group).astype(np.float32)


def ungrouped(blocks: jax.Array, size: int) -> jax.Array:
    """Inverse of `grouped`: (..., groups, group, out) -> (..., in, out)."""
    *lead, groups, group, out = blocks.shape
    return blocks.reshape(*lead, groups * group, out)[..., :size, :]


@functools.partial(jax.jit, static_argnames="scheme")
def quantize_weights(w: jax.Array, scheme: Scheme = Scheme()) -> Quantized:
    """Latent weights to a quantised weight: ternary, or int8 or int4 by the rules of that name.

    Args:
      w: latent weights, shape (..., in, out), any float dtype; leading axes are a stack of
        matrices, each with scales of its own.
      scheme: the rule and what shares a scale; its docstring has the equations.

    Returns:
      `Ternary` (`Int8`, `Int4`) with codes (..., in, out) int8 and scale (..., groups, out or 1)
      float32. Their gradient is zero (rounding has none): `dot_general` carries the
      straight-through one.

    >>> w = jnp.array([[1.0, -1.0], [-0.1, 0.1], [2.0, 0.01]])
    >>> quantize_weights(w, Scheme("threshold", "channel")).codes.tolist()
    [[1, -1], [0, 1], [1, 0]]
    """
    group = scheme.scale if isinstance(scheme.scale, int) else int(scheme.scale == "row")
    # Constants to whoever differentiates: what is under this has no rules for it.
    blocks, rows = grouped(jax.lax.stop_gradient(w).astype(jnp.float32), group)
    axes = (-2, -1) if scheme.scale in ("tensor", "row") else (-2,)
    if scheme.rule in LEVELS:
        codes, scale = _round_to_levels(blocks, axes, scheme)
    else:
        codes, scale = _round_to_ternary(blocks, rows, axes, scheme)
    scale = scale[..., None] if -1 in axes else scale
    kind = _KINDS.get(scheme.rule, Ternary)
    return kind(ungrouped(codes, w.shape[-2]).astype(jnp.int8), scale, group)


def _round_to_ternary(blocks: jax.Array, rows: np.ndarray, axes: tuple[int, ...], scheme: Scheme):
    """Codes (..., groups, group, out) and scale, without the axes that share it, of a rule."""
    if scheme.rule == "sherry":
        codes = _smallest_of_four_to_zero(blocks, rows)
        kept = jnp.abs(codes)
        return codes, scale_of((jnp.abs(blocks) * kept).sum(axes), kept.sum(axes), scheme)
    count = rows[:, 0, 0] * blocks.shape[-1] if -1 in axes else rows[:, 0]
    mean = mean_of(abs_sum(blocks, axes), count, scheme)
    # Axes come back after the arithmetic: XLA moves a reshape before it behind it, one operation
    # in each of its rounds of simplification, and a training step took eight of them, not four.
    cut = jnp.expand_dims(cut_of(mean, scheme), axes)
    codes = _codes(blocks, cut)
    if scheme.rule != "twn":
        return codes, mean
    kept, number = over(_kept, jnp.add, blocks, axes, cut)
    return codes, scale_of(kept, number, scheme)


def mean_of(total: jax.Array, count: jax.Array | np.ndarray, scheme: Scheme) -> jax.Array:
    """m of `Scheme`'s table, bounded from below, from the sum of |w| and how many they are."""
    return jnp.maximum(total / count, _SMALLEST_SCALE[scheme.rule])


def cut_of(mean: jax.Array, scheme: Scheme) -> jax.Array:
    """The smallest |w| whose code is not 0; also for absmean, without rounding anything.

    round(w / m) is half to even, so it is 0 up to |w| = m / 2 and not above; and the float32
    quotient is above 1/2 as soon as w is above m / 2, which is exact.

    >>> cut_of(jnp.float32(4), Scheme("threshold", threshold=0.5)).item()
    2.0
    """
    if scheme.rule == "absmean":
        # Its bits plus one: mean is above 0, and `jnp.nextafter` is 30 operations for all floats.
        bits = jax.lax.bitcast_convert_type(0.5 * mean, jnp.int32)
        return jax.lax.bitcast_convert_type(bits + 1, jnp.float32)
    # A weight exactly on the threshold keeps its sign, as in the sandbox's layer.
    return mean * (_THRESHOLD[scheme.rule] if scheme.threshold is None else scheme.threshold)


def codes_by_cut(w: jax.Array, cut: jax.Array) -> jax.Array:
    """int8: the sign of w where |w| >= cut, else 0."""
    return (w >= cut).astype(jnp.int8) - (w <= -cut).astype(jnp.int8)


def _codes(blocks: jax.Array, cut: jax.Array) -> jax.Array:
    """`codes_by_cut`, in C++ where the op serves: nothing to compile for every layer anew."""

    def native(blocks, cut):
        flat = lambda x: x.reshape(-1, *x.shape[-2:])
        return quantise.signs(flat(blocks), flat(cut)).reshape(blocks.shape)

    if not quantise.serves(blocks):
        return codes_by_cut(blocks, cut)
    return lax.platform_dependent(blocks, cut, cpu=native, default=codes_by_cut)


def _kept(w: jax.Array, cut: jax.Array) -> tuple[jax.Array, jax.Array]:
    kept = codes_by_cut(w, cut) != 0
    return jnp.where(kept, jnp.abs(w), 0.0), kept.astype(jnp.float32)


def scale_of(kept: jax.Array, number: jax.Array, scheme: Scheme) -> jax.Array:
    """The mean of the |w| whose code is not 0, from their sum and their number."""
    return jnp.maximum(kept / jnp.maximum(number, 1.0), _SMALLEST_SCALE[scheme.rule])


def _smallest_of_four_to_zero(blocks: jax.Array, rows: np.ndarray) -> jax.Array:
    """Signs of blocks (..., groups, group, out), 0 for one of each four; missing inputs first."""
    *lead, size, out = blocks.shape
    there = jnp.arange(size)[:, None] < rows
    pad = [(0, 0)] * len(lead) + [(0, -size % 4), (0, 0)]
    each = jnp.pad(jnp.where(there, jnp.abs(blocks), -1.0), pad, constant_values=-1.0)
    fours = each.reshape(*lead, -1, 4, out)
    smallest = jnp.arange(4)[:, None] == jnp.argmin(fours, axis=-2, keepdims=True)
    dropped = smallest.reshape(*lead, -1, out)[..., :size, :] | ~there
    return jnp.where(dropped, 0.0, jnp.where(blocks >= 0, 1.0, -1.0))


def _round_to_levels(blocks: jax.Array, axes: tuple[int, ...], scheme: Scheme):
    """Codes and scale of an integer rule, shapes as above."""
    levels = LEVELS[scheme.rule]
    (largest,) = over(lambda w: (jnp.abs(w),), jnp.maximum, blocks, axes)
    largest = jnp.maximum(largest, _SMALLEST_SCALE[scheme.rule])
    rounded = jnp.round(blocks * jnp.expand_dims(levels / largest, axes))
    return jnp.clip(rounded, -levels, levels), largest / levels


def quantize_kernel(w: jax.Array, scheme: Scheme, inputs: int | None = None) -> Quantized:
    """Quantise a kernel of any number of axes, as the matrix (inputs, outputs) that it is.

    Args:
      w: latent weights; without ``inputs`` (..., in, out), with leading axes a stack.
      scheme: how they become codes and scale.
      inputs: number of leading axes that are inputs; the rest are outputs.

    >>> quantize_kernel(jnp.ones((8, 2, 4)), Scheme(), inputs=1).codes.shape
    (8, 8)
    """
    if inputs is None:
        return quantize_weights(w, scheme)
    ins, outs = w.shape[:inputs], w.shape[inputs:]
    weight = quantize_weights(w.reshape(math.prod(ins), math.prod(outs)), scheme)
    several = lambda shape: shape if len(shape) > 1 else ()
    return dataclasses.replace(weight, in_shape=several(ins), out_shape=several(outs))


def matrix_values(weight: Quantized) -> jax.Array:
    """Codes times scale as float32, in the flattened matrix's shape (..., in, out)."""
    blocks, _ = grouped(weight.codes, weight.group)
    values = blocks.astype(jnp.float32) * weight.scale[..., :, None, :]
    return ungrouped(values, weight.codes.shape[-2])


@functools.partial(jax.jit, inline=True)  # by itself one program, in another nothing of its own
def dequantize(weight: Quantized) -> jax.Array:
    """Codes times scale: the float32 values a quantised weight stands for, in the kernel's shape.

    Feeding the result to `quantize_weights` again keeps the codes but, under absmean, shrinks the
    scale by the density of the codes; carry the `Ternary` instead.

    >>> dequantize(Ternary(jnp.array([[1, -1]], jnp.int8), jnp.array([[0.5, 2.0]]))).tolist()
    [[0.5, -2.0]]
    """
    return matrix_values(weight).reshape(weight.shape)


def quantize_activations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations to int8, one scale a token: codes = round(127 x / max abs x), half to even.

    Args:
      x: activations, shape (..., features), any float dtype.

    Returns:
      codes int8 (..., features) in [-127, 127] and scale float32 (..., 1), so that
      x is about codes * scale. From BitNet b1.58 (arXiv 2402.17764).

    >>> codes, scale = quantize_activations(jnp.array([[1.0, -0.5, 0.0]]))
    >>> codes.tolist(), round(float(scale[0, 0]), 6)
    ([[127, -64, 0]], 0.007874)
    """
    x = jnp.asarray(x, jnp.float32)
    if not quantise.serves(x):
        return _by_xla(x)
    return lax.platform_dependent(x, cpu=_by_cpp, default=_by_xla)


def _by_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scale = _activation_codes(x, (-1,))
    return codes.astype(jnp.int8), scale


@jax.custom_jvp
def _by_cpp(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same bits in less than half the time, with nothing to compile for every layer anew.

    A row with a NaN has the scale NaN; XLA's maximum loses some.
    """
    return quantise.codes(x, _SMALLEST_ACTIVATION)


_by_cpp.defjvp(lambda primals, tangents: jax.jvp(_by_xla, primals, tangents))


def _activation_codes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=_SMALLEST_ACTIVATION)
    return jnp.clip(jnp.round(x * (127.0 / largest)), -128, 127), largest / 127.0


def round_activations(x: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Codes times scale of `quantize_activations`: the float32 values that int8 can carry.

    Args:
      x: activations, any float dtype.
      axes: those that share a scale, the contracted ones of a product.

    Returns:
      float32, of x's shape. Its gradient is rounding's, zero: wrap it in `straight_through`.

    >>> [round(v, 4) for v in round_activations(jnp.array([1.0, -0.5, 0.0])).tolist()]
    [1.0, -0.5039, 0.0]
    """
    codes, scale = _activation_codes(x, axes)
    return codes * scale


def straight_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
    """The straight-through estimator: the value of ``quantized``, the gradient of ``x``.

    x + stop_gradient(quantized - x), from arXiv 1308.3432. `dot_general` has this gradient built
    in; this form is for code that quantises something else.

    >>> jax.grad(lambda x: 3 * straight_through(x, jnp.round(x)))(0.4).item()
    3.0
    """
    return x + jax.lax.stop_gradient(quantized.astype(x.dtype) - x)
