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
from .phase3_config import Phase3Config as Phase3Config
from .titans import Backbone, Layer, band
from .trm import TRM


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
