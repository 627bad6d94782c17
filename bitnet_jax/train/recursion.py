"""Training and judging a Phase 3 network: its own loss at every step, and a float model to follow.

The network looks both ways, so the loss of the next token leaks: what it should guess, it sees. Its
own loss asks every position for its own token after every step of the recursion (labels are not
shifted, as in the reference); what conversion lost is measured against the float model.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import BitnetError
from ..models.phase3 import Phase3Config, supervised
from ..pytree import pytree
from .agreement import compared, shares
from .distill import divergence
from .evaluate import summed
from .loss import Loss, compiled_logits, likeliest


def attached(config: Phase3Config) -> Phase3Config:
    """The same network with gradients through all its steps.

    As the reference detaches them, a loss on the logits that are returned trains no weight of the
    backbone, and the cross entropies after steps 2 and 3 do not either.
    """
    return dataclasses.replace(config, detach_between_steps=False)


@pytree
@dataclasses.dataclass(frozen=True)
class _Recursion:
    """A loss with arrays in it: a pytree, so that compiled steps take them as arguments."""

    teacher_params: Any
    teacher: nn.Module = dataclasses.field(metadata={"static": True})
    config: Phase3Config = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(metadata={"static": True})
    mixing: float = dataclasses.field(metadata={"static": True})

    def __call__(self, model: nn.Module, params: Any, batch: jax.Array):
        ids = batch[:, :-1]
        out: Any = model.apply(params, ids, return_all_steps=True)
        every = out["all_logits"].astype(jnp.float32)
        own = supervised(self.config, every, ids, out["halting_steps"], out["loss_gate"])
        right = jnp.mean(likeliest(every[-1], ids))
        metrics = {"accuracy": right, "cross_entropy": own["loss_ce"]}
        if not self.mixing:
            return own["loss"], metrics
        theirs: Any = self.teacher.apply(self.teacher_params, ids, return_all_steps=True)
        wanted = jax.lax.stop_gradient(theirs["all_logits"].astype(jnp.float32))
        reached = supervised(self.config, wanted, ids, out["halting_steps"], out["loss_gate"])
        weights = jnp.asarray(self.config.step_weights[: len(every)], jnp.float32)
        mean = lambda steps: (weights * steps[: len(weights)]).sum() / weights.sum()
        task = mean(jnp.maximum(own["step_losses"], reached["step_losses"])) + out["loss_gate"]
        steps = jax.vmap(divergence, (0, 0, None))(wanted, every, self.temperature)
        distance = mean(steps)
        loss = (1 - self.mixing) * task + self.mixing * distance
        return loss, {**metrics, "divergence": distance, "last_divergence": steps[-1]}


def deep_supervision(
    config: Phase3Config,
    teacher: nn.Module,
    teacher_params: Any,
    *,
    temperature: float = 1.0,
    mixing: float = 0.5,
) -> Loss:
    """The network's own loss, mixed with the distance to a float model after every step.

    loss = (1 - mixing) (sum_t w_t max(CE_t, CE_t of the teacher) / sum_t w_t + loss_gate)
           + mixing sum_t w_t T^2 KL(teacher_t || student_t) / sum_t w_t

    The maximum asks the student for its task as far as the float model does it, and no further:
    it is to become what that model is in fewer bits, not to learn on. (Without it a network that
    was not trained for this text learns the text and forgets its teacher.)

    Args:
      config: weights w of the steps, and switches; build the model that is trained from
        `attached`, or the distance after the last steps trains no weight of the backbone.
      teacher, teacher_params: the float network; no gradient reaches it.
      temperature: T of both distributions.
      mixing: 0 for the network's own ``loss``, bit for bit, without a teacher; 1 for the teacher
        alone.

    Returns:
      A loss for `fit` over windows (batch, length + 1), of which the last token is not used.

    Raises:
      BitnetError: if the temperature is not above 0 or mixing not in 0..1.
    """
    if not 0 < temperature < math.inf or not 0 <= mixing <= 1:
        raise BitnetError(f"temperature {temperature} must be above 0, mixing {mixing} from 0 to 1")
    return _Recursion(teacher_params, teacher, config, float(temperature), float(mixing))


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: nn.Module, params: Any, ids: jax.Array, real: jax.Array):
    """Summed step losses, right guesses and halting steps over the rows that are real.

    With the logits of the last step, in float32: a comparison needs no program of its own.
    """
    out: Any = model.apply(params, ids, return_all_steps=True)
    every = jax.nn.log_softmax(out["all_logits"].astype(jnp.float32))
    index = jnp.broadcast_to(ids, every.shape[:1] + ids.shape)[..., None]
    losses = -jnp.take_along_axis(every, index, axis=-1)[..., 0]
    right = likeliest(every[-1], ids)
    sums = (
        (losses * real[:, None]).sum((1, 2)),
        (right * real[:, None]).sum(),
        (out["halting_steps"] * real).sum(),
    )
    return sums, out["logits"].astype(jnp.float32)


def evaluate(
    config: Phase3Config, model: nn.Module, params: Any, data: np.ndarray, batch: int = 16
) -> dict[str, float]:
    """A Phase 3 network's own loss on every position of the data.

    Args:
      config: weights of the steps.
      model, params: the network.
      data: int windows (n, length + 1), of which the last token is not used.
      batch: windows evaluated at once.

    Returns:
      ``loss`` (the steps' cross entropies, weighted, in nats a token), ``perplexity`` = exp(cross
      entropy of the last step), ``accuracy`` of the last step in 0..1, ``halting_steps``,
      ``tokens``.
    """
    found = lambda rows, real: _sums(model, params, rows[:, :-1], real)[0]
    return _scores(config, summed(found, data, batch), data)


def _scores(config: Phase3Config, sums: Any, data: np.ndarray) -> dict[str, float]:
    """The figures of `evaluate` from its sums over all windows of the data."""
    tokens = len(data) * (data.shape[1] - 1)
    steps, right, halting = sums[0] / tokens, sums[1], sums[2]
    weights = np.asarray(config.step_weights[: len(steps)])
    deep = config.deep_supervision and len(steps) > 1
    loss = (weights * steps[: len(weights)]).sum() / weights.sum() if deep else steps[-1]
    return {
        "loss": float(loss),
        "perplexity": math.exp(min(float(steps[-1]), 700.0)),
        "accuracy": float(right) / tokens,
        "halting_steps": float(halting) / len(data),
        "tokens": tokens,
    }


def judge(
    config: Phase3Config,
    reference: nn.Module,
    reference_params: Any,
    model: nn.Module,
    params: Any,
    data: np.ndarray,
    batch: int = 16,
) -> dict[str, float]:
    """`evaluate`, with ``top1`` and ``kl``: how far the network says what the float one says."""

    def found(rows: np.ndarray, real: np.ndarray):
        wanted = compiled_logits(reference, reference_params, rows)
        own, logits = _sums(model, params, rows[:, :-1], real)
        return own, compared(logits, wanted, real)

    own, same = summed(found, data, batch)
    return {**_scores(config, own, data), **shares(same, data)}
