"""A use for weights whose code is 0: Tequila's dead-zone term."""

import dataclasses

import jax
import jax.numpy as jnp

from ..convert import path_name
from ..errors import BitnetError
from ..leaf import Acting, Product, is_quantized
from ..policy import Policy
from ..pytree import pytree
from ..quantize import Scheme
from .part import Part, Tree, latent_of, on_matrices, per_matrix, ternary_of


@dataclasses.dataclass(frozen=True)
class DeadZone(Part):
    """Weights with code 0 act as a bias, so that they have a gradient of their own.

    y = x q(w) + e(t) sum over inputs i with code 0 of w_i,
    dw_i += e(t) sum over rows of dy  for those i

    From Tequila (Tencent AngelSlim, arXiv 2509.23809), which keeps e and folds the sum into a bias
    once training is done. So does ``fade=False`` here, for layers that have one; otherwise e falls
    linearly to 0 over the training, and nothing is left to fold.

    Attributes:
      strength: e at the start; 1e-3 in Tequila.
      steps: of the training.
      fade: whether e falls to 0.
      policy, scheme: of the training.

    >>> part = DeadZone(0.5, steps=10)
    >>> part.apply({"up": {"kernel": jnp.eye(4)}}, jnp.asarray(5))["up"]["kernel"].strength.item()
    0.25
    """

    strength: float
    steps: int
    fade: bool = True
    policy: Policy = Policy()
    scheme: Scheme = Scheme()

    def _now(self, step: jax.Array) -> jax.Array:
        left = jnp.clip(1 - step / self.steps, 0.0, 1.0) if self.fade else 1.0
        return jnp.asarray(self.strength * left, jnp.float32)

    def begin(self, params: Tree) -> Tree:
        if not self.fade:
            self._fold(params)  # raises now rather than at the end
        return params

    def apply(self, params: Tree, step: jax.Array) -> Tree:
        e = self._now(step)

        def one(name, kernel):
            return _WithDeadZone(
                kernel,
                self._dead(name, kernel),
                per_matrix(e, name, kernel, self.policy),
            )

        return on_matrices(one, params, self.policy)

    def finish(self, params: Tree) -> Tree:
        return params if self.fade else self._fold(params)

    def _dead(self, name: str, kernel) -> jax.Array:
        """Where codes are 0, in the kernel's shape."""
        weight = ternary_of(name, kernel, self.policy, self.scheme)
        return (weight.codes == 0).reshape(kernel.shape)

    def _fold(self, params: Tree) -> Tree:
        """Biases with the dead weights' sum added."""
        sums = {}

        def add(name, kernel):
            weight = ternary_of(name, kernel, self.policy, self.scheme)
            dead = jnp.where(weight.codes == 0, latent_of(kernel).reshape(weight.codes.shape), 0.0)
            sums[name.removesuffix("kernel") + "bias"] = self.strength * dead.sum(-2)
            return kernel

        on_matrices(add, params, self.policy)

        def fold(path, x):
            extra = sums.pop(path_name(path), None)
            return x if extra is None else x + extra.reshape(x.shape).astype(x.dtype)

        folded = jax.tree_util.tree_map_with_path(fold, params, is_leaf=is_quantized)
        if sums:
            raise BitnetError(
                f"dead zone: {min(sums)} is missing to fold the term into; use fade=True"
            )
        return folded


@pytree
@dataclasses.dataclass(frozen=True)
class _WithDeadZone(Acting):
    kernel: jax.Array
    dead: jax.Array
    strength: jax.Array

    def product(self, lhs: jax.Array, call: Product) -> jax.Array:
        w = latent_of(self.kernel)
        ins = tuple(range(len(call.batch), len(call.batch) + len(call.contract)))
        row = self.strength * jnp.where(self.dead, w, 0.0).sum(ins)
        y = call.ternary(lhs, self.kernel)
        rows = y.ndim - row.ndim
        lead = row.shape[: len(call.batch)]
        row = row.reshape(*lead, *(1,) * rows, *row.shape[len(call.batch) :])
        return y + row.astype(y.dtype)
