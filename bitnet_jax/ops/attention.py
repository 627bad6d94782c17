"""Attention in float32 on CPUs, in C++: heads on all threads, forward and backward.

Compiled at first use like `native`, beside it, and missing where that one is.
"""

import functools

import jax
import jax.numpy as jnp

from . import build

_TARGETS = ("bitnet_attention", "bitnet_attention_cached", "bitnet_attention_gradients")
_library = build.opener("attention.cpp", "attention_kernels.h", targets=_TARGETS)
# Fewer queries, or many more keys, are hardly more than a reading of the keys, which XLA does as
# well.
_QUERIES, _KEYS_A_QUERY = 16, 64


def status() -> str:
    """One sentence: which variant of the ops is used here, or why there is none.

    Compiles them if that was not done yet, which takes some seconds, once.
    """
    return _library().status


def variants() -> tuple[str, ...]:
    """Variants of the ops that run here, the best first; empty where there is none."""
    return _library().variants


def serves(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether the ops are there, worth their call and know these dtypes, in a process on CPUs."""
    length, keys = query.shape[1], key.shape[1]
    enough = length >= _QUERIES and keys <= _KEYS_A_QUERY * length
    return enough and _takes(query, key, value)


def serves_cache(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether `cached` is there and worth its call, for few queries, in a process on CPUs."""
    return query.shape[1] < _QUERIES and _takes(query, key, value)


def _takes(*arrays: jax.Array) -> bool:
    if any(x.dtype != jnp.float32 or build.explicitly_sharded(x) for x in arrays):
        return False
    return jax.default_backend() == "cpu" and bool(variants())


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, *, isa: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(size)) v for every head, and the logarithm of what softmax divides by.

    Args:
      query: float32 (batch, length, heads, size).
      key, value: float32 (batch, keys, groups, size), each group for heads / groups heads in a row.
      seen: bool (batch, heads, length, keys), each axis as long or 1: which pairs count.
      isa: a name out of `variants`, to force it.

    Returns:
      y float32 (batch, length, heads, size), 0 for a query that sees no key, and
      log_sum float32 (batch, heads, length), log sum e ** s, there infinite.

    Raises:
      RuntimeError: if there are no such ops here, with `status` as the reason.

    >>> q = jnp.ones((1, 3, 1, 4))
    >>> (forward(q, q, q, jnp.ones((1, 1, 1, 1), bool))[0] if variants() else q).sum().item()
    12.0
    """
    batch, length, heads, _ = query.shape

    def like(q, *others):  # so that shard_map knows along which mesh axes results differ
        y = q + sum(x.sum() for x in others)
        return y, y.sum(-1).reshape(batch, heads, length)

    out = jax.eval_shape(like, query, key, value, seen)
    return _call("bitnet_attention", out, isa)(query, key, value, seen)


def cached(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, *, isa: str | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(size)) v for few queries, from keys and values as a cache has them.

    Read are those up to the last one that is seen; XLA reads the whole cache.

    Args:
      query: float32 (batch, length, heads, size).
      key: float32 (batch, groups, size, keys), each group for heads / groups heads in a row.
      value: float32 (batch, groups, keys, size).
      seen: bool (batch, heads, length, keys), each axis as long or 1: which pairs count.
      isa: a name out of `variants`, to force it.

    Returns:
      float32 (batch, length, heads, size), 0 for a query that sees no key.

    Raises:
      RuntimeError: if there is no such op here, with `status` as the reason.

    >>> q, k, v = jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 4, 3)), jnp.ones((1, 1, 3, 4))
    >>> (cached(q, k, v, jnp.ones((1, 1, 1, 1), bool)) if variants() else q).sum().item()
    4.0
    """
    like = lambda q, *others: q + sum(x.sum() for x in others)
    out = jax.eval_shape(like, query, key, value, seen)
    return _call("bitnet_attention_cached", out, isa)(query, key, value, seen)


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    y: jax.Array,
    log_sum: jax.Array,
    g: jax.Array,
    *,
    isa: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, from what `forward` was given and gave, and g of y.

    w = e ** (s - log_sum),  dv = w^T g,  ds = w (g v^T - sum g y),  dq = ds k / sqrt(size),
    dk = ds^T q / sqrt(size)

    Raises:
      RuntimeError: if there are no such ops here, with `status` as the reason.
    """
    like = lambda *a: jax.tree.map(lambda x: x + sum(o.sum() for o in a), (query, key, value))
    out = jax.eval_shape(like, query, key, value, g)
    operands = (query, key, value, seen, y, log_sum, g)
    return _call("bitnet_attention_gradients", out, isa)(*operands)


def _call(target: str, out, isa: str | None):
    call = jax.ffi.ffi_call(target, out, vmap_method="sequential")
    return functools.partial(call, isa=_library().pick(isa))
