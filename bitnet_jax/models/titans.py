"""The backbone of a Phase 3 network, Titans-MAG: attention in a band, a long-term memory, a gate.

The equations are at the head of `bitnet_jax.models.phase3`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..linen import BitDense, BitEmbed
from ..quantize import Scheme
from . import attention
from .decoder import show
from .phase3_config import Phase3Config

_EPS = 1e-8


def dense(scheme: Scheme | None, features: int, name: str, bias: bool = True) -> BitDense:
    """A layer under the reference's name; float for no scheme."""
    return BitDense(features, use_bias=bias, scheme=scheme, name=name)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: Any, heads: int) -> jax.Array:
    """`attention.attend` on (batch, length, features), in which the heads are contiguous."""
    split = lambda x: x.reshape(*x.shape[:-1], heads, -1)
    y = attention.attend(split(query), split(key), split(value), seen)
    return y.reshape(*y.shape[:-2], -1)


def recurrence(x: jax.Array, start: jax.Array, decay: float) -> jax.Array:
    """s_t = decay s_{t-1} + (1 - decay) x_t along axis 1, as an associative scan.

    Args:
      x: (batch, length, features).
      start: s_{-1}, broadcast against (batch, 1, features).
      decay: in 0..1.

    Returns:
      s, of x's shape.

    >>> recurrence(jnp.ones((1, 3, 1)), jnp.zeros((1, 1, 1)), 0.5).ravel().tolist()
    [0.5, 0.75, 0.875]
    """
    x = ((1 - decay) * x).at[:, :1].add(decay * start)
    factors = jnp.full((1, x.shape[1], 1), decay, x.dtype)
    later = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return jax.lax.associative_scan(later, (factors, x), axis=1)[1]


class Layer(nn.Module):
    """A block of the backbone; (batch, length, d_model) to the same."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        x = x + Attention(self.config, self.scheme, name="attention")(_rms("norm1")(x), seen)
        return x + MLP(self.config, self.scheme, name="mlp")(_rms("norm2")(x))


def _rms(name: str) -> nn.RMSNorm:
    return nn.RMSNorm(1e-6, name=name)


class Attention(nn.Module):
    """Attention in a band around every token, both ways."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        c = self.config
        q, k, v = (dense(self.scheme, c.d_model, f"w_{p}", False)(x) for p in "qkv")
        return dense(self.scheme, c.d_model, "w_o", False)(attend(q, k, v, seen, c.n_heads))


class MLP(nn.Module):
    """w_down(silu(w_gate x) * w_up x)."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = (dense(self.scheme, c.d_ff, n, False)(x) for n in ("w_gate", "w_up"))
        return dense(self.scheme, c.d_model, "w_down", False)(nn.silu(gate) * up)


class LongTermMemory(nn.Module):
    """An exponential average of what the backbone says, in fewer features.

    Its start is ``memory_state``, (1, 1, d_mem); without one the ``buffers`` of the variables, as
    the checkpoint has them, or zeros.
    """

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, y: jax.Array, memory_state: jax.Array | None = None):
        c = self.config
        zeros = lambda: jnp.zeros((1, 1, c.d_mem), jnp.float32)
        if self.is_initializing() or self.has_variable("buffers", "memory_state"):
            stored = self.variable("buffers", "memory_state", zeros).value
        else:
            stored = zeros()
        start = stored if memory_state is None else jnp.asarray(memory_state, jnp.float32)
        compressed = dense(self.scheme, c.d_mem, "w_down", False)(y)
        states = recurrence(compressed, jax.lax.stop_gradient(start), c.memory_decay)
        after = jax.lax.stop_gradient(states[:, -1:].mean(0, keepdims=True))
        return dense(self.scheme, c.d_model, "w_up", False)(states), after


class MAGGate(nn.Module):
    """g y + (1 - g) m, and the entropy of g that the loss is paid for."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        h = nn.relu(dense(self.scheme, c.mag_hidden, "w_concat")(jnp.concatenate([y, m], -1)))
        g = nn.sigmoid(dense(self.scheme, c.d_model, "w_gate")(h))
        entropy = -(g * jnp.log(g + _EPS) + (1 - g) * jnp.log(1 - g + _EPS)).mean()
        return g * y + (1 - g) * m, -c.mag_entropy_reg * entropy


class Backbone(nn.Module):
    """Tokens to features; also the table, which is the head where it is tied."""

    config: Phase3Config
    scheme: Scheme | None = None

    def setup(self):
        c = self.config
        small = nn.initializers.normal(0.02)
        self.token_emb = BitEmbed(c.vocab_size, c.d_model, embedding_init=small)
        self.pos_emb = BitEmbed(c.max_seq_len, c.d_model, embedding_init=small)
        self.layers = [Layer(c, self.scheme) for _ in range(c.n_layers)]
        self.norm = nn.RMSNorm(1e-6)
        self.ltm = LongTermMemory(c, self.scheme)
        self.mag_gate = MAGGate(c, self.scheme)

    def __call__(self, input_ids: jax.Array, memory_state: Any = None, mask: Any = None):
        x = self.embed(input_ids)
        show(self, embed_out=x)
        seen = band(x.shape[1], self.config.sw_window)
        if mask is not None:
            seen = seen & (jnp.asarray(mask) != 0)
        for i, layer in enumerate(self.layers):
            x = layer(x, seen)
            show(self, **{f"layer{i}_out": x})
        return self.gated(x, memory_state)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """(batch, length) to (batch, length, d_model)."""
        return self.token_emb(input_ids) + self.pos_emb(jnp.arange(input_ids.shape[1]))

    def gated(self, x: jax.Array, memory_state: Any = None):
        """What follows the last layer: (features, entropy term, memory after)."""
        y = self.norm(x)
        m, memory = self.ltm(y, memory_state)
        features, loss_gate = self.mag_gate(y, m)
        show(self, backbone_norm=y, ltm_out=m)
        return features, loss_gate, memory


def band(length: int, window: int) -> jax.Array:
    """Which pairs of tokens see each other: |i - j| <= window // 2; bool (1, 1, length, length)."""
    at = jnp.arange(length)
    return (jnp.abs(at[:, None] - at) <= window // 2)[None, None]
