"""Text generation: prefill the prompt, then one token at a time, jitted whole or streamed."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .decoder import Decoder, empty_cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 for the likeliest token, 1 for the model's own distribution.
      top_k: draw among the k likeliest only; 0 for all.
      top_p: draw among the likeliest that together have this probability (nucleus sampling, arXiv
        1904.09751); 1 for all. The likeliest token always stays.

    Raises:
      ValueError: for a temperature below 0, a negative top_k, or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")


def draw(logits: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """Next tokens (batch,) from logits (batch, vocab).

    >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    >>> draws = [int(draw(logits, k, Sampling(1.0, top_p=0.5))[0])
    ...          for k in jax.random.split(jax.random.key(0), 5)]
    >>> draws
    [0, 0, 0, 0, 0]
    """
    if not how.temperature:
        return logits.argmax(-1)
    logits = logits.astype(jnp.float32) / how.temperature
    if how.top_k:
        least = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        # Probability before a token: below top_p, it is still needed to reach it.
        needed = jnp.cumsum(shares, axis=-1) - shares < how.top_p
        least = jnp.where(needed, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)


def _check(model: nn.Module, prompt: jax.Array, steps: int, key, how: Sampling) -> None:
    length = prompt.shape[1]
    if not length:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if isinstance(model, Decoder) and length + steps > model.config.max_length:
        raise ValueError(
            f"{length} + {steps} tokens outgrow the model's max_length {model.config.max_length}"
        )
    if how.temperature and key is None:
        raise ValueError("sampling at a temperature above 0 needs a PRNG key")


@functools.partial(jax.jit, static_argnums=(0, 3, 5))
def generate(
    model: Decoder,
    params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array | None = None,
    how: Sampling = Sampling(),
) -> jax.Array:
    """Continue a prompt, all steps in one compiled function.

    Args:
      model: a `Decoder`; its parameters may be float, latent or packed.
      params: its variables.
      prompt: int (batch, length), without padding.
      steps: number of tokens to add (static; each value compiles once).
      key: PRNG key; needed when the temperature is not 0.
      how: temperature, top-k and top-p.

    Returns:
      int32 (batch, length + steps): prompt and continuation.

    Raises:
      ValueError: if there is nothing to continue or the result outgrows the model's max_length.

    >>> from bitnet_jax.models.decoder import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=16, layers=1))
    >>> prompt = jnp.array([[1, 2, 3]])
    >>> generate(model, model.init(jax.random.key(0), prompt), prompt, 4).shape
    (1, 7)
    """
    _check(model, prompt, steps, key, how)
    batch, length = prompt.shape
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)
    cache = empty_cache(model.config, batch, length + steps)
    logits, cache = model.apply(params, prompt, cache)

    def step(carry, key_and_position):
        logits, cache = carry
        key, position = key_and_position
        token = draw(logits, key, how)
        logits, cache = model.apply(params, token[:, None], cache, position)
        return (logits[:, -1], cache), token

    positions = length + jnp.arange(steps)
    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), (keys, positions))
    return jnp.concatenate([prompt, tokens.T.astype(prompt.dtype)], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=(3,))
def _advance(
    model: Decoder,
    params,
    tokens: jax.Array,
    cache: Any,
    start: jax.Array,
    key: jax.Array,
    how: Sampling,
) -> tuple[jax.Array, Any]:
    logits, cache = model.apply(params, tokens, cache, start)
    return draw(logits[:, -1], key, how), cache


@functools.partial(jax.jit, static_argnums=(0, 5))
def _advance_without_cache(
    model: nn.Module, params, tokens: jax.Array, length: jax.Array, key: jax.Array, how: Sampling
) -> tuple[jax.Array, jax.Array]:
    """The token after the first ``length`` ones, and the tokens with it written behind them."""
    logits = jnp.asarray(model.apply(params, tokens))
    token = draw(jnp.take(logits, length - 1, axis=1), key, how).astype(tokens.dtype)
    at = (jnp.zeros_like(length), length)
    return token, jax.lax.dynamic_update_slice(tokens, token[:, None], at)


def stream(
    model: nn.Module,
    params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array | None = None,
    how: Sampling = Sampling(),
) -> Iterator[jax.Array]:
    """The continuation of a prompt token by token, as they are made.

    Arguments and errors are `generate`'s, and so are the tokens. ``model`` may also be any causal
    Linen module from tokens (batch, length) to logits (batch, length, vocab); without a cache to
    keep, it reads the whole text again for every token.

    Yields:
      int (batch,), ``steps`` times.
    """
    _check(model, prompt, steps, key, how)
    batch, length = prompt.shape
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)
    if not isinstance(model, Decoder):
        tokens = jnp.pad(prompt, ((0, 0), (0, steps)))
        for i in range(steps):
            at = jnp.asarray(length + i)
            token, tokens = _advance_without_cache(model, params, tokens, at, keys[i], how)
            yield token
        return
    cache: Any = empty_cache(model.config, batch, length + steps)
    tokens, start = prompt, 0
    for i in range(steps):
        token, cache = _advance(model, params, tokens, cache, jnp.asarray(start), keys[i], how)
        yield token
        tokens, start = token[:, None].astype(prompt.dtype), length + i
