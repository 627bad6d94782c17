"""The two-stage schedule of BitNet: a lower rate and no weight decay from the midpoint on."""

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
    """Learning rate and weight decay of "The Era of 1-bit LLMs: Training Tips, Code and FAQ".

    With S = steps, W = warmup, P(t) = rate for t < S / 2 and second * rate from there on:

    learning_rate(t) = P(t) t / W               for t < W
                     = P(t) (S - t) / (S - W)   for W <= t <= S, 0 after
    weight_decay(t)  = weight_decay             for t < S / 2, 0 after

    So the rate runs down a line that aims at zero at the last step, and at the midpoint falls by
    the factor ``second`` onto the lower line of a second, smaller peak. Ternary weights learn
    faster at a rate that a float model would not stand, and then need a low one to settle: a code
    flips whenever its latent weight crosses a threshold. Decay goes away with it, since it pulls
    latent weights towards zero, the place where codes flip most easily.

    Args:
      rate: peak of the first stage. The paper's: 1.5e-3 at 0.7B parameters, 1.2e-3 up to 3.9B.
      steps: S, of the whole training; the schedules count from 0.
      second: peak of the second stage over the first's, 0..1. The paper's is 2/3 at both sizes; 1
        for one plain line, bit for bit.
      warmup: W, ending by the midpoint at the latest. The paper's is 375 steps; None for a
        twentieth of all, as `bitnet_jax.phase4.fine_tuner`.
      weight_decay: of the first half.

    Returns:
      (learning rate, weight decay), schedules for the arguments of these names of `adamw` and
      `mugrokfast`: an int step to a float32 scalar.

    Raises:
      BitnetError: if an argument is out of its range.

    >>> learning_rate, weight_decay = two_stage(1.5e-3, 1000, warmup=100)
    >>> [f"{learning_rate(t):.2e}" for t in (0, 50, 100, 499, 500, 1000)]
    ['0.00e+00', '7.50e-04', '1.50e-03', '8.35e-04', '5.56e-04', '0.00e+00']
    >>> [round(float(weight_decay(t)), 2) for t in (0, 499, 500)]
    [0.1, 0.1, 0.0]
    """
    start = steps // 20 if warmup is None else warmup
    _check(rate, steps, second, start, weight_decay)
    middle = -(-steps // 2)  # an odd number of steps has its middle one in the first half

    def learning_rate(step):
        peak = jnp.where(step < middle, rate, second * rate)
        rising, falling = step / max(start, 1), (steps - step) / (steps - start)
        return peak * jnp.maximum(jnp.where(step < start, rising, falling), 0.0)

    def decay(step):
        return jnp.where(step < middle, weight_decay, 0.0)

    return learning_rate, decay


def _check(rate: float, steps: int, second: float, warmup: int, weight_decay: float) -> None:
    if steps < 1:
        raise BitnetError(f"two_stage: steps {steps}: give 1 or more")
    if not 0 <= warmup <= steps / 2:
        raise BitnetError(
            f"two_stage: warmup {warmup}: give 0 to {steps // 2}, half of {steps} steps"
        )
    if not 0 <= second <= 1:
        raise BitnetError(f"two_stage: second {second}: give a number from 0 to 1")
    for name, value in (("rate", rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise BitnetError(f"two_stage: {name} {value}: give 0 or a number above it")
