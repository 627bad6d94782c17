"""Quantised weights whose values are exact in float16, to be handed on as plain float weights.

A float16 has 11 significant bits. The product codes * scale is exact in it if the bits of a code
and those of the scale are no more together: 11 for codes of -1, 0, 1, 8 for int4, 4 for int8.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .leaf import Int4, Int8, Packed, Quantized, is_quantized
from .quantize import LEVELS, grouped, ungrouped

Tree = Any

_BITS = {Int8: 4, Int4: 8}
_HALF_BITS = 11
# What a float16 can tell apart near zero.
_SMALLEST = 2.0**-24


def exact_in_half(tree: Tree, latent: Tree) -> Tree:
    """Scales rounded so that every codes * scale is a float16; the integers' codes fitted to them.

    Integer scales are rounded down, so that the largest weight still has the largest code and
    quantising the values again gives the same codes and scale.

    Args:
      tree: unpacked quantised leaves, and others, which stay as they are.
      latent: the float weights they were made from.

    Returns:
      A tree of the same structure.

    >>> from bitnet_jax import Scheme, dequantize, quantize_weights
    >>> w = {"kernel": jnp.array([[0.3], [-1.0]])}
    >>> exact = exact_in_half({"kernel": quantize_weights(w["kernel"], Scheme("int8"))}, w)
    >>> values = dequantize(exact["kernel"])
    >>> bool((values == values.astype("float16")).all()), exact["kernel"].codes.ravel().tolist()
    (True, [38, -127])
    """
    one = lambda w, x: jax.jit(exact)(w, x) if isinstance(w, Quantized) else w
    return jax.tree.map(one, tree, latent, is_leaf=is_quantized)


_Leaf = TypeVar("_Leaf", bound=Quantized | Packed)


def exact(weight: _Leaf, latent: jax.Array) -> _Leaf:
    """`exact_in_half` of one leaf; a ternary one may be packed."""
    kind = type(weight)
    scale = _rounded(weight.scale, _BITS.get(kind, _HALF_BITS), down=kind in _BITS)
    if kind not in _BITS:
        return dataclasses.replace(weight, scale=scale)
    levels = LEVELS[kind.__name__.lower()]
    x = latent.astype(jnp.float32).reshape(weight.codes.shape)
    blocks, _ = grouped(x, weight.group)
    codes = jnp.clip(jnp.round(blocks / scale[..., :, None, :]), -levels, levels)
    codes = ungrouped(codes, x.shape[-2]).astype(jnp.int8)
    return dataclasses.replace(weight, codes=codes, scale=scale)


def _rounded(x: jax.Array, bits: int, down: bool) -> jax.Array:
    """x with so many significant bits, and none that a float16 does not have."""
    _, exponent = jnp.frexp(x)
    step = jnp.maximum(jnp.ldexp(jnp.ones_like(x), exponent - bits), _SMALLEST)
    return jnp.maximum((jnp.floor if down else jnp.round)(x / step), 1) * step
