"""How far two language models say the same."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .evaluate import summed
from .loss import compiled_logits


@jax.jit
def compared(logits: jax.Array, reference: jax.Array, real: jax.Array):
    """Summed agreement and divergence, in nats, over the rows of the batch that are real.

    Args:
      logits, reference: float32 (batch, length, vocab).
      real: bool (batch,).

    Returns:
      The number of positions whose likeliest token is the same, and the sum of
      KL(reference || model).
    """
    x, y = (jax.nn.log_softmax(z) for z in (logits, reference))
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
    found = lambda rows, real: compared(
        compiled_logits(model, params, rows),
        compiled_logits(reference, reference_params, rows),
        real,
    )
    return shares(summed(found, data, batch), data)


def shares(sums: Any, data: np.ndarray) -> dict[str, float]:
    """`compared`, summed over all windows of the data, as means over their positions."""
    same, divergence = sums
    tokens = len(data) * (data.shape[1] - 1)
    return {"top1": float(same) / tokens, "kl": float(divergence) / tokens}
