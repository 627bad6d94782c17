"""What a part of a recipe is, and how parts are put one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..convert import path_name
from ..leaf import Acting, Prequantized, Quantized, is_quantized
from ..policy import Policy, is_ternary_matrix, quantized_format
from ..quantize import Scheme, dequantize, quantize_kernel, straight_through

Tree = Any


class Part:
    """One idea of a training recipe: three functions of the parameters, all optional.

    A training with a recipe starts from ``begin(params)``; each step applies the network to
    ``apply(params, step)`` and differentiates through it; what is measured, packed and kept is
    ``finish(params)``. Parts are frozen dataclasses of numbers, know nothing of each other, and
    without any the training is the plain one, bit for bit.
    """

    def begin(self, params: Tree) -> Tree:
        """The parameters to train: with some of the part's own, perhaps."""
        return params

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        """The tree the network is applied to at a step (an int32 scalar, 0 for the first)."""
        return params

    def finish(self, params: Tree) -> Tree:
        """The tree without the part: latent weights, or quantised leaves where it chose codes."""
        return params


def begin(recipe: Sequence[Part], params: Tree) -> Tree:
    """``begin`` of every part, in order."""
    for part in recipe:
        params = part.begin(params)
    return params


def apply(recipe: Sequence[Part], params: Tree, step: jax.Array) -> Tree:
    """``apply`` of every part, in order: the first is the innermost.

    >>> apply((), {"kernel": 1.0}, jnp.asarray(0))
    {'kernel': 1.0}
    """
    for part in recipe:
        params = part.apply(params, step)
    return params


def finish(recipe: Sequence[Part], params: Tree) -> Tree:
    """``finish`` of every part, the last one first."""
    for part in reversed(recipe):
        params = part.finish(params)
    return params


def on_matrices(f: Callable[[str, Any], Any], params: Tree, policy: Policy) -> Tree:
    """``f(path, kernel)`` of every kernel that the policy makes ternary; other leaves as they are.

    >>> tree = {"up": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    >>> on_matrices(lambda name, x: name, tree, Policy())["up"]["kernel"]
    'up/kernel'
    """

    def one(path, x):
        name = path_name(path)
        return f(name, x) if is_ternary_matrix(name, x, policy) else x

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)


def latent_of(kernel: Any) -> jax.Array:
    """The latent weights at the bottom of whatever stands in a kernel's place."""
    kernel = _innermost(kernel)
    return kernel.latent if isinstance(kernel, Prequantized) else kernel


def _innermost(kernel: Any) -> Any:
    while isinstance(kernel, Acting):
        kernel = kernel.kernel
    return kernel


def ternary_of(name: str, kernel: Any, policy: Policy, scheme: Scheme) -> Quantized:
    """The quantised weight of whatever stands in a kernel's place; no gradient goes through."""
    kernel = _innermost(kernel)
    if isinstance(kernel, Quantized):
        return kernel
    if isinstance(kernel, Prequantized):
        return kernel.weight
    stack = quantized_format(name, kernel, policy) == "ternary-stack"
    inputs = None if stack else policy.inputs_of(name, kernel.ndim)
    return quantize_kernel(jax.lax.stop_gradient(kernel), scheme, inputs)


def value_of(name: str, kernel: Any, policy: Policy, scheme: Scheme) -> jax.Array:
    """codes * scale in the kernel's shape, with the straight-through gradient."""
    return straight_through(latent_of(kernel), dequantize(ternary_of(name, kernel, policy, scheme)))


def per_matrix(number: jax.Array, name: str, kernel: Any, policy: Policy) -> jax.Array:
    """A number once for each matrix of a stack, so that scan slices it with the kernel."""
    stack = quantized_format(name, kernel, policy) == "ternary-stack"
    return jnp.broadcast_to(number, kernel.shape[:-2] if stack else ())
