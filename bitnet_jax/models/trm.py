"""The tiny recursive model of a Phase 3 network: it refines a latent z and an answer y in steps.

The equations are at the head of `bitnet_jax.models.phase3`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..linen import BitDense
from ..quantize import Scheme
from .phase3_config import REFINER_HEADS, Phase3Config
from .titans import attend, dense


class CrossAttention(nn.Module):
    """torch's MultiheadAttention with 8 heads, its projections as matrices of their own.

    Keys and values are given apart, because they stay the same while the query is refined.
    """

    scheme: Scheme | None = None
    features: int = 0

    def setup(self):
        layer = functools.partial(BitDense, self.features, scheme=self.scheme)
        self.query, self.key, self.value, self.out = layer(), layer(), layer(), layer()

    def look_at(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x."""
        return self.key(x), self.value(x)

    def __call__(self, x: jax.Array, keys_values: tuple[jax.Array, jax.Array]) -> jax.Array:
        return self.out(attend(self.query(x), *keys_values, None, REFINER_HEADS))


class Refiner(nn.Module):
    """z = LN(z + mlp_2 relu(mlp_0 [z; a; b])), a and b attend to features and to the answer."""

    scheme: Scheme | None = None
    features: int = 0

    def setup(self):
        self.feature_attn = CrossAttention(self.scheme, self.features)
        self.answer_attn = CrossAttention(self.scheme, self.features)
        self.mlp_0 = BitDense(2 * self.features, scheme=self.scheme)
        self.mlp_2 = BitDense(self.features, scheme=self.scheme)
        self.norm = nn.LayerNorm(1e-5)

    def __call__(self, z: jax.Array, of_features: Any, of_answer: Any) -> jax.Array:
        a, b = self.feature_attn(z, of_features), self.answer_attn(z, of_answer)
        return self.norm(z + self.mlp_2(nn.relu(self.mlp_0(jnp.concatenate([z, a, b], -1)))))


class Updater(nn.Module):
    """y = LN(y + mlp_2 relu(mlp_0 [y; z]))."""

    scheme: Scheme | None = None
    features: int = 0

    @nn.compact
    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        h = nn.relu(dense(self.scheme, 2 * self.features, "mlp_0")(jnp.concatenate([y, z], -1)))
        h = dense(self.scheme, self.features, "mlp_2")(h)
        return nn.LayerNorm(1e-5, name="norm")(y + h)


class TRM(nn.Module):
    """The recursion: features to answers y and states z, (T_max + 1, batch, length, d_model)."""

    config: Phase3Config
    scheme: Scheme | None = None

    def setup(self):
        features = self.config.d_model
        self.refiner = Refiner(self.scheme, features)
        self.updater = Updater(self.scheme, features)
        self.z0_proj = BitDense(features, scheme=self.scheme)
        self.y0_proj = BitDense(features, scheme=self.scheme)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = self.z0_proj(features)
        y = self.y0_proj(z)
        look = self.refiner.feature_attn.look_at
        # Twice the same numbers: only the first step sends gradients into the features.
        seen = look(features)
        held = look(jax.lax.stop_gradient(features)) if self.config.detach_between_steps else seen
        # To find variables a loop makes Flax traces its body once more; only `init` makes any. What
        # is sown or captured inside a loop is not kept, then; with the check it was an error.
        step = nn.scan(
            TRM._step,
            variable_broadcast=True,
            split_rngs={"params": False},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            check_constancy_invariants=self.is_initializing(),
        )
        first = jnp.arange(self.config.T_max) == 0
        _, (ys, zs) = step(self, (y, z), first, seen, held)
        return jnp.concatenate([y[None], ys]), jnp.concatenate([z[None], zs])

    def _step(self, state: tuple, first: jax.Array, seen: Any, held: Any):
        if self.config.detach_between_steps:
            keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)
            seen, state = keep(seen, held), keep(state, jax.lax.stop_gradient(state))
        y, z = state
        of_answer = self.refiner.answer_attn.look_at(y)
        refine = nn.scan(
            lambda trm, z, _: (trm.refiner(z, seen, of_answer), None),
            variable_broadcast=True,
            split_rngs={"params": False},
            length=self.config.micro_steps,
            check_constancy_invariants=self.is_initializing(),
        )
        z, _ = refine(self, z, None)
        y = self.updater(y, z)
        return (y, z), (y, z)
