"""Experimental: packed codes multiplied on a TPU, unpacked in its vector memory. Nobody timed it.

It was run in Pallas's interpreter only, and lowered for a TPU without one. `op="pallas-tpu"` asks
for it; nothing picks it by itself until someone has measured it beside XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import xla

# A block: packed inputs and outputs of a step (128 lanes; 32 sublanes of int8), and rows.
_PACKED, _OUT, _ROWS = 256, 256, 128


def _kernel(x, codes, out):
    """x int8 (4, rows, packed): plane j has inputs 4 p + j; codes uint8 (packed, out)."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    # Shifts of bytes do not lower on every generation, those of int32 do.
    words = codes[...].astype(jnp.int32)
    for j in range(4):
        plane = ((words >> 2 * j) & 3).astype(jnp.int8)
        out[...] += jnp.dot(x[j], plane, preferred_element_type=jnp.int32)


@functools.partial(jax.jit, static_argnames=("interpret",))
def _product(x: jax.Array, codes: jax.Array, interpret: bool) -> jax.Array:
    """x int8 (rows, k), codes uint8 (p, n) -> int32 (rows, n)."""
    (rows, k), (packed, n) = x.shape, codes.shape
    high = min(_ROWS, -(-rows // 32) * 32)
    blocks = -(-rows // high), -(-n // _OUT), -(-packed // _PACKED)
    # What lies beyond the codes is anything, and is multiplied by these zeros.
    padded = jnp.pad(x, ((0, blocks[0] * high - rows), (0, 4 * _PACKED * blocks[2] - k)))
    planes = padded.reshape(padded.shape[0], -1, 4).transpose(2, 0, 1)
    out = pl.pallas_call(
        _kernel,
        grid=blocks,
        in_specs=[
            pl.BlockSpec((4, high, _PACKED), lambda m, n, p: (0, m, p)),
            pl.BlockSpec((_PACKED, _OUT), lambda m, n, p: (p, n)),
        ],
        out_specs=pl.BlockSpec((high, _OUT), lambda m, n, p: (m, n)),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], n), jnp.int32),
        interpret=interpret,
    )(planes, codes)
    # Codes are stored one too large.
    return out[:rows] - x.astype(jnp.int32).sum(1, keepdims=True)


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """int8 activations times packed ternary codes on a TPU with int8 units; `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k).
      codes: uint8 (*batch, ceil(k / 4), n); with an index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by.
      interpret: run it without a TPU, in Pallas's interpreter.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    >>> x, codes = jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8)
    >>> packed_product(x, codes, 3, interpret=True).tolist()
    [[6]]
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x {x.shape} does not have {in_features} features")
    if not x.size or not codes.size:
        return xla.packed_product(x, codes, in_features, index)
    one = functools.partial(_product, interpret=interpret)
    return jnp.vectorize(one, signature="(m,k),(p,n)->(m,n)")(x, xla.take_layer(codes, index))
