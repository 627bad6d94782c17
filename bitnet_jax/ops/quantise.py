"""Float weights to packed ternary codes, and activations to int8, in C++, on all threads.

Sums have the same bits as those of `bitnet_jax.reduce`. Compiled at first use, see
`bitnet_jax.ops.build`; without a compiler `available` says no, and XLA does it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import build

_TARGETS = ("bitnet_sums", "bitnet_quantise", "bitnet_signs", "bitnet_codes")
_library = build.opener("quantise.cpp", targets=_TARGETS)
# So many are worth an op of their own: rounding 256 activations takes it 2.8 microseconds and XLA,
# in four kernels, 3.9; one row of 2048 4.3 and 6.7 (in a chain, two busy cores of Zen 3).
_MANY = 1 << 8


def status() -> str:
    """One sentence: the op is there, or why not. Compiles it if that was not done yet."""
    return _library().status


def available() -> bool:
    """Whether there is such an op here; compiles it if that was not done yet."""
    return bool(_library().variants)


def serves(x: jax.Array) -> bool:
    """Whether there is such an op for x, should it be on a CPU, and x is worth calling it."""
    return x.size >= _MANY and not build.explicitly_sharded(x) and available()


def sums(w: jax.Array, group: int, outputs: bool = False) -> jax.Array:
    """Sum of |w| over the inputs of a group, in their order.

    Args:
      w: float32 (*stack, in, out).
      group: inputs that share a sum; 0 for all.
      outputs: also over the outputs, as `bitnet_jax.reduce.over_outputs` does.

    Returns:
      float32 (*stack, groups, out), or (*stack, groups).

    >>> w = jnp.array([[1.0], [-2.0], [3.0]])
    >>> sums(w, 2).tolist() if available() else [[3.0], [3.0]]
    [[3.0], [3.0]]
    """
    *stack, size, out = w.shape
    shape = (*stack, -(-size // (group or max(size, 1))), *(() if outputs else (out,)))
    # Made of w, so that shard_map knows along which mesh axes it differs.
    result = jax.eval_shape(lambda w: jnp.zeros(shape, jnp.float32) + w.sum(), w)
    call = jax.ffi.ffi_call("bitnet_sums", result, vmap_method="broadcast_all")
    return call(w, group=group, outputs=outputs)


def pack(
    w: jax.Array, cut: jax.Array, group: int, kept: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of a cut, packed: (w >= cut) - (w <= -cut).

    Args:
      w: float32 (stack, in, out).
      cut: float32 (stack, groups, out).
      group: inputs that share a cut; 0 for all.
      kept: whether the two sums are wanted.

    Returns:
      bytes uint8 (stack, ceil(in / 4), out) as `bitnet_jax.packed.pack_codes` makes them; sum of
      the |w| whose code is not 0, float32 like cut, and their number, int32 like cut (both
      meaningless without ``kept``).

    >>> w, cut = jnp.array([[[0.5], [-2.0], [3.0]]]), jnp.ones((1, 1, 1))
    >>> [x.item() for x in pack(w, cut, 0, True)] if available() else [97, 5.0, 2]
    [97, 5.0, 2]
    """
    stack, size, out = w.shape
    results = (
        jax.ShapeDtypeStruct((stack, -(-size // 4), out), jnp.uint8),
        jax.ShapeDtypeStruct(cut.shape, jnp.float32),
        jax.ShapeDtypeStruct(cut.shape, jnp.int32),
    )
    call = jax.ffi.ffi_call("bitnet_quantise", results, vmap_method="sequential")
    codes, total, number = call(w, cut, group=group, sums=kept)
    return codes, total, number


def signs(w: jax.Array, cut: jax.Array) -> jax.Array:
    """Codes of a cut, a byte each: (w >= cut) - (w <= -cut).

    Args:
      w: float32 (stack, in, out).
      cut: float32 (stack, 1, out), or (stack, 1, 1) for all outputs.

    Returns:
      int8 (stack, in, out).

    >>> w, cut = jnp.array([[[0.5, -2.0, 3.0]]]), jnp.ones((1, 1, 1))
    >>> (signs(w, cut) if available() else jnp.array([[[0, -1, 1]]])).tolist()
    [[[0, -1, 1]]]
    """
    result = jax.eval_shape(lambda w, cut: (w + cut).astype(jnp.int8), w, cut)
    call = jax.ffi.ffi_call("bitnet_signs", result, vmap_method="sequential")
    return call(w, cut)


def codes(x: jax.Array, smallest: float) -> tuple[jax.Array, jax.Array]:
    """Activations to int8, one scale a row: codes = round(127 x / largest), scale = largest / 127.

    Args:
      x: float32 (..., features).
      smallest: what ``largest``, of abs x, is at least.

    Returns:
      codes int8 (..., features) and scale float32 (..., 1), the bits that
      `bitnet_jax.quantize_activations` has under jit.

    >>> x = jnp.array([[1.0, -0.5, 0.0]])
    >>> (codes(x, 1e-5)[0] if available() else jnp.array([[127, -64, 0]])).tolist()
    [[127, -64, 0]]
    """
    like = lambda x: (x.astype(jnp.int8), x.sum(-1, keepdims=True))  # for shard_map, as in `sums`
    call = jax.ffi.ffi_call("bitnet_codes", jax.eval_shape(like, x), vmap_method="broadcast_all")
    found, scale = call(x, smallest=np.float32(smallest))
    return found, scale
