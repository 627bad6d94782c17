"""Scales that are trained: ParetoQ's stretched elastic quantisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ..convert import path_name
from ..leaf import Prequantized
from ..policy import Policy
from ..quantize import Scheme, grouped, ungrouped
from .part import Part, Tree, latent_of, on_matrices, ternary_of

NAME = "kernel_scale"
# Levels are -2/3, 0 and 2/3 of the range a; u = w / a is clipped just inside of it, so that
# round(1.5 u) stays within -1..1.
_LEVELS, _EDGE, _SMALLEST = 1.5, 0.99, 1e-5


@dataclasses.dataclass(frozen=True)
class LearnedScales(Part):
    """Ternary levels stretched over a trained range a, one for what shares a scale.

    u = w / a,  codes = round(1.5 clip(u, -0.99, 0.99)),  q(w) = 2/3 a codes
    dw = dq where |u| <= 0.99, else 0
    da = k sum of dq (q(w) / a - u where |u| <= 0.99, else sign(u)),  k = 1 / sqrt(elements of w)

    From ParetoQ (arXiv 2502.02631). Its start, a = max |w|, makes three weights in four 0; here a
    is 3/2 of the scale that the scheme's rule gives, so that training starts from its size.

    The ranges are parameters, ``kernel_scale`` beside each ``kernel``, (groups, out or 1) float32.

    Attributes:
      policy, scheme: of the training.

    >>> part = LearnedScales(scheme=Scheme("twn", "channel"))
    >>> params = part.begin({"up": {"kernel": jnp.array([[1.0], [0.1], [-1.0]])}})
    >>> params["up"]["kernel_scale"].tolist(), part.finish(params)["up"]["kernel"].codes.tolist()
    ([[1.5]], [[1], [0], [-1]])
    """

    policy: Policy = Policy()
    scheme: Scheme = Scheme()

    def begin(self, params: Tree) -> Tree:
        ranges = {}

        def note(name, kernel):
            weight = ternary_of(name, kernel, self.policy, self.scheme)
            ranges[name] = _LEVELS * weight.scale
            return kernel

        on_matrices(note, params, self.policy)
        return _beside(params, ranges)

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        return self._act(params, lambda value, weight: Prequantized(value, weight))

    def finish(self, params: Tree) -> Tree:
        return _without(self._act(params, lambda value, weight: weight))

    def _act(self, params: Tree, make) -> Tree:
        ranges = {
            path_name(path).removesuffix("_scale"): x
            for path, x in jax.tree_util.tree_leaves_with_path(params)
            if path_name(path).rsplit("/", 1)[-1] == NAME
        }

        def one(name, kernel):
            like = ternary_of(name, kernel, self.policy, self.scheme)
            w = latent_of(kernel)
            a = jnp.maximum(ranges[name], _SMALLEST)
            value = jnp.asarray(elastic(w.reshape(like.codes.shape), a, like.group))
            fixed = jax.lax.stop_gradient(a)
            codes = _codes(jax.lax.stop_gradient(w).reshape(like.codes.shape), fixed, like.group)
            scale = fixed / _LEVELS
            value = value.reshape(w.shape)
            return make(value, dataclasses.replace(like, codes=codes.astype(jnp.int8), scale=scale))

        return on_matrices(one, params, self.policy)


def _ratio(w: jax.Array, a: jax.Array, group: int) -> jax.Array:
    blocks, _ = grouped(w, group)
    return ungrouped(blocks / a[..., :, None, :], w.shape[-2])


def _codes(w: jax.Array, a: jax.Array, group: int) -> jax.Array:
    ratio = _ratio(w.astype(jnp.float32), a, group)
    return jnp.round(_LEVELS * jnp.clip(ratio, -_EDGE, _EDGE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def elastic(w: jax.Array, a: jax.Array, group: int = 0) -> jax.Array:
    """q(w) of `LearnedScales`, with its gradients.

    Args:
      w: latent weights (..., in, out).
      a: ranges (..., groups, out or 1), above 0.
      group: inputs that share one; 0 for all.

    >>> elastic(jnp.array([[0.9], [0.3], [-2.0]]), jnp.array([[1.5]])).ravel().tolist()
    [1.0, 0.0, -1.0]
    """
    return _elastic_fwd(w, a, group)[0]


def _elastic_fwd(w, a, group):
    wide = w.astype(jnp.float32)
    codes = _codes(wide, a, group)
    blocks, _ = grouped(codes, group)
    value = ungrouped(blocks * (a / _LEVELS)[..., :, None, :], w.shape[-2])
    return value.astype(w.dtype), (_ratio(wide, a, group), codes, a, w)


def _elastic_bwd(group, residuals, g):
    u, codes, a, w = residuals
    inside = jnp.abs(u) <= _EDGE
    slope = g.astype(jnp.float32) * jnp.where(inside, codes / _LEVELS - u, jnp.sign(u))
    blocks, _ = grouped(slope, group)
    axes = (-2, -1) if a.shape[-1] == 1 else (-2,)
    da = blocks.sum(axes, keepdims=True).squeeze(-2) / (w.shape[-2] * w.shape[-1]) ** 0.5
    return jnp.where(inside, g, 0).astype(w.dtype), da


elastic.defvjp(_elastic_fwd, _elastic_bwd)


def _beside(tree: Tree, ranges: dict[str, jax.Array], prefix: str = "") -> Tree:
    """The tree of dicts with ``kernel_scale`` beside each kernel that has one."""
    if not isinstance(tree, dict):
        return tree
    found = {}
    for key, x in tree.items():
        path = f"{prefix}{key}"
        found[key] = _beside(x, ranges, "" if path == "params" else f"{path}/")
        if key == "kernel" and path in ranges:
            found[NAME] = ranges[path]
    return found


def _without(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {key: _without(x) for key, x in tree.items() if key != NAME}
