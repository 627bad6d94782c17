"""Text generation: prefill the prompt, then one token at a time, all in one jitted function."""

import functools

import jax
import jax.numpy as jnp

from .decoder import Decoder, empty_cache


def _sample(logits: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """Next tokens (batch,) from logits (batch, vocab); temperature 0 takes the likeliest."""
    if not temperature:
        return logits.argmax(-1)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 6))
def generate(
    model: Decoder,
    params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
) -> jax.Array:
    """Continue a prompt.

    Args:
      model: a `Decoder`; its parameters may be float, latent or packed.
      params: its variables.
      prompt: int (batch, length), without padding.
      steps: number of tokens to add (static; each value compiles once).
      key: PRNG key; needed when temperature is not 0.
      temperature: 0 for the likeliest token, 1 for the model's own distribution.
      top_k: sample among the k likeliest only; 0 for all.

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
    batch, length = prompt.shape
    if not length:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if length + steps > model.config.max_length:
        raise ValueError(
            f"{length} + {steps} tokens outgrow the model's max_length {model.config.max_length}"
        )
    if temperature and key is None:
        raise ValueError("sampling at a temperature above 0 needs a PRNG key")
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)
    cache = empty_cache(model.config, batch, length + steps)
    logits, cache = model.apply(params, prompt, cache)

    def step(carry, key_and_position):
        logits, cache = carry
        key, position = key_and_position
        token = _sample(logits, key, temperature, top_k)
        logits, cache = model.apply(params, token[:, None], cache, position)
        return (logits[:, -1], cache), token

    positions = length + jnp.arange(steps)
    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), (keys, positions))
    return jnp.concatenate([prompt, tokens.T.astype(prompt.dtype)], axis=1)
