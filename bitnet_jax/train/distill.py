"""Distillation: a loss that also asks for the teacher's distribution, not only for its text."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import BitnetError
from ..pytree import pytree
from .loss import Loss, cross_entropy, float32_logits, next_token


@pytree
@dataclasses.dataclass(frozen=True)
class _Distillation:
    """A loss with arrays in it: a pytree, so that compiled steps take them as arguments."""

    teacher_params: Any
    teacher: nn.Module = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(metadata={"static": True})
    mixing: float = dataclasses.field(metadata={"static": True})

    def __call__(self, model: nn.Module, params: Any, batch: jax.Array):
        # Known to Python, so that without mixing nothing is added, not even a rounding.
        if not self.mixing:
            return next_token(model, params, batch)
        logits = float32_logits(model, params, batch)
        wanted = jax.lax.stop_gradient(float32_logits(self.teacher, self.teacher_params, batch))
        entropy, metrics = cross_entropy(logits, batch[:, 1:])
        distance = divergence(wanted, logits, self.temperature)
        loss = (1 - self.mixing) * entropy + self.mixing * distance
        return loss, {**metrics, "cross_entropy": entropy, "divergence": distance}


def distillation(
    teacher: nn.Module, teacher_params: Any, *, temperature: float = 2.0, mixing: float = 0.5
) -> Loss:
    """Next-token cross entropy mixed with the distance to a teacher's distribution.

    loss = (1 - mixing) CE + mixing T^2 mean over positions of KL(teacher_T || student_T)

    where p_T = softmax(logits / T), from arXiv 1503.02531; T^2 keeps the gradient's size when T
    changes.

    Args:
      teacher: maps tokens (batch, length) to logits (batch, length, vocab) over the student's
        vocabulary.
      teacher_params: its variables, of any kind the teacher can be applied to; no gradient
        reaches them.
      temperature: T, above 0.
      mixing: 0 for the plain loss, bit for bit, without running the teacher; 1 for the teacher
        alone.

    Returns:
      A loss for `fit`, with metrics ``accuracy``, ``cross_entropy`` and ``divergence`` (the two
      terms before mixing). It is a pytree: compiled steps take the teacher's parameters as
      arguments, not as constants.

    Raises:
      BitnetError: if the temperature is not above 0 or mixing not in 0..1.

    >>> distillation(nn.Embed(4, 4), {}, mixing=1.5)
    Traceback (most recent call last):
    bitnet_jax.errors.BitnetError: mixing 1.5: give a number from 0 to 1
    """
    if not 0 < temperature < float("inf"):
        raise BitnetError(f"temperature {temperature}: give a number above 0")
    if not 0 <= mixing <= 1:
        raise BitnetError(f"mixing {mixing}: give a number from 0 to 1")
    return _Distillation(teacher_params, teacher, float(temperature), float(mixing))


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """T^2 mean over positions of KL(softmax(teacher / T) || softmax(student / T)), in nats.

    Args:
      teacher, student: float32 logits (..., vocab).
      temperature: T.

    Returns:
      A float32 scalar, 0 where both are the same distribution.

    >>> round(float(divergence(jnp.array([[0.0, 100.0]]), jnp.zeros((1, 2)), 1.0)), 4)
    0.6931
    """
    wanted, found = (jax.nn.log_softmax(x / temperature) for x in (teacher, student))
    return temperature**2 * (jnp.exp(wanted) * (wanted - found)).sum(-1).mean()
