"""Quantisation that sets in slowly: the strength lambda grows from 0 to 1."""

import dataclasses

import jax
import jax.numpy as jnp

from ..leaf import Acting, Product
from ..policy import Policy
from ..pytree import pytree
from ..quantize import Scheme, round_activations, straight_through
from .part import Part, Tree, latent_of, on_matrices, per_matrix, value_of


@dataclasses.dataclass(frozen=True)
class WarmUp(Part):
    """Blend float and ternary while lambda grows linearly over the first steps.

    w' = w + lambda stop_gradient(q(w) - w),  x' = x + lambda stop_gradient(q(x) - x),
    y = x' w',  lambda = min(step / steps, 1)

    From Hugging Face's "Fine-tuning LLMs to 1.58bit" (2024). From lambda = 1 on the layer is the
    plain one, bit for bit.

    Attributes:
      steps: after which lambda is 1; above 0.
      policy, scheme: of the training.

    >>> import bitnet_jax
    >>> part, w, x = WarmUp(10), {"up": {"kernel": jnp.array([[1.0], [0.2]])}}, jnp.ones((1, 2))
    >>> y = lambda step: bitnet_jax.BitDense(1, use_bias=False).apply(
    ...     {"params": part.apply(w, jnp.asarray(step))["up"]}, x).item()
    >>> round(y(0), 4), round(y(10), 4)  # float, and ternary: mean 0.6, codes 1 and 0
    (1.2, 0.6)
    """

    steps: int
    policy: Policy = Policy()
    scheme: Scheme = Scheme()

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        strength = jnp.minimum(step / self.steps, 1.0).astype(jnp.float32)

        def one(name, kernel):
            value = value_of(name, kernel, self.policy, self.scheme)
            return _Blended(kernel, value, per_matrix(strength, name, kernel, self.policy))

        return on_matrices(one, params, self.policy)


@pytree
@dataclasses.dataclass(frozen=True)
class _Blended(Acting):
    """A kernel, its ternary value in float, and lambda."""

    kernel: jax.Array
    value: jax.Array
    strength: jax.Array

    def product(self, lhs: jax.Array, call: Product) -> jax.Array:
        def blended(lhs):
            # (1 - a) w + a q(w) is the formula above; q(w)'s own gradient is kept.
            a, w = self.strength, latent_of(self.kernel)
            rounded = straight_through(lhs, round_activations(lhs, call.contract))
            return call.plain((1 - a) * lhs + a * rounded, (1 - a) * w + a * self.value)

        plain = lambda lhs: call.ternary(lhs, self.kernel)
        return jax.lax.cond(self.strength < 1, blended, plain, lhs)
