"""A float product beside the ternary one, faded in and out: Sherry's annealed residual."""

import dataclasses

import jax
import jax.numpy as jnp

from ..leaf import Acting, Product
from ..policy import Policy
from ..pytree import pytree
from .part import Part, Tree, latent_of, on_matrices, per_matrix


@dataclasses.dataclass(frozen=True)
class Residual(Part):
    """Help from the latent weights themselves, gone before the training ends.

    y = x q(w) + e(t) x w,  with t = step / steps and
    e(t) = t / rise for t < rise, then (1 + cos(pi (t - rise) / (1 - rise))) / 2, and 0 from t = 1

    From Sherry ("Arenas", Tencent AngelSlim), where it keeps 3:4 sparse codes from getting stuck.

    Attributes:
      steps: after which the residual is gone; above 0.
      rise: share of the steps in which it comes.
      policy: of the training.

    >>> part = Residual(100)
    >>> [round(float(part.strength(jnp.asarray(s))), 2) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    steps: int
    rise: float = 0.1
    policy: Policy = Policy()

    def strength(self, step: jax.Array) -> jax.Array:
        """e of a step, float32."""
        t = jnp.minimum(step / self.steps, 1.0).astype(jnp.float32)
        fall = (1 + jnp.cos(jnp.pi * (t - self.rise) / (1 - self.rise))) / 2
        return jnp.where(t < self.rise, t / self.rise, jnp.where(t < 1, fall, 0.0))

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        e = self.strength(step)
        one = lambda name, x: _WithResidual(x, per_matrix(e, name, x, self.policy))
        return on_matrices(one, params, self.policy)


@pytree
@dataclasses.dataclass(frozen=True)
class _WithResidual(Acting):
    kernel: jax.Array
    strength: jax.Array

    def product(self, lhs: jax.Array, call: Product) -> jax.Array:
        helped = lambda lhs: (
            call.ternary(lhs, self.kernel)
            + self.strength.astype(lhs.dtype) * call.plain(lhs, latent_of(self.kernel))
        )
        plain = lambda lhs: call.ternary(lhs, self.kernel)
        return jax.lax.cond(self.strength > 0, helped, plain, lhs)
