"""The network of Phase 3: a Titans-MAG backbone, and a tiny recursive model (TRM) that refines it.

x    = E[ids] + P                                      embeddings
x   += Attn(RMS(x));  x += W_down(silu(W_gate RMS(x)) * W_up RMS(x))      n_layers times
y    = RMS(x)
s_t  = d s_{t-1} + (1 - d) W_c y_t,  m = W_m s         long-term memory
F    = g y + (1 - g) m,  g = sigmoid(W_2 relu(W_1 [y; m]))                memory as a gate
z, y = Lin(F), Lin(z);  T_max times: z = LN(z + MLP[z; a; b]), a and b attend to F and to y;
                                     y = LN(y + MLP[y; z])
logits = y E^T after every step; how likely it halts there = mean over tokens of sigmoid(w z + b)

Names of modules, parameters and outputs are the PyTorch reference's. The memory is an argument and
a result; nothing is kept between calls. There is no dropout: the network is the one that is served.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ..calibrate import Stage
from ..linen import BitDense, BitEmbed
from ..quantize import Scheme
from .decoder import _show

# The refiner's attention has these many heads, whatever n_heads is.
REFINER_HEADS = 8
_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Phase3Config:
    """The shape of a Phase 3 network, under the reference's names; the defaults are its own.

    Attributes:
      vocab_size, d_model, n_layers, n_heads, d_ff, max_seq_len: of the backbone.
      sw_window: a token sees those at most ``sw_window // 2`` away, on both sides.
      d_mem, memory_decay: features and decay d of the long-term memory.
      mag_hidden, mag_entropy_reg: features inside the gate, weight of its entropy in the loss.
      T_max, micro_steps: steps of the recursion, refinements of z in each.
      deep_supervision, step_weights: cross entropy after every step, weighted, or after the last.
      detach_between_steps: as the reference trains: no gradient flows from one step to the next, so
        the logits that are returned train no weight of the backbone. Fine-tuning turns it off.
      halt_threshold: of the halting probability.
      act_loss_weight: of the number of steps in the loss.
      tied: the head is the embedding's transpose.
      quiet_star: the network is wrapped in `bitnet_jax.models.quiet_star`.

    Raises:
      ValueError: if heads do not divide the width.

    >>> Phase3Config().head_dim
    64
    """

    vocab_size: int = 50257
    d_model: int = 320
    n_layers: int = 8
    n_heads: int = 5
    d_ff: int = 1280
    max_seq_len: int = 2048
    sw_window: int = 1024
    d_mem: int = 160
    memory_decay: float = 0.99
    mag_hidden: int = 160
    mag_entropy_reg: float = 0.001
    T_max: int = 3
    micro_steps: int = 2
    deep_supervision: bool = True
    step_weights: tuple[float, ...] = (0.33, 0.5, 0.75, 1.0)
    detach_between_steps: bool = True
    halt_threshold: float = 0.95
    act_loss_weight: float = 0.01
    tied: bool = True
    quiet_star: bool = False

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}")
        if self.d_model % REFINER_HEADS:
            raise ValueError(
                f"d_model {self.d_model}: the refiner's {REFINER_HEADS} heads do not divide it"
            )
        object.__setattr__(self, "step_weights", tuple(self.step_weights))  # JSON has lists

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self.max_seq_len

    def build(self, scheme: Scheme | None) -> nn.Module:
        """The network of this shape, float for None."""
        if self.quiet_star:
            from .quiet_star import QuietSTaR

            return QuietSTaR(self, scheme)
        return TRMTitansMAG(self, scheme)


def _dense(scheme: Scheme | None, features: int, name: str, bias: bool = True) -> BitDense:
    return BitDense(features, use_bias=bias, scheme=scheme, name=name)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: Any, heads: int) -> jax.Array:
    """Multi-head attention after its projections, softmax(q k^T / sqrt(e)) v, in float32.

    Args:
      query: (batch, length, features).
      key, value: (batch, keys, features).
      seen: which pairs count, bool, broadcast against (batch, heads, length, keys); None for all.
        A query that sees no key gives 0.
      heads: contiguous parts of the features.

    Returns:
      (batch, length, features).
    """
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -3, -2)
    query, key, value = split(query), split(key), split(value)
    scores = (query * query.shape[-1] ** -0.5) @ jnp.swapaxes(key, -1, -2)
    if seen is not None:
        scores = jnp.where(seen, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    # Divided after the product with the values: XLA on CPUs would fuse the division into the
    # product and lose its fast path, for seven times the time.
    y = (weights @ value) / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    y = jnp.moveaxis(y, -3, -2)
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
        q, k, v = (_dense(self.scheme, c.d_model, f"w_{p}", False)(x) for p in "qkv")
        return _dense(self.scheme, c.d_model, "w_o", False)(attend(q, k, v, seen, c.n_heads))


class MLP(nn.Module):
    """w_down(silu(w_gate x) * w_up x)."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = (_dense(self.scheme, c.d_ff, n, False)(x) for n in ("w_gate", "w_up"))
        return _dense(self.scheme, c.d_model, "w_down", False)(nn.silu(gate) * up)


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
        compressed = _dense(self.scheme, c.d_mem, "w_down", False)(y)
        states = recurrence(compressed, jax.lax.stop_gradient(start), c.memory_decay)
        after = jax.lax.stop_gradient(states[:, -1:].mean(0, keepdims=True))
        return _dense(self.scheme, c.d_model, "w_up", False)(states), after


class MAGGate(nn.Module):
    """g y + (1 - g) m, and the entropy of g that the loss is paid for."""

    config: Phase3Config
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        h = nn.relu(_dense(self.scheme, c.mag_hidden, "w_concat")(jnp.concatenate([y, m], -1)))
        g = nn.sigmoid(_dense(self.scheme, c.d_model, "w_gate")(h))
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
        _show(self, embed_out=x)
        seen = band(x.shape[1], self.config.sw_window)
        if mask is not None:
            seen = seen & (jnp.asarray(mask) != 0)
        for i, layer in enumerate(self.layers):
            x = layer(x, seen)
            _show(self, **{f"layer{i}_out": x})
        return self.gated(x, memory_state)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """(batch, length) to (batch, length, d_model)."""
        return self.token_emb(input_ids) + self.pos_emb(jnp.arange(input_ids.shape[1]))

    def gated(self, x: jax.Array, memory_state: Any = None):
        """What follows the last layer: (features, entropy term, memory after)."""
        y = self.norm(x)
        m, memory = self.ltm(y, memory_state)
        features, loss_gate = self.mag_gate(y, m)
        _show(self, backbone_norm=y, ltm_out=m)
        return features, loss_gate, memory


def band(length: int, window: int) -> jax.Array:
    """Which pairs of tokens see each other: |i - j| <= window // 2; bool (1, 1, length, length)."""
    at = jnp.arange(length)
    return (jnp.abs(at[:, None] - at) <= window // 2)[None, None]


class CrossAttention(nn.Module):
    """torch's MultiheadAttention with 8 heads, its projections as matrices of their own.

    Keys and values are given apart, because they stay the same while the query is refined.
    """

    scheme: Scheme | None = None
    features: int = 0

    def setup(self):
        dense = functools.partial(BitDense, self.features, scheme=self.scheme)
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()

    def look_at(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x."""
        return self.key(x), self.value(x)

    def __call__(self, x: jax.Array, keys_values: tuple[jax.Array, jax.Array]) -> jax.Array:
        return self.out(attend(self.query(x), *keys_values, None, REFINER_HEADS))


class Refiner(nn.Module):
    """z = LN(z + mlp_2 relu(mlp_0 [z; a; b])), a and b attend to features and to the answer."""

    scheme: Scheme | None = None
    features: int = 0

    def setup(self):
        self.feature_attn = CrossAttention(self.scheme, self.features)
        self.answer_attn = CrossAttention(self.scheme, self.features)
        self.mlp_0 = BitDense(2 * self.features, scheme=self.scheme)
        self.mlp_2 = BitDense(self.features, scheme=self.scheme)
        self.norm = nn.LayerNorm(1e-5)

    def __call__(self, z: jax.Array, of_features: Any, of_answer: Any) -> jax.Array:
        a, b = self.feature_attn(z, of_features), self.answer_attn(z, of_answer)
        return self.norm(z + self.mlp_2(nn.relu(self.mlp_0(jnp.concatenate([z, a, b], -1)))))


class Updater(nn.Module):
    """y = LN(y + mlp_2 relu(mlp_0 [y; z]))."""

    scheme: Scheme | None = None
    features: int = 0

    @nn.compact
    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        h = nn.relu(_dense(self.scheme, 2 * self.features, "mlp_0")(jnp.concatenate([y, z], -1)))
        h = _dense(self.scheme, self.features, "mlp_2")(h)
        return nn.LayerNorm(1e-5, name="norm")(y + h)


class TRM(nn.Module):
    """The recursion: features to answers y and states z, (T_max + 1, batch, length, d_model)."""

    config: Phase3Config
    scheme: Scheme | None = None

    def setup(self):
        features = self.config.d_model
        self.refiner = Refiner(self.scheme, features)
        self.updater = Updater(self.scheme, features)
        self.z0_proj = BitDense(features, scheme=self.scheme)
        self.y0_proj = BitDense(features, scheme=self.scheme)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = self.z0_proj(features)
        y = self.y0_proj(z)
        look = self.refiner.feature_attn.look_at
        # Twice the same numbers: only the first step sends gradients into the features.
        seen = look(features)
        held = look(jax.lax.stop_gradient(features)) if self.config.detach_between_steps else seen
        step = nn.scan(
            TRM._step,
            variable_broadcast=True,
            split_rngs={"params": False},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        )
        first = jnp.arange(self.config.T_max) == 0
        _, (ys, zs) = step(self, (y, z), first, seen, held)
        return jnp.concatenate([y[None], ys]), jnp.concatenate([z[None], zs])

    def _step(self, state: tuple, first: jax.Array, seen: Any, held: Any):
        if self.config.detach_between_steps:
            keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)
            seen, state = keep(seen, held), keep(state, jax.lax.stop_gradient(state))
        y, z = state
        of_answer = self.refiner.answer_attn.look_at(y)
        refine = nn.scan(
            lambda trm, z, _: (trm.refiner(z, seen, of_answer), None),
            variable_broadcast=True,
            split_rngs={"params": False},
            length=self.config.micro_steps,
        )
        z, _ = refine(self, z, None)
        y = self.updater(y, z)
        return (y, z), (y, z)


class ACTHead(nn.Module):
    """How likely the network halts; its counters are the reference's, carried along unused."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        for name in ("ema_step_acc", "step_count"):
            if self.is_initializing():
                self.variable("buffers", name, lambda: jnp.zeros(10, jnp.float32))
        return nn.sigmoid(BitDense(1, scheme=None, name="w_halt")(z)).mean((-2, -1))


class TRMTitansMAG(nn.Module):
    """The network; see the head of this file.

    Attributes:
      config: its shape.
      scheme: None for a float model; a `Scheme` to make every matrix ternary but tables and the
        halting head. Both have the same tree.

    >>> config = Phase3Config(16, 16, 1, 2, 32, 8, d_mem=8, mag_hidden=8)
    >>> ids = jnp.zeros((2, 5), jnp.int32)
    >>> variables = TRMTitansMAG(config).init(jax.random.key(0), ids)
    >>> out = TRMTitansMAG(config, Scheme()).apply(variables, ids)
    >>> out["logits"].shape, out["memory_state"].shape, out["halt_probs"].shape
    ((2, 5, 16), (1, 1, 8), (4, 2))
    """

    config: Phase3Config
    scheme: Scheme | None = None

    def setup(self):
        c = self.config
        self.backbone = Backbone(c, self.scheme)
        self.trm = TRM(c, self.scheme)
        self.act_head = ACTHead()
        if not c.tied:
            small = nn.initializers.normal(0.02)
            self.lm_head = BitEmbed(c.vocab_size, c.d_model, embedding_init=small)

    def __call__(
        self,
        input_ids: jax.Array,
        memory_state: jax.Array | None = None,
        mask: jax.Array | None = None,
        labels: jax.Array | None = None,
        return_all_steps: bool = False,
    ) -> dict[str, Any]:
        """One call of the network.

        Args:
          input_ids: int (batch, length); what is longer than ``max_seq_len`` is cut off, as in the
            reference.
          memory_state: float (1, 1, d_mem), what the long-term memory holds before the call; None
            for ``variables["buffers"]``, what the checkpoint holds, or zeros without one.
          mask: broadcast against (batch, heads, length, length); no attention where it is 0.
          labels: int (batch, length), what each position should say: not shifted.
          return_all_steps: also what every step of the recursion gives.

        Returns:
          A dict: ``logits`` (batch, length, vocab) of the last step; ``halt_probs``
          (T_max + 1, batch); ``halting_steps`` int (batch,), the first step, counted from 1, that
          is likelier than the threshold to halt, or T_max + 1; ``memory_state`` (1, 1, d_mem) after
          the call, without gradient; ``features`` and ``last_hidden_state`` (batch, length,
          d_model); ``loss_gate``. With ``return_all_steps`` also ``all_logits``, ``all_y``,
          ``all_z`` (T_max + 1, batch, length, ...). With ``labels`` also ``loss`` = ``loss_ce`` +
          ``loss_act`` + ``loss_gate`` and ``step_losses`` (T_max + 1,), see `supervised`.
        """
        c = self.config
        input_ids = jnp.asarray(input_ids)[:, : c.max_seq_len]
        features, loss_gate, memory = self.backbone(input_ids, memory_state, mask)
        ys, zs = self.trm(features)
        halt_probs = self.act_head(zs)
        halting_steps = halting(halt_probs, c.halt_threshold)
        out = {
            "halt_probs": halt_probs,
            "halting_steps": halting_steps,
            "memory_state": memory,
            "features": features,
            "last_hidden_state": ys[-1],
            "loss_gate": loss_gate,
        }
        if labels is None and not return_all_steps:
            return {"logits": self.logits(ys[-1]), **out}
        every = self.logits(ys)
        out = {"logits": every[-1], **out}
        if return_all_steps:
            out |= {"all_logits": every, "all_y": ys, "all_z": zs}
        if labels is not None:
            labels = jnp.asarray(labels)[:, : c.max_seq_len]
            out |= supervised(c, every, labels, halting_steps, loss_gate)
        return out

    def logits(self, y: jax.Array) -> jax.Array:
        """The head: (..., d_model) to (..., vocab_size)."""
        table = self.backbone.token_emb if self.config.tied else self.lm_head
        return table.attend(y).astype(jnp.float32)


def halting(halt_probs: jax.Array, threshold: float) -> jax.Array:
    """1 + the first step whose probability is above the threshold, or the number of steps.

    >>> halting(jnp.array([[0.1, 0.9], [0.8, 0.9], [0.9, 0.9]]), 0.5).tolist()
    [2, 1]
    """
    above = halt_probs > threshold
    return jnp.where(above.any(0), above.argmax(0) + 1, len(halt_probs)).astype(jnp.int32)


def supervised(
    config: Phase3Config,
    all_logits: jax.Array,
    labels: jax.Array,
    halting_steps: jax.Array,
    loss_gate: jax.Array,
) -> dict[str, jax.Array]:
    """The network's own loss: cross entropy after every step, weighted.

    loss_ce  = sum w_t CE_t / sum w_t        (of the last step, without ``deep_supervision``)
    loss_act = act_loss_weight mean(halting_steps)      a constant: it has no gradient
    loss     = loss_ce + loss_act + loss_gate

    Args:
      config: weights and switches.
      all_logits: (T_max + 1, batch, length, vocab).
      labels: int (batch, length), not shifted.
      halting_steps, loss_gate: as the network gives them.
    """
    entropy = optax.softmax_cross_entropy_with_integer_labels
    step_losses = jax.vmap(lambda x: entropy(x.astype(jnp.float32), labels).mean())(all_logits)
    loss_ce = step_losses[-1]
    if config.deep_supervision and len(all_logits) > 1:
        weights = jnp.asarray(config.step_weights[: len(all_logits)], jnp.float32)
        loss_ce = (weights * step_losses[: len(weights)]).sum() / weights.sum()
    loss_act = config.act_loss_weight * halting_steps.astype(jnp.float32).mean()
    return {
        "loss": loss_ce + loss_act + loss_gate,
        "loss_ce": loss_ce,
        "loss_act": loss_act,
        "step_losses": step_losses,
    }


def stages(config: Phase3Config, scheme: Scheme | None) -> list[Stage]:
    """The network in parts that run one after another, for `bitnet_jax.calibrate`.

    The embedding, layer after layer, then memory, gate and recursion together. Nothing is detached:
    what is measured flows backwards.

    Args:
      config: its shape.
      scheme: of its layers.
    """
    prefix = ("params", "base_model") if config.quiet_star else ("params",)
    first, layer, last = _parts(dataclasses.replace(config, detach_between_steps=False), scheme)
    return [
        Stage((*prefix, "backbone"), first),
        *(Stage((*prefix, "backbone", f"layers_{i}"), layer) for i in range(config.n_layers)),
        Stage(prefix, last),
    ]


@functools.cache  # the same functions each time, so that what is compiled of them is found again
def _parts(config: Phase3Config, scheme: Scheme | None):
    backbone, layer = Backbone(config, scheme), Layer(config, scheme)
    trm = TRM(config, scheme)

    def first(tree: Mapping, ids: jax.Array) -> jax.Array:
        return backbone.apply({"params": tree}, ids, method=Backbone.embed)  # pyright: ignore

    def one(tree: Mapping, x: jax.Array) -> jax.Array:
        return layer.apply({"params": tree}, x, band(x.shape[1], config.sw_window))  # pyright: ignore

    def last(tree: Mapping, x: jax.Array) -> Any:
        features, *_ = backbone.apply({"params": tree["backbone"]}, x, method=Backbone.gated)
        return trm.apply({"params": tree["trm"]}, features)

    return first, one, last
