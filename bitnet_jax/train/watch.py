"""What ternary weights do while they are trained: flips, zeros, growth."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..policy import Policy
from ..quantize import Scheme
from ..recipe import Part, finish
from ..recipe.part import latent_of, on_matrices, ternary_of

Tree = Any


def watch(
    policy: Policy = Policy(), scheme: Scheme = Scheme(), recipe: Sequence[Part] = ()
) -> Callable[[Tree, Tree], dict[str, jax.Array]]:
    """Metrics of one step over all ternary matrices together, for `bitnet_jax.train.loop.fit`.

    flips  = share of codes that the step changed
    zeros  = share of codes that are 0 after it
    latent = root mean square of the latent weights after it

    Few flips at a high loss mean that training is stuck; many at its end, that it has not settled;
    latent weights that grow make every later flip harder.

    Args:
      policy, scheme: of the training.
      recipe: of the training, if its parts choose codes themselves.

    Returns:
      (params before, params after) -> {"flips": ..., "zeros": ..., "latent": ...}, float32 scalars.

    >>> old, new = ({"kernel": jnp.array([[1.0], [x], [1.0], [1.0]])} for x in (0.1, 0.9))
    >>> {k: round(float(v), 3) for k, v in watch()(old, new).items()}
    {'flips': 0.25, 'zeros': 0.0, 'latent': 0.976}
    """

    def codes(params: Tree) -> list[jax.Array]:
        found = []
        note = lambda name, x: found.append(ternary_of(name, x, policy, scheme).codes)
        on_matrices(note, finish(recipe, params), policy)
        return found

    def measure(old: Tree, new: Tree) -> dict[str, jax.Array]:
        before, after, latent = codes(old), codes(new), []
        on_matrices(lambda name, x: latent.append(latent_of(x)), new, policy)
        return {
            "flips": _share([a != b for a, b in zip(before, after)]),
            "zeros": _share([x == 0 for x in after]),
            "latent": jnp.sqrt(_share([jnp.square(x.astype(jnp.float32)) for x in latent])),
        }

    return measure


def _share(arrays: list[jax.Array]) -> jax.Array:
    """Mean over all elements of all arrays; 0 without any."""
    size = sum(x.size for x in arrays)
    return jnp.asarray(sum(x.sum(dtype=jnp.float32) for x in arrays) / max(size, 1), jnp.float32)
