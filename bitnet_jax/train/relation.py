"""Relation distillation: which tokens one layer finds alike, asked of the student too."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import BitnetError
from ..models.decoder import ACTIVATIONS
from ..pytree import pytree
from .distill import _Distillation
from .loss import Loss
from .step import as_pytree

States = tuple[jax.Array, ...]  # of queries, keys, values: (batch, length, heads, head_dim) each


@pytree
@dataclasses.dataclass(frozen=True)
class _Relation:
    """A loss with arrays in it: a pytree, so that compiled steps take them as arguments."""

    inner: Any
    teacher_params: Any
    teacher: nn.Module = dataclasses.field(metadata={"static": True})
    layer: int = dataclasses.field(metadata={"static": True})
    weight: float = dataclasses.field(metadata={"static": True})
    splits: int | None = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(metadata={"static": True})

    def __call__(self, model: nn.Module, params: Any, batch: jax.Array):
        student: Any = _Watched(model)
        value, metrics = _lend(self.inner, self.teacher_params)(student, params, batch)
        tokens, shown = student.seen(params, batch[:, :-1])
        theirs = _run(self.teacher, self.teacher_params, tokens)[1]
        wanted = jax.lax.stop_gradient(_states(theirs, self.layer, "teacher"))
        found = _states(shown, self.layer, "student")
        distance = relation_divergence(wanted, found, self.splits, self.temperature)
        return value + self.weight * distance, {**metrics, "relation": distance}


def relation(
    inner: Loss,
    teacher: nn.Module,
    teacher_params: Any,
    *,
    layer: int,
    weight: float,
    splits: int | None = None,
    temperature: float = 1.0,
) -> Loss:
    """A loss plus the distance between teacher's and student's token relations in one layer.

    loss = inner + weight R,  R = mean over Q, K, V of `relation_divergence`

    This is the attention-relation term of BitDistill (arXiv 2510.13998) in MiniLMv2's form
    (arXiv 2012.15828): how alike the tokens of a window are to each other, not their vectors, so
    that a student may have other bases, head sizes or numbers of heads.

    * Q, K and V are the projections' outputs before rotary positions, which both models share.
    * Relations are not causal, as in both papers: nothing is predicted from a row, it compares
      vectors that exist, each of which saw only its own past; under a mask the first rows would
      be at rest whatever the vectors are. There is no padding mask, since windows have none.
    * BitDistill adds c / (layers * splits) times the sum over Q, K, V of the same mean over rows,
      with c = 1e5: that is ``weight = 3e5 / (layers * splits)``, 335 for its 28 layers and 32
      splits. Ours is a plain mean, so that a weight keeps its meaning when the shape changes. Such
      weights are large because R is small: at temperature 1, cosines give nearly even rows.

    Args:
      inner: the loss to add to, as `next_token` or `bitnet_jax.train.distill.distillation`. The
        student is applied once for both, if ``inner`` applies it once. It must not do so inside
        a jit, scan or checkpoint of its own, which what the student shows could not leave.
      teacher: a `Decoder`, or a network that sows what a `Decoder` sows.
      teacher_params: its variables, of any kind the teacher can be applied to; no gradient
        reaches them. The same arrays as a `distillation` inside: the teacher runs once for both.
      layer: of both, from 0. The paper takes a late one, 22 of 28.
      weight: of R; 0 gives ``inner`` itself back.
      splits: heads that the concatenated heads are split into again, dividing the features of
        queries and of keys and values, in both models; None for the teacher's key/value heads.
      temperature: the similarities are divided by it, above 0.

    Returns:
      A loss for `fit`, with inner's metrics and ``relation``, R. It is a pytree, as
      `distillation` gives.

    Raises:
      BitnetError: for an argument out of its range; when called, if ``splits`` does not divide the
        features, or a model has no such layer or shows nothing of it.

    >>> from bitnet_jax.models.decoder import Decoder, DecoderConfig
    >>> from bitnet_jax.train.loss import next_token
    >>> model, tokens = Decoder(DecoderConfig(vocab_size=8, layers=1)), jnp.zeros((1, 5), int)
    >>> params = model.init(jax.random.key(0), tokens)
    >>> loss = relation(next_token, model, params, layer=0, weight=100.0)
    >>> round(float(loss(model, params, tokens)[1]["relation"]), 6)
    0.0
    """
    if layer < 0:
        raise BitnetError(f"relation: layer {layer}: count from 0")
    if not 0 <= weight < math.inf:
        raise BitnetError(f"relation: weight {weight}: give 0 or a number above it")
    if splits is not None and splits < 1:
        raise BitnetError(f"relation: splits {splits}: give 1 or more, or None")
    if not 0 < temperature < math.inf:
        raise BitnetError(f"relation: temperature {temperature}: give a number above 0")
    if not weight:
        return inner
    inner = _without(as_pytree(inner), teacher, teacher_params)
    return _Relation(
        inner, teacher_params, teacher, layer, float(weight), splits, float(temperature)
    )


def relation_divergence(
    teacher: States, student: States, splits: int | None = None, temperature: float = 1.0
) -> jax.Array:
    """Mean over states, batch, splits and rows of KL(teacher's row || student's row), in nats.

    rows = softmax(a a^T / temperature),  a = heads' features, concatenated, split, of length 1

    Args:
      teacher, student: arrays (batch, length, heads, head_dim), as many of one as of the other,
        with any heads and head_dim.
      splits: number of splits, dividing heads * head_dim of each; None for the second teacher
        array's heads (of queries, keys, values: the keys').
      temperature: above 0.

    Returns:
      A float32 scalar, 0 where all rows are the same distributions.

    >>> even, odd = jnp.ones((1, 2, 1, 2)), jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> round(float(relation_divergence((even, even), (odd, odd))), 4)
    0.1201
    """
    splits = teacher[1].shape[2] if splits is None else splits
    each = [
        _kl(_log_rows(a, splits, temperature), _log_rows(b, splits, temperature))
        for a, b in zip(teacher, student, strict=True)
    ]
    return sum(each[1:], each[0]) / len(each)


def _kl(wanted: jax.Array, found: jax.Array) -> jax.Array:
    return (jnp.exp(wanted) * (wanted - found)).sum(-1).mean()


def _log_rows(x: jax.Array, splits: int, temperature: float) -> jax.Array:
    """Log of the relation of every split: (batch, splits, length, length)."""
    batch, length, heads, features = x.shape
    if heads * features % splits:
        raise BitnetError(
            f"relation: splits {splits} does not divide {heads} heads of {features} features; "
            "give a divisor of the key/value features of both models"
        )
    x = x.astype(jnp.float32).reshape(batch, length, splits, -1)
    # The floor keeps the gradient of a vector of zeros finite.
    x *= jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
    # In full precision: rows differ by little, and an accelerator's tensor cores round to 1e-3.
    similarity = jnp.einsum("bqsd,bksd->bsqk", x, x, precision="highest")
    return jax.nn.log_softmax(similarity / temperature)


def _without(inner: Loss, teacher: nn.Module, teacher_params: Any) -> Loss:
    """A distillation from the same teacher without its parameters, which `_lend` gives back.

    As two arguments of a program the same arrays would be two teachers to XLA; as one, it sees
    that both terms ask for the same pass.
    """
    if not isinstance(inner, _Distillation) or inner.teacher != teacher:
        return inner
    (ours, shape), (theirs, other) = map(jax.tree.flatten, (teacher_params, inner.teacher_params))
    same = shape == other and all(a is b for a, b in zip(ours, theirs, strict=True))
    return dataclasses.replace(inner, teacher_params=None) if same else inner


def _lend(inner: Loss, teacher_params: Any) -> Loss:
    if isinstance(inner, _Distillation) and inner.teacher_params is None:
        return dataclasses.replace(inner, teacher_params=teacher_params)
    return inner


class _Watched:
    """A model that keeps what it was applied to and what it showed, so that one pass is enough.

    Applied twice instead, XLA would share the forward pass but not the backward one.
    """

    def __init__(self, model: nn.Module):
        self._model, self._calls = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, params: Any, tokens: jax.Array, *args: Any, **options: Any) -> Any:
        if args or options:
            return self._model.apply(params, tokens, *args, **options)
        logits, shown = _run(self._model, params, tokens)
        self._calls.append((params, tokens, shown))
        return logits

    def seen(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """Tokens and activations of the one call with these parameters; or of these tokens."""
        calls = [call[1:] for call in self._calls if call[0] is params]
        return calls[0] if len(calls) == 1 else (tokens, _run(self._model, params, tokens)[1])


def _run(model: nn.Module, params: Any, tokens: jax.Array) -> tuple[Any, Any]:
    """Logits, and what the model sowed as activations."""
    logits, shown = model.apply(params, tokens, mutable=[ACTIVATIONS])
    return logits, shown.get(ACTIVATIONS, {})


def _states(shown: Any, layer: int, who: str) -> States:
    """Queries, keys and values of a layer."""
    try:
        attention = shown[f"layer_{layer}"]["attention"]
        return tuple(attention[name][0] for name in "qkv")
    except KeyError:
        layers = [name for name in shown if name.startswith("layer_")]
        raise BitnetError(
            f"relation: the {who} shows no queries, keys and values of layer {layer}; "
            f"it shows {len(layers)} layers, counted from 0"
        ) from None
