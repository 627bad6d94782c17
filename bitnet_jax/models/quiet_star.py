"""The Quiet-STaR parts around a Phase 3 network: where to think, how well, and mixing it in.

In the reference a thought is injected where the next token is hard to tell (`injections`), sampled
(`nucleus`), scored (`CoherenceScorer`) and mixed into the hidden state there (`MixingHead`). At its
default threshold it never injects one, because without attention weights and a loss the difficulty
stays below 0.55: the wrapped network then is the network inside.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ..linen import BitDense
from ..quantize import Scheme
from .phase3 import Phase3Config, TRMTitansMAG

MIXING_HEADS = 8
# Positions between two thoughts, at least.
_APART = 3


def difficulty(logits: jax.Array, loss: float = 0.0, dispersion: float = 0.5) -> jax.Array:
    """How hard the next token is to tell at every position, 0..1.

    0.4 H + 0.3 dispersion + 0.3 min(loss, 10) / 10, H as `normalised_entropy`

    Args:
      logits: (batch, length, vocab).
      loss: of the token, 0 where it is not known.
      dispersion: of the attention there; 0.5 where it is not known.

    Returns:
      (length,).
    """
    return 0.4 * normalised_entropy(logits) + 0.3 * dispersion + 0.3 * min(loss, 10.0) / 10.0


def normalised_entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) / ln vocab, the mean over the batch.

    Args:
      logits: (batch, length, vocab).

    Returns:
      (length,).

    >>> normalised_entropy(jnp.zeros((1, 1, 4))).round(4).tolist()
    [1.0]
    """
    p = jax.nn.softmax(logits.astype(jnp.float32))
    entropy = -(p * jnp.log(p + 1e-10)).sum(-1)
    return entropy.mean(0) / jnp.log(logits.shape[-1])


def injections(logits: jax.Array, threshold: float = 0.6, last: int = -_APART):
    """Where thoughts go: where it is difficult, and 3 positions after the last one or later.

    Args:
      logits: (batch, length, vocab).
      threshold: of `difficulty`.
      last: position of the last thought before; the reference keeps it from sequence to sequence.

    Returns:
      bool (length,), and the position of the last thought.

    >>> injections(jnp.zeros((1, 5, 4)), threshold=0.5)[0].tolist()
    [True, False, False, True, False]
    """
    hard = difficulty(logits) > threshold

    def visit(last, here):
        p, hard = here
        chosen = hard & (p - last >= _APART)
        return jnp.where(chosen, p, last), chosen

    last_one, chosen = jax.lax.scan(visit, jnp.asarray(last), (jnp.arange(len(hard)), hard))
    return chosen, last_one


def nucleus(logits: jax.Array, top_p: float = 0.9) -> jax.Array:
    """Probabilities of the likeliest tokens whose sum, theirs included, is at most top_p.

    The likeliest token is always kept; the kept ones are renormalised.

    Args:
      logits: (..., vocab).
      top_p: in 0..1.

    >>> [round(p, 3) for p in nucleus(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.85).tolist()]
    [0.625, 0.375, 0.0]
    """
    p = jax.nn.softmax(logits.astype(jnp.float32))
    order = jnp.argsort(-p, axis=-1)
    ordered = jnp.take_along_axis(p, order, -1)
    kept = (jnp.cumsum(ordered, -1) <= top_p).at[..., 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)
    p = jnp.where(kept, p, 0)
    return p / p.sum(-1, keepdims=True)


class CoherenceScorer(nn.Module):
    """How well a thought fits: semantic, syntactic, predictive, and their weighted sum.

    semantic = (cos(t, W h) + 1) / 2, syntactic = sigmoid(MLP t), predictive = sigmoid(w t)
    """

    scheme: Scheme | None = None
    weights: tuple[float, float, float] = (0.4, 0.3, 0.3)

    @nn.compact
    def __call__(self, hidden: jax.Array, thoughts: jax.Array, with_logits: bool = True):
        """Scores of thoughts.

        Args:
          hidden: (batch, features), the state where they would go.
          thoughts: (batch, thoughts, length, features).
          with_logits: whether next-token logits are known; without, ``predictive`` is 1.

        Returns:
          A dict of (batch, thoughts) arrays.
        """
        t, width = thoughts.mean(2), hidden.shape[-1]
        dense = lambda features, name: BitDense(features, scheme=self.scheme, name=name)
        one = lambda name: BitDense(1, scheme=None, name=name)
        here = dense(width, "semantic_projection")(hidden)[:, None]
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        semantic = ((unit(t) * unit(here)).sum(-1) + 1) / 2
        h = nn.relu(dense(width // 2, "syntactic_mlp_0")(t))
        syntactic = nn.sigmoid(one("syntactic_mlp_2")(h))[..., 0]
        predictive = nn.sigmoid(one("predictive_head")(t))[..., 0]
        if not with_logits:
            predictive = jnp.ones_like(predictive)
        a, b, c = self.weights
        return {
            "semantic": semantic,
            "syntactic": syntactic,
            "predictive": predictive,
            "composite": a * semantic + b * syntactic + c * predictive,
        }


class MixingHead(nn.Module):
    """A hidden state that attends to thoughts: LN(h + g r + (1 - g) h), g = sigmoid(W [h; r])."""

    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, hidden: jax.Array, thoughts: jax.Array, scores: jax.Array) -> jax.Array:
        """Mix thoughts into a state.

        Args:
          hidden: (batch, features).
          thoughts: (batch, thoughts, features), each the mean over its length.
          scores: (batch, thoughts), added to the attention's logits.

        Returns:
          (batch, features).
        """
        width = hidden.shape[-1]
        dense = lambda name: BitDense(width, scheme=self.scheme, name=name)
        heads = lambda x: x.reshape(*x.shape[:-1], MIXING_HEADS, -1)
        q = heads(dense("query")(hidden))
        k, v = heads(dense("key")(thoughts)), heads(dense("value")(thoughts))
        logits = jnp.einsum("bhe,bnhe->bhn", q, k) * q.shape[-1] ** -0.5 + scores[:, None]
        r = jnp.einsum("bhn,bnhe->bhe", jax.nn.softmax(logits), v)
        r = dense("output")(r.reshape(hidden.shape))
        g = nn.sigmoid(dense("gate_0")(jnp.concatenate([hidden, r], -1)))
        return nn.LayerNorm(1e-5, name="layer_norm")(hidden + g * r + (1 - g) * hidden)


class QuietSTaR(nn.Module):
    """A Phase 3 network with the parts that think.

    Applied to tokens it is the network inside, without thoughts; with ``labels`` its loss is the
    wrapper's, cross entropy of the next token. The parts are methods: ``apply(...,
    method="score")`` and ``"mix"``.

    Attributes:
      config: shape of the network inside.
      scheme: None for a float model; a `Scheme` for a ternary one.
    """

    config: Phase3Config
    scheme: Scheme | None = None

    def setup(self):
        self.base_model = TRMTitansMAG(self.config, self.scheme)
        self.coherence_scorer = CoherenceScorer(self.scheme)
        self.mixing_head = MixingHead(self.scheme)

    def __call__(
        self,
        input_ids: jax.Array,
        memory_state: jax.Array | None = None,
        mask: jax.Array | None = None,
        labels: jax.Array | None = None,
        return_all_steps: bool = False,
    ) -> dict[str, Any]:
        """As `TRMTitansMAG`, but ``labels`` are shifted here: ``loss`` is the next token's."""
        out = self.base_model(input_ids, memory_state, mask, return_all_steps=return_all_steps)
        if self.is_initializing():
            hidden = out["last_hidden_state"][:, -1]
            thoughts = hidden[:, None, None]
            self.mix(hidden, thoughts[:, :, 0], self.score(hidden, thoughts)["composite"])
        if labels is not None:
            entropy = optax.softmax_cross_entropy_with_integer_labels
            loss = entropy(out["logits"][:, :-1], jnp.asarray(labels)[:, 1:]).mean()
            out = {**out, "loss": loss}
        return out

    def score(self, hidden: jax.Array, thoughts: jax.Array, with_logits: bool = True):
        """See `CoherenceScorer`."""
        return self.coherence_scorer(hidden, thoughts, with_logits)

    def mix(self, hidden: jax.Array, thoughts: jax.Array, scores: jax.Array) -> jax.Array:
        """See `MixingHead`."""
        return self.mixing_head(hidden, thoughts, scores)
