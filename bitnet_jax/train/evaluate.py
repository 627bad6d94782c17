"""Loss, accuracy and perplexity of a language model on held-out text."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .loss import float32_logits


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: nn.Module, params: Any, batch: jax.Array, real: jax.Array):
    """Summed loss and right guesses over the rows of the batch that are real."""
    logits, targets = float32_logits(model, params, batch), batch[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = logits.argmax(-1) == targets
    return jnp.sum(loss * real[:, None]), jnp.sum(right * real[:, None])


def evaluate(model: nn.Module, params: Any, data: np.ndarray, batch: int = 16) -> dict[str, float]:
    """Next-token loss and accuracy on every position of the data.

    Args:
      model: maps tokens (batch, length) to logits (batch, length, vocab).
      params: its variables: float, latent or packed.
      data: int windows (n, length + 1).
      batch: windows evaluated at once; does not change the result but for rounding.

    Returns:
      ``loss`` in nats a token, ``perplexity`` = exp(loss), ``accuracy`` in 0..1, ``tokens``.
    """
    loss = right = 0.0
    for i in range(0, len(data), batch):
        rows = data[i : i + batch]
        real = np.arange(batch) < len(rows)
        rows = np.pad(rows, ((0, batch - len(rows)), (0, 0)))
        a, b = _sums(model, params, rows, real)
        loss, right = loss + float(a), right + float(b)
    tokens = len(data) * (data.shape[1] - 1)
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": right / tokens,
        "tokens": tokens,
    }
