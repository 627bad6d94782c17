"""QK-clip: shrink the query and key heads whose attention logits grew too large."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..convert import path_name
from ..errors import BitnetError
from ..quantize import Scheme
from .trees import Tree


def qk_clip(
    threshold: float = 100.0,
    *,
    scheme: Scheme | None,
    query: str = "query",
    key: str = "key",
) -> optax.GradientTransformationExtraArgs:
    """Rescale query and key heads so that no attention logit exceeds a threshold (2507.20534).

    With S_h the largest |logit| head h had in this step's forward pass, and G the query heads that
    share a key head:

    c_h = min(1, threshold / S_h),  key: b = sqrt(min over G of c),  query: a_h = c_h / b

    so that every head's logits are multiplied by c_h exactly. Without groups both factors are
    sqrt(c_h), as published; in a group, a head that needs less than its neighbour is not clipped
    with it, because its query takes back what the shared key lost.

    Put it last in a chain: it acts on the parameters as they will be after the step. It changes
    no forward or backward pass and no momentum. An RMSNorm on queries and keys cancels it.

    **It needs one scale an output.** Ternary codes do not change when a whole scale's weights are
    multiplied; with a scale per output channel or group of inputs each head keeps its codes and
    its scales are multiplied exactly. With one scale a tensor it is no clip: halving one head
    of several changed 24 % of its codes and 2 % of the others' in our measurement.

    Args:
      threshold: largest logit wanted; K2's is 100.
      scheme: of the query and key layers; None if they are float.
      query, key: names of the two layers inside an attention module. Their kernels are
        (in, heads * d) or (in, heads, d), with leading stack axes if the logits have them; a bias
        is scaled along.

    Returns:
      An optax transformation whose ``update`` needs ``params`` and ``max_logits``: the path of an
      attention module (``layer_0/attention``, or a tree nested like the parameters) to (heads,).
      Heads whose value is not finite are left alone.

    Raises:
      BitnetError: for a scheme with one scale a tensor; in ``update``, for missing parameters or
        logits, a path without query and key, or heads that do not divide them.

    >>> params = {"attention": {"query": {"kernel": jnp.ones((1, 4))},
    ...                         "key": {"kernel": jnp.ones((1, 2))}}}
    >>> clip = qk_clip(1.0, scheme=None)  # two query heads share one key head of two features
    >>> zero = jax.tree.map(jnp.zeros_like, params)
    >>> logits = {"attention": jnp.array([4.0, 0.5])}
    >>> updates, _ = clip.update(zero, clip.init(params), params, max_logits=logits)
    >>> new = optax.apply_updates(params, updates)["attention"]
    >>> new["query"]["kernel"].tolist(), new["key"]["kernel"].tolist()
    ([[0.5, 0.5, 2.0, 2.0]], [[0.5, 0.5]])
    """
    if scheme is not None and scheme.scale == "tensor":
        raise BitnetError(
            "qk_clip: a head cannot be rescaled under one scale a tensor, its codes would change; "
            'use Scheme(..., scale="channel") for query and key, or QK-norm'
        )

    def update(updates, state, params=None, *, max_logits=None, **extra):
        del extra
        if params is None or max_logits is None:
            raise BitnetError("qk_clip: update needs params and max_logits={path: (heads,)}")
        factors = _factors(params, max_logits, threshold, (query, key))

        def one(path, p, u):
            factor = factors.get(path_name(path).rpartition("/")[0])
            if factor is None:
                return u
            stack = factor.ndim - 1
            inputs = int(path_name(path).endswith("kernel"))
            shape = (*p.shape[:stack], *(1,) * inputs, *p.shape[stack + inputs :])
            factor = jnp.repeat(factor, math.prod(shape[stack:]) // factor.shape[-1], axis=-1)
            after = p.astype(jnp.float32) + u.astype(jnp.float32)
            return (after * factor.reshape(shape) - p.astype(jnp.float32)).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(one, params, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _factors(params: Tree, max_logits: Tree, threshold: float, names: tuple[str, str]) -> dict:
    """Path of every query and key layer -> factor of each of its heads, (*stack, heads)."""
    leaves = {path_name(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    found: dict[str, Any] = {}
    for path, logits in jax.tree_util.tree_leaves_with_path(max_logits):
        at = path_name(path)
        layers = [f"{at}/{name}" if at else name for name in names]
        missing = [n for n in layers if f"{n}/kernel" not in leaves]
        if missing:
            raise BitnetError(
                f"qk_clip: max_logits names {at!r}, but there is no {missing[0]}/kernel"
            )
        shapes = [leaves[f"{n}/kernel"].shape for n in layers]
        found |= zip(layers, head_factors(logits, threshold, _key_heads(at, logits, *shapes)))
    return found


def _key_heads(at: str, logits: Any, query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """How many key heads there are: as wide as the query's."""
    heads, first = logits.shape[-1], logits.ndim
    wide, narrow = math.prod(query[first:]), math.prod(key[first:])
    size = wide // heads
    if wide % heads or narrow % size or heads % (narrow // size):
        raise BitnetError(f"qk_clip: {at}: {heads} heads do not fit query {query} and key {key}")
    return narrow // size


def head_factors(
    max_logits: jax.Array, threshold: float, key_heads: int
) -> tuple[jax.Array, jax.Array]:
    """The factors of query heads (..., heads) and key heads (..., key_heads); see `qk_clip`.

    >>> head_factors(jnp.array([400.0, 50.0]), 100.0, 2)
    (Array([0.5, 1. ], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """
    s = jnp.asarray(max_logits, jnp.float32)
    clip = jnp.where(jnp.isfinite(s) & (s > threshold), threshold / s, 1.0)
    grouped = clip.reshape(*clip.shape[:-1], key_heads, -1)
    key = jnp.sqrt(grouped.min(-1))
    return (grouped / key[..., None]).reshape(clip.shape), key
