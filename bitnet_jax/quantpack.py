"""Latent weights to packed leaves in one go, as a conversion does it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from .leaf import Packed, PackedTernary
from .ops import quantise
from .packed import pack_weight
from .quantize import Scheme, cut_of, mean_of, quantize_kernel, rows_of, scale_of
from .reduce import LARGE, over_outputs


def quantize_packed(w: jax.Array, scheme: Scheme = Scheme(), inputs: int | None = None) -> Packed:
    """``pack_weight(quantize_kernel(w, scheme, inputs))``, to the bit, at about memory's speed.

    Large ternary leaves on a CPU go through the C++ op where there is one; all else is XLA's.

    Args:
      w: latent weights, any float dtype; see `bitnet_jax.quantize.quantize_kernel`.
      scheme: how they become codes and scale.
      inputs: number of leading axes that are inputs; None for (..., in, out).

    >>> quantize_packed(jnp.eye(8)).codes.shape
    (2, 8)
    """
    plain = lambda w: pack_weight(quantize_kernel(w, scheme, inputs))
    ternary = scheme.rule in ("absmean", "threshold", "twn") and scheme.scale != "row"
    if not ternary or w.size < LARGE or not quantise.available():
        return plain(w)
    like = jax.eval_shape(plain, w)
    if like.in_features == 1:  # nothing is summed in an order of ours there
        return plain(w)
    return lax.platform_dependent(w, cpu=lambda w: _native(w, scheme, like), default=plain)


def _native(w: jax.Array, scheme: Scheme, like: PackedTernary) -> PackedTernary:
    """The C++ op's result in the place of the shapes of ``like``."""
    *stack, _, out = like.codes.shape
    matrices = w.astype(jnp.float32).reshape(math.prod(stack), like.in_features, out)
    group, one = like.group, scheme.scale == "tensor"
    whole = lambda x: over_outputs(jnp.add, x) if one else x
    groups = like.scale.shape[-2]
    rows = rows_of(like.in_features, group or like.in_features, groups)[:, None]
    total = quantise.sums(matrices, group, one).reshape(len(matrices), groups, -1)
    mean = mean_of(total, rows * out if one else rows, scheme)
    cut = jnp.broadcast_to(cut_of(mean, scheme), (len(matrices), groups, out))
    codes, kept, number = quantise.pack(matrices, cut, group, scheme.rule == "twn")
    if scheme.rule == "twn":
        mean = scale_of(whole(kept), whole(number.astype(jnp.float32)), scheme)
    shaped = (codes.reshape(like.codes.shape), mean.reshape(like.scale.shape))
    return dataclasses.replace(like, codes=shaped[0], scale=shaped[1])
