"""The products of a training step in C++, for CPUs without matrix units for what meets the codes.

A multiplication of bytes gains little there (VNNI) or nothing (AVX2), but ternary codes need none:
for four inputs the 81 sums there can be are computed once and looked up, in int8 and in float32
alike. Compiled at first use like `native`, beside it, and missing where that one is.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from . import build

_TARGETS = ("bitnet_ternary_product", "bitnet_grad_weight")
_library = build.opener("training.cpp", "training_kernels.h", targets=_TARGETS)


def status() -> str:
    """One sentence: which variant of the ops is used here, or why there is none.

    Compiles them if that was not done yet, which takes some seconds, once.
    """
    return _library().status


def variants() -> tuple[str, ...]:
    """Variants of the ops that run here, the best first; empty where there is none."""
    return _library().variants


def ternary_product(
    x: jax.Array, codes: jax.Array, *, transposed: bool = False, isa: str | None = None
) -> jax.Array:
    """Rows times ternary codes: int8 ones exactly, float32 ones to float rounding.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 or float32 (*batch, rows, k).
      codes: int8 (*batch, k, n), each -1, 0 or 1.
      transposed: codes are (*batch, n, k) instead; they are read as they lie.
      isa: a name out of `variants`, to force it.

    Returns:
      (*batch, rows, n), int32 of int8 and float32 of float32. Batch axes broadcast.

    Raises:
      RuntimeError: if there are no such ops here, with `status` as the reason.

    >>> x, codes = jnp.array([[2.5, 1, 3]]), jnp.array([[1], [0], [-1]], jnp.int8)
    >>> (ternary_product(x, codes) if variants() else x @ codes).tolist()
    [[-0.5]]
    """
    n = codes.shape[-2 if transposed else -1]
    if x.shape[-1] != codes.shape[-1 if transposed else -2]:
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit")
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    batch = np.broadcast_shapes(x.shape[:-2], codes.shape[:-2])
    call = _call("bitnet_ternary_product", (*batch, x.shape[-2], n), dtype, isa, x, codes)
    return call(*_spread(len(batch), (x, 2), (codes, 2)), transposed=transposed)


def grad_weight(
    codes: jax.Array, scale: jax.Array, g: jax.Array, *, isa: str | None = None
) -> jax.Array:
    """The gradient of a weight, with the gradients that meet it in 16 bits.

    out[b, k, n] = sum over m of codes[b, m, k] * unit[b, n] * round(h[b, m, n] / unit[b, n])
    h = scale * g,  unit = max over m of abs h / 32767, for each 512 rows by themselves

    An error of a unit's half stands beside 2 ** -9 of each gradient in bfloat16 and 2 ** -11 in
    TensorFloat-32. A gradient that is not finite makes its whole column NaN.

    Args:
      codes: int8 (*batch, rows, k), of the activations.
      scale: float32 (*batch, rows), theirs.
      g: float32 (*batch, rows, n).
      isa: a name out of `variants`, to force it.

    Returns:
      float32 (*batch, k, n). Batch axes broadcast.

    Raises:
      RuntimeError: if there are no such ops here, with `status` as the reason.

    >>> codes, g = jnp.array([[2, 1]], jnp.int8), jnp.array([[3.0]])
    >>> dw = grad_weight(codes, jnp.ones(1), g) if variants() else codes.T @ g
    >>> dw.round(4).tolist()
    [[6.0], [3.0]]
    """
    if not codes.shape[-2] == scale.shape[-1] == g.shape[-2]:
        raise ValueError(f"codes {codes.shape}, scale {scale.shape} and g {g.shape} do not fit")
    batch = np.broadcast_shapes(codes.shape[:-2], scale.shape[:-1], g.shape[:-2])
    shape = (*batch, codes.shape[-1], g.shape[-1])
    call = _call("bitnet_grad_weight", shape, jnp.float32, isa, codes, scale, g)
    return call(*_spread(len(batch), (codes, 2), (scale, 1), (g, 2)))


def _spread(axes: int, *operands: tuple[jax.Array, int]) -> list[jax.Array]:
    """Operands with batch axes in front, of length 1 where they had none, and axes of their own."""
    return [a.reshape((1,) * (axes + own - a.ndim) + a.shape) for a, own in operands]


def _call(target: str, shape: tuple, dtype, isa: str | None, *operands: jax.Array) -> Callable:
    isa = _library().pick(isa)
    # A sum of all operands has what shard_map wants to know: along which mesh axes results differ.
    out = jax.eval_shape(
        lambda *a: jnp.zeros(shape, dtype) + sum(x.sum().astype(dtype) for x in a), *operands
    )
    call = jax.ffi.ffi_call(target, out, vmap_method="expand_dims")
    return functools.partial(call, isa=isa)
