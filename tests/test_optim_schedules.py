"""The two-stage schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import BitnetError
from bitnet_jax.optim import adamw, mugrokfast, two_stage

PEAK, STEPS, WARMUP = 1.5e-3, 1000, 40


def written_out(t, second=2 / 3, steps=STEPS, warmup=WARMUP):
    """Both values in Python's float64, from the formula alone."""
    peak = PEAK if 2 * t < steps else second * PEAK
    shape = t / warmup if t < warmup else max(steps - t, 0) / (steps - warmup)
    return peak * shape, 0.1 if 2 * t < steps else 0.0


@pytest.mark.parametrize("second", [2 / 3, 0.5, 0.0, 1.0])
def test_every_step_is_the_formulas(second):
    rate, decay = two_stage(PEAK, STEPS, second=second, warmup=WARMUP)
    steps = np.arange(STEPS + 10)
    expected = np.array([written_out(t, second) for t in steps])
    np.testing.assert_allclose(rate(steps), expected[:, 0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(decay(steps), expected[:, 1], rtol=1e-6)


def test_the_special_points():
    rate, decay = two_stage(PEAK, STEPS, warmup=WARMUP)
    at = lambda t: float(rate(t))
    assert at(0) == 0 and at(WARMUP // 2) == pytest.approx(PEAK / 2)
    assert at(WARMUP) == pytest.approx(PEAK) == max(at(t) for t in range(0, STEPS, 10))
    # One line before the midpoint, the same line two thirds as high after it, which ends in zero.
    line = PEAK / (STEPS - WARMUP)
    assert at(499) == pytest.approx(501 * line) and at(500) == pytest.approx(500 * line * 2 / 3)
    assert at(999) == pytest.approx(line * 2 / 3) and at(1000) == at(1001) == at(5000) == 0
    assert float(decay(499)) == pytest.approx(0.1) and float(decay(500)) == float(decay(5000)) == 0


def test_an_odd_number_of_steps_has_its_middle_one_in_the_first_half():
    rate, decay = two_stage(1.0, 5, second=0.5, warmup=0)
    np.testing.assert_allclose([rate(t) for t in range(6)], [1, 0.8, 0.6, 0.2, 0.1, 0], rtol=1e-6)
    np.testing.assert_allclose([decay(t) for t in range(6)], [0.1] * 3 + [0] * 3, rtol=1e-6)


def test_a_second_peak_as_high_as_the_first_is_one_plain_line_bit_for_bit():
    rate, decay = two_stage(PEAK, STEPS, second=1.0, warmup=0, weight_decay=0.0)
    steps = jnp.arange(STEPS + 1)
    plain = jnp.float32(PEAK) * ((STEPS - steps) / STEPS)
    assert np.asarray(rate(steps)).tobytes() == np.asarray(plain).tobytes()
    assert not np.asarray(decay(steps)).any()


def test_the_default_warmup_is_a_twentieth():
    given, default = (two_stage(PEAK, STEPS, **how)[0] for how in ({"warmup": 50}, {}))
    assert [float(given(t)) for t in range(60)] == [float(default(t)) for t in range(60)]
    assert float(two_stage(PEAK, 1)[0](0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("make", [adamw, mugrokfast])
def test_the_optimizers_take_both(make):
    """Without gradients only decay moves a weight: by 1 - rate decay in the first half."""
    rate, decay = two_stage(0.5, 8, warmup=2, weight_decay=0.2)
    optimizer = make(rate, weight_decay=decay)
    params = {"up": {"kernel": jnp.ones((16, 16))}}
    state, zero = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    expected, update = 1.0, jax.jit(optimizer.update)
    for t in range(8):
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
        expected *= 1 - float(rate(t)) * float(decay(t))
        np.testing.assert_allclose(params["up"]["kernel"], expected, rtol=1e-6)
        if t == 3:
            half = params
    assert 0.7 < expected < 1
    jax.tree.map(np.testing.assert_array_equal, params, half)


def test_both_can_be_traced():
    for schedule in two_stage(PEAK, STEPS):
        traced = jax.jit(schedule)(jnp.int32(600))
        assert traced.dtype == jnp.float32
        assert float(traced) == pytest.approx(float(schedule(600)), rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"rate": -1.0}, {"rate": np.inf}, {"rate": np.nan}, {"second": 1.1},
              {"second": -0.1}, {"warmup": -1}, {"warmup": 51}, {"weight_decay": -0.1},
              {"weight_decay": np.nan}, {"second": np.nan}]
)  # fmt: skip
def test_impossible_settings_are_told(wrong):
    with pytest.raises(BitnetError, match=f"two_stage: {next(iter(wrong))}"):
        two_stage(**{"rate": 1e-3, "steps": 100, **wrong})
