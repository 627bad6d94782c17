"""Losses of the training loop: functions of (model, params, batch)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


def next_token(
    model: nn.Module, params: Any, batch: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of each next token, in nats, averaged over the batch.

    loss = -mean over positions t of log softmax(logits[t])[token[t + 1]]

    Args:
      model: maps tokens (batch, length) to logits (batch, length, vocab).
      params: its variables.
      batch: int (batch, length + 1); inputs and, shifted by one, targets.

    Returns:
      The scalar loss, and ``{"accuracy": share of positions whose likeliest token was right}``.
    """
    logits = jnp.asarray(model.apply(params, batch[:, :-1]))
    targets = batch[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == targets)}
