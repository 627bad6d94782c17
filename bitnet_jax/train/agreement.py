"""How far two language models say the same."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .loss import float32_logits


@functools.partial(jax.jit, static_argnums=(0, 2))
def _sums(a: nn.Module, params_a: Any, b: nn.Module, params_b: Any, batch: jax.Array, real):
    """Summed agreement and divergence over the rows of the batch that are real."""
    x, y = (
        jax.nn.log_softmax(float32_logits(m, p, batch)) for m, p in ((a, params_a), (b, params_b))
    )
    same = x.argmax(-1) == y.argmax(-1)
    divergence = jnp.sum(jnp.exp(y) * (y - x), axis=-1)
    return jnp.sum(same * real[:, None]), jnp.sum(divergence * real[:, None])


def agreement(
    model: nn.Module,
    params: Any,
    reference: nn.Module,
    reference_params: Any,
    data: np.ndarray,
    batch: int = 16,
) -> dict[str, float]:
    """Compare a model's next-token distributions with a reference's, on every position.

    Args:
      model, params: the one that is judged.
      reference, reference_params: the one it should agree with; the same tokens.
      data: int windows (n, length + 1).
      batch: windows evaluated at once.

    Returns:
      ``top1``: share of positions whose likeliest token is the same, in 0..1; ``kl``: mean of
      KL(reference || model), in nats.
    """
    same = divergence = 0.0
    for i in range(0, len(data), batch):
        rows = data[i : i + batch]
        real = np.arange(batch) < len(rows)
        rows = np.pad(rows, ((0, batch - len(rows)), (0, 0)))
        a, b = _sums(model, params, reference, reference_params, rows, real)
        same, divergence = same + float(a), divergence + float(b)
    tokens = len(data) * (data.shape[1] - 1)
    return {"top1": same / tokens, "kl": divergence / tokens}
