"""Text generation: prefill the prompts, then one token at a time, jitted whole or streamed.

Prompts are padded on the right to one of few lengths, so that a chat does not compile anew with
every message. Row i's tokens then lie at positions 0, 1, ... whatever stands beside it, and what
padding left in the cache is overwritten before anything looks at it: the keys a token sees are
those before it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .decoder import Cache, Decoder, empty_cache


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


def ragged(prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Prompts of different lengths as one array, padded with zeros on the right.

    Args:
      prompts: token ids of each.

    Returns:
      int32 tokens (batch, longest) and lengths (batch,), as `generate` and `stream` take them.

    >>> tokens, lengths = ragged([[5, 6, 7], [8]])
    >>> tokens.tolist(), lengths.tolist()
    ([[5, 6, 7], [8, 0, 0]], [3, 1])
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(lengths), lengths.max(initial=0)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def bucket(length: int) -> int:
    """The length that so many tokens are padded to: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ...

    >>> [bucket(length) for length in (1, 3, 17, 24, 50, 1000)]
    [1, 4, 24, 24, 64, 1024]
    """
    power = 1
    while power < length:
        power *= 2
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


def _check(model: nn.Module, prompt: jax.Array, steps: int, key, how: Sampling, lengths) -> None:
    longest, shortest = prompt.shape[1], prompt.shape[1]
    if lengths is not None:
        if not isinstance(model, Decoder):
            raise ValueError("prompts of different lengths need a Decoder; continue one at a time")
        if jnp.shape(lengths) != (len(prompt),):
            raise ValueError(f"lengths {jnp.shape(lengths)}: expected one for each prompt")
        if not isinstance(lengths, Tracer) and len(prompt):
            longest, shortest = int(np.max(lengths)), int(np.min(lengths))
    if not shortest > 0:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if longest > prompt.shape[1]:
        raise ValueError(f"lengths up to {longest}, but prompts of {prompt.shape[1]} tokens")
    if steps < 1:
        raise ValueError(f"steps {steps}: must be 1 or more")
    if isinstance(model, Decoder) and longest + steps > model.config.max_length:
        raise ValueError(
            f"{longest} + {steps} tokens outgrow the model's max_length {model.config.max_length}"
        )
    if how.temperature and key is None:
        raise ValueError("sampling at a temperature above 0 needs a PRNG key")


def _padded(prompt: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The prompt in its bucket, and the number of its tokens: () if all rows have as many."""
    length = prompt.shape[1]
    at = jnp.asarray(length if lengths is None else lengths, jnp.int32)
    return jnp.pad(prompt, ((0, 0), (0, bucket(length) - length))), at


def _prefill(
    model: Decoder, params, prompt: jax.Array, lengths: jax.Array, size: int
) -> tuple[jax.Array, Cache]:
    """Logits (batch, vocab) after each prompt, and a cache of ``size`` positions that holds it."""
    batch, length = prompt.shape
    last = jnp.broadcast_to(lengths - 1, (batch,))
    # Attention over the prompt alone; the room for what follows is added behind it.
    empty = empty_cache(model.config, batch, length)
    logits, cache = _apply(model, params, prompt, empty, 0, last)
    whole = empty_cache(model.config, batch, size)
    put = lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (0, 0, 0, 0))
    return logits[:, 0], jax.tree.map(put, whole, cache)


def _advance(
    model: Decoder, params, token: jax.Array, cache: Cache, at: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits (batch, vocab) after a token (batch,) at positions ``at``, and the cache with it."""
    logits, cache = _apply(model, params, token[:, None], cache, at)
    return logits[:, 0], cache


def _apply(model: Decoder, params, *inputs) -> Any:
    return model.apply(params, *inputs)


def generate(
    model: Decoder,
    params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array | None = None,
    how: Sampling = Sampling(),
    *,
    lengths: jax.Array | None = None,
    stop: int | None = None,
) -> jax.Array:
    """Continue prompts, all steps in one compiled function.

    It is compiled once for each number of prompts, `bucket` of their length, and number of steps.

    Args:
      model: a `Decoder`; its parameters may be float, latent or packed.
      params: its variables.
      prompt: int (batch, length).
      steps: number of tokens to add.
      key: PRNG key; needed when the temperature is not 0.
      how: temperature, top-k and top-p.
      lengths: int (batch,), how many tokens of each row are its prompt, counted from the left;
        what stands behind them is not read. None if all are. `ragged` makes both.
      stop: the token that ends a text. A row that has drawn it is filled up with it, and nothing
        is computed any more once all rows have.

    Returns:
      (batch, length + steps), dtype of the prompt: each prompt, its continuation behind its last
      token, and zeros up to the longest row's end. A row is what its prompt would give alone, as
      far as float sums do not depend on what they are computed beside.

    Raises:
      ValueError: if there is nothing to continue or the result outgrows the model's max_length.

    >>> from bitnet_jax.models.decoder import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=16, layers=1))
    >>> prompt, lengths = ragged([[1, 2, 3], [4]])
    >>> params = model.init(jax.random.key(0), prompt)
    >>> generate(model, params, prompt, 4, lengths=lengths).shape
    (2, 7)
    """
    _check(model, prompt, steps, key, how, lengths)
    key = jax.random.key(0) if key is None else key
    padded, at = _padded(prompt, lengths)
    ends = jnp.asarray(-1 if stop is None else stop, jnp.int32)
    new = _continued(model, params, padded, at, steps, key, how, ends)
    new = new.astype(jnp.asarray(prompt).dtype)  # int32 where NumPy says int64
    if lengths is None:
        return jnp.concatenate([prompt, new], axis=1)
    own = jnp.arange(prompt.shape[1]) < at[:, None]
    rows = jnp.pad(jnp.where(own, prompt, 0), ((0, 0), (0, steps)))
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(rows, new, at, 0)


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _continued(model, params, prompt, lengths, steps: int, key, how: Sampling, stop) -> jax.Array:
    """The new tokens of `generate`, int32 (batch, steps)."""
    logits, cache = _prefill(model, params, prompt, lengths, prompt.shape[1] + steps)
    token = draw(logits, jax.random.fold_in(key, 0), how).astype(jnp.int32)
    tokens = jnp.full((len(prompt), steps), stop).at[:, 0].set(token)

    def more(state):
        i, _, _, ended = state
        return (i < steps) & ~ended.all()

    def step(state):
        i, tokens, cache, ended = state
        logits, cache = _advance(model, params, tokens[:, i - 1], cache, lengths + i - 1)
        token = draw(logits, jax.random.fold_in(key, i), how)
        token = jnp.where(ended, stop, token).astype(jnp.int32)
        return i + 1, tokens.at[:, i].set(token), cache, ended | (token == stop)

    state = jnp.int32(1), tokens, cache, token == stop
    return jax.lax.while_loop(more, step, state)[1]


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _first(model, params, prompt, lengths, size: int, key, how: Sampling):
    logits, cache = _prefill(model, params, prompt, lengths, size)
    return draw(logits, jax.random.fold_in(key, 0), how).astype(jnp.int32), cache


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=(3,))
def _next(model, params, token, cache, lengths, key, i, how: Sampling):
    logits, cache = _advance(model, params, token, cache, lengths + i - 1)
    return draw(logits, jax.random.fold_in(key, i), how).astype(jnp.int32), cache


@functools.partial(jax.jit, static_argnums=(0, 6))
def _next_without_cache(model: nn.Module, params, tokens, length, key, i, how: Sampling):
    """The token after the first ``length + i`` ones, and the tokens with it written behind them."""
    at = length + i
    logits = jnp.asarray(model.apply(params, tokens))
    token = draw(jnp.take(logits, at - 1, axis=1), jax.random.fold_in(key, i), how)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, token[:, None].astype(tokens.dtype), at, axis=1
    )
    return token, tokens


def _start(model, prompt, steps: int, lengths) -> tuple[jax.Array, jax.Array, int]:
    """What a stream starts from: the prompt in its bucket, its lengths, positions of the cache."""
    padded, at = _padded(prompt, lengths)
    return padded, at, bucket(padded.shape[1] + steps)


def prepare(
    model: Decoder,
    params,
    prompt: jax.Array,
    steps: int,
    how: Sampling = Sampling(),
    *,
    lengths: jax.Array | None = None,
) -> None:
    """Compile what `stream` will run for these arguments, if it is not yet, and run nothing.

    For who times a stream, or wants the wait for the compiler to lie elsewhere.
    """
    key, i = jax.random.key(0), np.int32(1)
    _check(model, prompt, steps, key, how, lengths)
    padded, at, size = _start(model, prompt, steps, lengths)
    first = _first.lower(model, params, padded, at, size, key, how)
    token, cache = first.out_info
    first.compile()
    _next.lower(model, params, token, cache, at, key, i, how).compile()


def _drawn(model, params, prompt, steps, key, how, lengths) -> Iterator[jax.Array]:
    """The tokens of `stream`, each as soon as its computation is under way."""
    if not isinstance(model, Decoder):
        tokens, length = jnp.pad(prompt, ((0, 0), (0, steps))), prompt.shape[1]
        for i in range(steps):
            token, tokens = _next_without_cache(
                model, params, tokens, np.int32(length), key, np.int32(i), how
            )
            yield token
        return
    padded, at, size = _start(model, prompt, steps, lengths)
    token, cache = _first(model, params, padded, at, size, key, how)
    yield token
    for i in range(1, steps):
        token, cache = _next(model, params, token, cache, at, key, np.int32(i), how)
        yield token


def stream(
    model: nn.Module,
    params,
    prompt: jax.Array,
    steps: int,
    key: jax.Array | None = None,
    how: Sampling = Sampling(),
    *,
    lengths: jax.Array | None = None,
    stop: int | None = None,
) -> Iterator[jax.Array]:
    """The continuations of prompts token by token, as they are made.

    Arguments and errors are `generate`'s, and so are the tokens; what is compiled depends on the
    `bucket` of all tokens, not on their number. ``model`` may also be any causal Linen module from
    tokens (batch, length) to logits (batch, length, vocab), with prompts of one length; without a
    cache to keep, it reads the whole text again for every token.

    Yields:
      int (batch,), ``steps`` times, or until every row has drawn ``stop``. While the caller looks
      at one, the next is computed.
    """
    _check(model, prompt, steps, key, how, lengths)
    key = jax.random.key(0) if key is None else key
    ended = np.zeros(len(prompt), bool)
    drawn = _drawn(model, params, prompt, steps, key, how, lengths)
    token = next(drawn)
    while token is not None and not ended.all():
        ahead = next(drawn, None)
        if stop is not None:
            token = jnp.where(ended, stop, token)
            ended |= np.asarray(token) == stop
        yield token
        token = ahead
