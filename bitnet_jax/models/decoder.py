"""A decoder language model of the Llama and BitNet family, float or ternary by one argument."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..calibrate import Stage
from ..convert import path_name
from ..linen import BitDense, BitEmbed
from ..quantize import Scheme
from .attention import attend, attend_cache

Cache = tuple[dict[str, jax.Array], ...]

ACTIVATIONS = "activations"  # the collection of what a block computes inside, for who asks


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Widths are multiples of 256 by default, so that every packed format can carry them (GGUF's
    ternary blocks are 256 wide).

    Attributes:
      vocab_size: number of tokens.
      width: features of the residual stream.
      layers: number of blocks.
      heads, kv_heads: query heads, and key/value heads shared by groups of them.
      hidden: features inside the MLP.
      max_length: longest sequence, for the cache; positions are rotary and add no parameters.
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of RMSNorm.
      activation: ``"silu"`` (SwiGLU, Llama) or ``"relu2"`` (squared ReLU, BitNet 2B-4T).
      sub_norms: RMSNorm before the two output projections, as in BitNet.
      tied: the head is the embedding's transpose.
      head_size: features of a head; 0 for width / heads, as most models have them.
      qkv_bias: query, key and value have a bias (Qwen2).
      qk_norm: RMSNorm over the features of each query and key head (Qwen3).
      rope_scaling: () for none, or Llama 3's (factor, low, high, length), see `frequencies`.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: what activations are computed in, ``"float32"`` or ``"bfloat16"``; parameters, norms,
        scales and logits stay in float32.
      precision: of products in training: ``"float32"``, or ``"tensorfloat32"`` to let those that
        are not integer ones round their operands to 11 bits or more where that is faster, as
        `jax.default_matmul_precision` does on GPUs; see `bitnet_jax.dot_general`.

    Raises:
      ValueError: if heads do not divide width, kv_heads do not divide heads, or another value makes
        no network.

    >>> DecoderConfig(vocab_size=1024).head_dim
    64
    """

    vocab_size: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 768
    max_length: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    activation: Literal["silu", "relu2"] = "silu"
    sub_norms: bool = False
    tied: bool = True
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["float32", "tensorfloat32"] = "float32"
    head_size: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON gives a list
        divided = self.head_size or self.width % self.heads == 0
        if not divided or self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: heads must "
                "divide width into an even number of features, and kv_heads must divide heads"
            )
        if self.activation not in ("silu", "relu2"):
            raise ValueError(f"activation {self.activation!r}: expected 'silu' or 'relu2'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r}: expected 'float32' or 'bfloat16'")
        if self.precision not in ("float32", "tensorfloat32"):
            raise ValueError(f"precision {self.precision!r}: expected 'float32' or 'tensorfloat32'")
        if len(self.rope_scaling) not in (0, 4):
            raise ValueError(f"rope_scaling {self.rope_scaling}: expected 4 numbers, or none")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    def build(self, scheme: Scheme | None) -> "Decoder":
        """The network of this shape, float for None."""
        return Decoder(self, scheme)


def frequencies(half: int, base: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Radians a position of each rotated pair: f_i = base ** (-i / half).

    With Llama 3.1's scaling (factor, low, high, length), pairs that turn fewer than ``low`` times
    in ``length`` positions, those the model was first trained on, turn ``factor`` times slower,
    pairs that turn more than ``high`` times as before, and those between in between:

    f_i (k + (1 - k) / factor),  k = clip((length f_i / 2 pi - low) / (high - low), 0, 1)

    >>> [round(float(f), 4) for f in frequencies(2, 100.0)]
    [1.0, 0.1]
    >>> [round(float(f), 4) for f in frequencies(2, 100.0, (8.0, 1.0, 4.0, 40))]
    [1.0, 0.0125]
    """
    f = base ** (-jnp.arange(half) / half)
    if not scaling:
        return f
    factor, low, high, length = scaling
    kept = jnp.clip((length / (2 * jnp.pi) * f - low) / (high - low), 0, 1)
    return f * (kept + (1 - kept) / factor)


def rotary(
    x: jax.Array, positions: jax.Array, base: float, scaling: tuple[float, ...] = ()
) -> jax.Array:
    """Rotary positions (arXiv 2104.09864), halves rotated as in Llama's checkpoints.

    Args:
      x: (batch, length, heads, head_dim).
      positions: integer positions, (length,) or, each row its own, (batch, length).
      base, scaling: of the `frequencies`.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None] * frequencies(half, base, scaling)
    # Times the identity, or XLA would compute them again for every head, layer and pass: on CPUs it
    # drops barriers before it fuses, and a product is not fused.
    once = lambda y: jnp.matmul(y, jnp.eye(half), precision="highest")[..., None, :]
    cos, sin = once(jnp.cos(angles)), once(jnp.sin(angles))
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def write(
    cache: dict[str, jax.Array], key: jax.Array, value: jax.Array, start: jax.Array
) -> dict[str, jax.Array]:
    """A layer's cache with new keys and values in it, from position ``start`` on.

    Args:
      cache: of `empty_cache`.
      key, value: (batch, length, kv_heads, head_dim).
      start: integer, () or, each row its own, (batch,).
    """
    # Head by head, even where all start together: this is a scatter then, which XLA does in place.
    # A slice it fuses into each of its readers, and copies the cache for every one of them.
    put = jax.vmap(jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None)), (0, 0, 0, None))
    starts = jnp.broadcast_to(start[..., None], (len(key), key.shape[2]))
    cast = lambda x: x.astype(cache["key"].dtype)
    return {
        "key": put(cache["key"], cast(key.transpose(0, 2, 3, 1)), starts, 1),
        "value": put(cache["value"], cast(value.transpose(0, 2, 1, 3)), starts, 0),
    }


def largest_logits(query: jax.Array, key: jax.Array, seen: jax.Array) -> jax.Array:
    """The largest abs attention logit of each query head, for `bitnet_jax.optim.qk_clip`.

    max over batch and positions i, j of abs q_i . k_j / sqrt(head_dim)

    Args:
      query: (batch, length, heads, head_dim).
      key: (batch, keys, kv_heads, head_dim).
      seen: bool (length, keys) or (batch, length, keys), which pairs count.

    Returns:
      float32 (heads,). A `Decoder` sows it as ``max_logits``:
      ``_, extra = model.apply(params, tokens, mutable=["intermediates"])``, then `max_logits`.
    """
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2).astype(jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->hbqk", query.astype(jnp.float32), key)
    return jnp.abs(jnp.where(seen, logits, 0)).max((1, 2, 3)) / query.shape[-1] ** 0.5


def max_logits(intermediates: Any) -> dict[str, jax.Array]:
    """What a `Decoder` sowed, as `bitnet_jax.optim.qk_clip` takes it: attention's path to (heads,).

    Args:
      intermediates: the mutated variables that ``apply`` returned.
    """
    leaves = jax.tree_util.tree_leaves_with_path(intermediates["intermediates"])
    return {path_name(path).removesuffix("/max_logits/0"): x for path, x in leaves}


def show(module: nn.Module, **values: jax.Array) -> None:
    """Sow values for ``model.apply(params, tokens, mutable=[ACTIVATIONS])``, and for no other call.

    A collection of its own, so that ``intermediates`` holds what `max_logits` reads and no more;
    not at ``init``, where every collection is mutable and would become a part of the parameters.
    """
    if module.is_mutable_collection(ACTIVATIONS) and not module.is_initializing():
        for name, value in values.items():
            module.sow(ACTIVATIONS, name, value)


def _dense(c: DecoderConfig, scheme: Scheme | None):
    precision = None if c.precision == "float32" else c.precision
    return functools.partial(
        BitDense, use_bias=False, scheme=scheme, dtype=c.dtype, precision=precision
    )


def _norm(c: DecoderConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(c.norm_eps, dtype=c.dtype, name=name)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; (batch, length, width) to the same."""

    config: DecoderConfig
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array, cache: dict[str, jax.Array] | None = None):
        c, dense = self.config, _dense(self.config, self.scheme)
        batch, length, _ = x.shape
        heads = lambda y: y.reshape(batch, length, -1, c.head_dim)
        biased = functools.partial(dense, use_bias=c.qkv_bias)
        query = heads(biased(c.heads * c.head_dim, name="query")(x))
        key = heads(biased(c.kv_heads * c.head_dim, name="key")(x))
        value = heads(biased(c.kv_heads * c.head_dim, name="value")(x))
        show(self, q=query, k=key, v=value)
        if c.qk_norm:
            query, key = _norm(c, "query_norm")(query), _norm(c, "key_norm")(key)
        positions = start[..., None] + jnp.arange(length)
        query, key = (rotary(y, positions, c.rope_base, c.rope_scaling) for y in (query, key))
        if cache is not None:
            cache = write(cache, key, value, start)
            key = cache["key"].transpose(0, 3, 1, 2)
        seen = jnp.arange(key.shape[1]) <= positions[..., None]
        if self.is_mutable_collection("intermediates"):  # an extra product, only for who asks
            self.sow("intermediates", "max_logits", largest_logits(query, key, seen))
        pairs = jnp.expand_dims(seen, -3)
        if cache is None:
            y = attend(query, key, value, pairs)
        else:
            y = attend_cache(query, cache["key"], cache["value"], pairs)
        y = y.reshape(batch, length, c.heads * c.head_dim)
        show(self, mixed=y)
        if c.sub_norms:
            y = _norm(c, "sub_norm")(y)
        return dense(c.width, name="out")(y), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, or squared ReLU; (..., width) to the same."""

    config: DecoderConfig
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dense = self.config, _dense(self.config, self.scheme)
        gate, up = dense(c.hidden, name="gate")(x), dense(c.hidden, name="up")(x)
        act = nn.silu(gate) if c.activation == "silu" else nn.relu(gate) ** 2
        y = act * up
        show(self, mixed=y)
        if c.sub_norms:
            y = _norm(c, "sub_norm")(y)
        return dense(c.width, name="down")(y)


class Block(nn.Module):
    """x += Attention(norm(x)); x += MLP(norm(x))."""

    config: DecoderConfig
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array, cache: dict[str, jax.Array] | None = None):
        c = self.config
        y = _norm(c, "attention_norm")(x)
        y, cache = Attention(c, self.scheme, name="attention")(y, start, cache)
        x = x + y
        y = _norm(c, "mlp_norm")(x)
        return x + MLP(c, self.scheme, name="mlp")(y), cache


class Decoder(nn.Module):
    """The language model: tokens to next-token logits.

    Attributes:
      config: its shape.
      scheme: None for a float model; a `Scheme` to make every attention and MLP matrix ternary.
        Both have the same tree, so the parameters of one go into the other.

    Applied with ``mutable=[ACTIVATIONS]`` it also gives, for every layer i, under
    ``layer_i/attention`` the projections ``q``, ``k``, ``v`` (batch, length, their heads, head_dim)
    before rotary positions, and under it and ``layer_i/mlp`` as ``mixed`` what the output
    projection, or the sub-norm before it, is given.

    >>> config = DecoderConfig(vocab_size=64, layers=1)
    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> params = Decoder(config).init(jax.random.key(0), tokens)
    >>> Decoder(config, Scheme()).apply(params, tokens).shape
    (2, 5, 64)
    """

    config: DecoderConfig
    scheme: Scheme | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
        at: jax.Array | None = None,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
          tokens: int (batch, length).
          cache: from `empty_cache`, to continue a sequence; or None.
          start: position of the first token, the number of tokens already in the cache; an integer
            for all rows, or (batch,).
          at: int (batch,), the one token of each row whose logits are wanted; None for all.

        Returns:
          float32 logits (batch, length, vocab_size), length 1 with ``at``; with a cache, (logits,
          updated cache).
        """
        c = self.config
        embed = BitEmbed(
            c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02), name="embed"
        )
        x, start = embed(tokens).astype(c.dtype), jnp.asarray(start)
        block = nn.remat(Block) if c.remat else Block
        caches = []
        for i in range(c.layers):
            layer = block(c, self.scheme, name=f"layer_{i}")
            x, updated = layer(x, start, None if cache is None else cache[i])
            caches.append(updated)
        if at is not None:  # before the head, which at small sizes is most of the work
            x = jnp.take_along_axis(x, at[:, None, None], axis=1)
        x = _norm(c, "norm")(x)
        logits = embed.attend(x) if c.tied else _dense(c, None)(c.vocab_size, name="head")(x)
        logits = logits.astype(jnp.float32)
        return logits if cache is None else (logits, tuple(caches))


def stages(config: DecoderConfig, scheme: Scheme | None) -> list[Stage]:
    """A decoder in parts that run one after another: the embedding, then block after block.

    Args:
      config: its shape.
      scheme: of its layers, as in `Decoder`.

    Returns:
      Stages for `bitnet_jax.calibrate`; the first takes tokens (batch, length). What follows the
      last block holds no matrix that becomes ternary and is left out.

    >>> [stage.path for stage in stages(DecoderConfig(vocab_size=8, layers=2), None)]
    [('params', 'embed'), ('params', 'layer_0'), ('params', 'layer_1')]
    """
    first, block = _parts(config, scheme)
    return [
        Stage(("params", "embed"), first),
        *(Stage(("params", f"layer_{i}"), block) for i in range(config.layers)),
    ]


@functools.cache  # the same functions each time, so that what is compiled of them is found again
def _parts(config: DecoderConfig, scheme: Scheme | None):
    embed, one = BitEmbed(config.vocab_size, config.width), Block(config, scheme)
    first = lambda tree, tokens: jnp.asarray(embed.apply({"params": tree}, tokens), config.dtype)
    block = lambda tree, x: one.apply({"params": tree}, x, jnp.asarray(0))[0]
    return first, block


def empty_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """A key-value cache for ``length`` positions, in the model's dtype.

    One dict a layer, of ``key`` (batch, kv_heads, head_dim, length) and ``value`` (batch, kv_heads,
    length, head_dim): the orders in which attention multiplies by them.

    >>> empty_cache(DecoderConfig(vocab_size=8, layers=1), 2, 16)[0]["value"].shape
    (2, 2, 16, 64)
    """
    heads, size = config.kv_heads, config.head_dim
    zeros = lambda *shape: jnp.zeros((batch, heads, *shape), config.dtype)
    return tuple(
        {"key": zeros(size, length), "value": zeros(length, size)} for _ in range(config.layers)
    )
