"""Loss, accuracy and perplexity of a language model on held-out text."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data import padded
from .loss import compiled_logits, likeliest


def summed(sums: Callable[[np.ndarray, np.ndarray], Any], data: np.ndarray, batch: int) -> Any:
    """The tree ``sums(rows, real)`` of each batch of all windows, added up in float64."""
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    parts = (wide(sums(rows, real)) for rows, real in padded(data, batch))
    return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), parts)


@jax.jit
def _sums(logits: jax.Array, batch: jax.Array, real: jax.Array):
    """Summed loss and right guesses over the rows of the batch that are real."""
    targets = batch[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = likeliest(logits, targets)
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
    found = lambda rows, real: _sums(compiled_logits(model, params, rows), rows, real)
    loss, right = summed(found, data, batch)
    tokens = len(data) * (data.shape[1] - 1)
    mean = float(loss) / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": float(right) / tokens,
        "tokens": tokens,
    }
