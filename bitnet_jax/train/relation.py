"""Attention-relation distillation: tokens should relate to each other as the teacher's do."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import BitnetError
from .distill import divergence
from .loss import Loss

_STATES = ("query", "key", "value")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Relation:
    """A loss with arrays in it: a pytree, see `bitnet_jax.train.distill`."""

    inner: Any
    teacher_params: Any
    teacher: nn.Module = dataclasses.field(metadata={"static": True})
    layer: str = dataclasses.field(metadata={"static": True})
    weight: float = dataclasses.field(metadata={"static": True})
    splits: int = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(metadata={"static": True})

    def __call__(self, model: nn.Module, params: Any, batch: jax.Array):
        loss, metrics = self.inner(model, params, batch)
        wanted = attention_states(self.teacher, self.teacher_params, batch[:, :-1], self.layer)
        found = attention_states(model, params, batch[:, :-1], self.layer)
        distance = jnp.zeros(())
        for a, b in zip(wanted, found):
            rows = [relations(x, self.splits) / self.temperature for x in (a, b)]
            distance += divergence(jax.lax.stop_gradient(rows[0]), rows[1], 1.0)
        return loss + self.weight * distance, {**metrics, "relation": distance}


def relation(
    inner: Loss,
    teacher: nn.Module,
    teacher_params: Any,
    *,
    layer: str,
    weight: float = 100.0,
    splits: int = 4,
    temperature: float = 1.0,
) -> Loss:
    """A loss with the distance between two models' attention relations at one layer added.

    loss = inner + weight sum over A in {Q, K, V} of
           mean over windows, splits and positions of KL(softmax(R_teacher) || softmax(R_student)),
    R = A A^T / temperature,  A (length, features / splits) with rows of length 1

    from MiniLMv2 (arXiv 2012.15828) as BitDistill uses it (arXiv 2510.13998): one layer, late in
    the network. A is what the projections ``query``, ``key`` and ``value`` of the layer give; their
    features are split anew, so that both models may have heads of their own. Every position is
    compared with every other, later ones too, as in BitDistill: nothing is predicted from them.
    BitDistill's coefficient of 1e5 is divided by layers times splits there; 100 is about the same.

    Args:
      inner: the loss it is added to: `next_token`, or one of `distillation`.
      teacher: a Linen model of tokens (batch, length).
      teacher_params: its variables; no gradient reaches them.
      layer: path of the attention in both models, ``"layer_3/attention"``.
      weight: 0 gives ``inner`` itself.
      splits: into how many parts features are split; divides those of query, key and value.
      temperature: above 0.

    Returns:
      A loss for `fit`, with the metric ``relation`` (before its weight) added. It applies the
      model a second time, which XLA merges with the first.

    Raises:
      BitnetError: if an argument is out of range, now; if the layer has no such states or their
        features do not split, when the loss is called.

    >>> from bitnet_jax.train.loss import next_token
    >>> relation(next_token, nn.Embed(4, 4), {}, layer="x", weight=0.0) is next_token
    True
    """
    if not (weight >= 0 and temperature > 0 and splits > 0):
        raise BitnetError("relation: weight must be 0 or more, splits and temperature above 0")
    if weight == 0:
        return inner
    inner = jax.tree_util.Partial(inner) if jax.tree_util.all_leaves([inner]) else inner
    return _Relation(
        inner, teacher_params, teacher, layer, float(weight), splits, float(temperature)
    )  # pyright: ignore[reportReturnType]


def attention_states(
    model: nn.Module, params: Any, tokens: jax.Array, layer: str
) -> list[jax.Array]:
    """What a layer's query, key and value projections give, (batch, length, features) each.

    Raises:
      BitnetError: if the model has no such layer.
    """
    keep = lambda module, method: module.name in _STATES
    _, extra = model.apply(params, tokens, capture_intermediates=keep, mutable=["intermediates"])
    node = extra["intermediates"]
    try:
        for key in layer.split("/"):
            node = node[key]
        states: Any = [node[name]["__call__"][0] for name in _STATES]
        return [x.reshape(*tokens.shape, -1) for x in states]
    except KeyError:
        raise BitnetError(
            f"relation: no {layer}/query, key and value in the model; give the path of an attention"
        ) from None


def relations(states: jax.Array, splits: int) -> jax.Array:
    """Cosines between all positions: (batch, length, features) to (batch, splits, length, length).

    Raises:
      BitnetError: if splits does not divide the features.

    >>> relations(jnp.array([[[3.0, 4.0], [4.0, -3.0]]]), 1).round(2).tolist()
    [[[[1.0, 0.0], [0.0, 1.0]]]]
    """
    batch, length, features = states.shape
    if features % splits:
        raise BitnetError(f"relation: {splits} splits do not divide {features} features")
    x = states.astype(jnp.float32).reshape(batch, length, splits, -1)
    x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
    return jnp.einsum("bisd,bjsd->bsij", x, x, precision="highest")
