"""Losses of the training loop: functions of (model, params, batch)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Loss = Callable[[nn.Module, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def next_token(
    model: nn.Module, params: Any, batch: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of each next token, in nats, averaged over the batch.

    loss = -mean over positions t of log softmax(logits[t])[token[t + 1]]

    Args:
      model: maps tokens (batch, length) to logits (batch, length, vocab), of any float dtype;
        the loss is computed from them in float32.
      params: its variables.
      batch: int (batch, length + 1); inputs and, shifted by one, targets.

    Returns:
      The scalar loss, and ``{"accuracy": share of positions whose likeliest token was right}``.
    """
    return cross_entropy(float32_logits(model, params, batch), batch[:, 1:])


def float32_logits(model: nn.Module, params: Any, batch: jax.Array) -> jax.Array:
    """Logits (batch, length, vocab) of all tokens of windows (batch, length + 1) but the last.

    In float32, because a softmax summed in bfloat16 is wrong in the third digit.
    """
    return logits_of(model.apply(params, batch[:, :-1])).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def compiled_logits(model: nn.Module, params: Any, batch: jax.Array) -> jax.Array:
    """`float32_logits` as a program of its own, compiled once a network and shape.

    Whatever is measured of it reads these: a network is not compiled again for every figure, and
    not once more in every comparison with another.
    """
    return float32_logits(model, params, batch)


def logits_of(out: Any) -> jax.Array:
    """The logits in what a network gives: all of it, or ``out["logits"]`` of a dict.

    >>> logits_of({"logits": jnp.ones(2), "loss": 0.0}).tolist()
    [1.0, 1.0]
    """
    return jnp.asarray(out["logits"] if isinstance(out, Mapping) else out)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross entropy in nats, and ``{"accuracy": ...}``.

    Args:
      logits: float32 (batch, length, vocab).
      targets: int (batch, length).

    >>> loss, metrics = cross_entropy(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), int))
    >>> round(float(loss), 4), float(metrics["accuracy"])
    (0.6931, 1.0)
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return loss, {"accuracy": jnp.mean(likeliest(logits, targets))}


def likeliest(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """``logits.argmax(-1) == tokens`` in half its time on CPUs, where XLA reduces pairs slowly.

    A token is the likeliest if no other has more, and none before it as much.

    Args:
      logits: float (..., vocab).
      tokens: int (...), of the vocabulary.

    Returns:
      bool (...); False where the token's logit, or one it is compared with, is NaN.

    >>> likeliest(jnp.array([[1.0, 2.0, 2.0]] * 3), jnp.arange(3)).tolist()
    [False, True, False]
    """
    logits, tokens = jax.lax.stop_gradient(logits), tokens[..., None]
    own = jnp.take_along_axis(logits, tokens, -1)
    after = jnp.arange(logits.shape[-1]) >= tokens
    return ((logits < own) | ((logits == own) & after)).all(-1)
