"""Schedules of ternary training: two stages of learning rate and weight decay."""

import jax.numpy as jnp
import optax

from ..errors import BitnetError


def two_stage(
    rate: float,
    steps: int,
    *,
    second: float = 2 / 3,
    warmup: int | None = None,
    weight_decay: float = 0.1,
) -> tuple[optax.Schedule, optax.Schedule]:
    """A learning rate that drops at half time and a weight decay that ends there.

    With h = steps / 2 and t the step:
    learning rate = rate t / warmup                     for t < warmup
                    rate (1 - (t - warmup) / (steps - warmup))          for t < h
                    second rate (1 - (t - warmup) / (steps - warmup))   from h on
    weight decay  = weight_decay for t < h, then 0

    From "The Era of 1-bit LLMs: Training Tips, Code and FAQ": near the end of training large steps
    and a decay that pulls latent weights to 0 only keep codes flipping.

    Args:
      rate: peak of the first stage.
      steps: of the whole training, 2 or more.
      second: the second stage's line as a share of the first one's; 1.5e-3 to 1e-3 in the paper.
      warmup: steps of the linear rise; None for a twentieth.
      weight_decay: of the first stage.

    Returns:
      Two optax schedules, for the arguments ``learning_rate`` and ``weight_decay`` of `mugrokfast`
      and `adamw`.

    Raises:
      BitnetError: if steps, the warm-up or the share are out of range.

    >>> rate, decay = two_stage(1.0, 100, second=0.5, warmup=0)
    >>> [round(float(rate(t)), 3) for t in (0, 49, 50, 100)], float(decay(49)), float(decay(50))
    ([1.0, 0.51, 0.25, 0.0], 0.10000000149011612, 0.0)
    """
    rise = max(steps // 20, 1) if warmup is None else warmup
    if steps < 2 or not 0 <= rise <= steps / 2:
        raise BitnetError(f"two stages: steps {steps}, warmup {rise}: give a rise within the first")
    if not 0 < second <= 1:
        raise BitnetError(f"two stages: second {second}: give a share above 0, 1 at most")

    def learning_rate(count):
        t = jnp.asarray(count)
        fall = rate * (1 - (t - rise) / (steps - rise))
        falling = jnp.where(t < steps / 2, fall, second * fall)
        return jnp.where(t < rise, rate * t / max(rise, 1), jnp.maximum(falling, 0.0))

    return learning_rate, lambda count: jnp.where(jnp.asarray(count) < steps / 2, weight_decay, 0.0)
