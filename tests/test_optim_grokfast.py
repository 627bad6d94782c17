"""Grokfast's two filters against the published code, and what ours add: schedules and dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bitnet_jax import BitnetError
from bitnet_jax.optim import grokfast_ema, grokfast_ma

from .battery import normal
from .optim_battery import assert_trees_close, golden, jitted

WINDOWED = sorted({k.split("/")[1] for k in golden("grokfast") if k.startswith("ma/")})


def grads(i):
    data = golden("grokfast")
    return {n: jnp.asarray(data[f"grads/{n}"][i]) for n in "wb"}


def outputs(filter, steps):
    state = filter.init(steps[0])
    for g in steps:
        out, state = jitted(filter)(g, state)
        yield out, state


@pytest.mark.parametrize("alpha, lamb", [(0.98, 2.0), (0.9, 0.5), (0.8, 5.0)])
def test_average_equals_the_published_filter(alpha, lamb):
    data = golden("grokfast")
    want = lambda kind, i: {n: data[f"ema/alpha{alpha}_lamb{lamb}/{kind}_{n}"][i] for n in "wb"}
    steps = [grads(i) for i in range(6)]
    for i, (out, state) in enumerate(outputs(grokfast_ema(alpha, lamb), steps)):
        assert_trees_close(out, want("out", i), 1e-6, 1e-6)
        assert_trees_close(state.ema, want("ema", i), 1e-6, 1e-6)


def test_the_golden_data_has_every_case_of_the_window():
    assert len(WINDOWED) == 6
    assert any("sum" in n for n in WINDOWED) and any("window100" in n for n in WINDOWED)


@pytest.mark.parametrize("case", WINDOWED)
def test_window_equals_the_published_filter(case):
    data = golden("grokfast")
    pattern = r"window(\d+)_lamb([\d.]+)_(mean|sum)_warmup(\d)_trigger(\d)"
    window, lamb, kind, warmup, trigger = re.fullmatch(pattern, case).groups()
    filter = grokfast_ma(int(window), float(lamb), kind, warmup == "1", trigger == "1")
    for i, (out, _) in enumerate(outputs(filter, [grads(i) for i in range(6)])):
        assert_trees_close(out, {n: data[f"ma/{case}/out_{n}"][i] for n in "wb"}, 1e-6, 2e-6)


def test_window_forgets_what_left_it():
    steps = [jnp.full(2, x) for x in (1e6, 1.0, 2.0, 3.0)]
    *_, (out, state) = outputs(grokfast_ma(3, 1.0), steps)
    assert_array_equal(out, jnp.full(2, 5.0))
    assert state.window.shape == (3, 2) and int(state.count) == 4


def test_trigger_may_depend_on_the_step():
    steps = [jnp.ones(1)] * 4
    filter = grokfast_ma(2, 1.0, trigger=lambda step: step == 2)
    assert [float(out[0]) for out, _ in outputs(filter, steps)] == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("arguments", [{"window": 0}, {"filter": "median"}])
def test_window_refuses_what_it_cannot_do(arguments):
    with pytest.raises(BitnetError, match="grokfast_ma: window"):
        grokfast_ma(**arguments)


SCHEDULED = {
    "ema": lambda lamb: grokfast_ema(0.5, lamb),
    "ma": lambda lamb: grokfast_ma(2, lamb, warmup=False),
}


@pytest.mark.parametrize("make", SCHEDULED.values(), ids=SCHEDULED)
def test_lambda_may_be_a_schedule(make):
    steps = [normal(seed, 3) for seed in range(3)]
    scheduled = list(outputs(make(lambda step: 1.0 * step), steps))
    for i, (out, _) in enumerate(scheduled):
        assert_trees_close(out, list(outputs(make(float(i)), steps))[i][0])


def test_alpha_may_be_a_schedule():
    *_, (_, state) = outputs(
        grokfast_ema(lambda step: 1 / (step + 1), 1.0), [jnp.full(1, x) for x in (2.0, 4.0, 7.0)]
    )
    # 2, then 2/2 + 4/2, then 3/3 + 7 * 2/3
    assert_trees_close(state.ema, jnp.array([1 + 14 / 3]))


KEPT = {
    "ema": (lambda dtype: grokfast_ema(0.5, 1.0, dtype), lambda state: state.ema),
    "ma": (lambda dtype: grokfast_ma(2, 1.0, window_dtype=dtype), lambda state: state.window),
}


@pytest.mark.parametrize("make, memory", KEPT.values(), ids=KEPT)
def test_memory_may_have_another_dtype(make, memory):
    steps = [jnp.array([1.0, 3.0])] * 2
    for out, state in outputs(make(jnp.bfloat16), steps):
        assert out.dtype == jnp.float32 and memory(state).dtype == jnp.bfloat16
    assert_array_equal(out, 2 * steps[0])
    assert {memory(s).dtype for _, s in outputs(make(None), steps)} == {np.dtype("float32")}


@pytest.mark.parametrize("make, memory", KEPT.values(), ids=KEPT)
def test_arithmetic_is_float32_for_narrow_gradients(make, memory):
    # 1 + 2^-9 is no bfloat16: an average kept in float32 sees it, one rounded at every step not.
    steps = [jnp.array([1.0], jnp.bfloat16), jnp.array([1.0 + 2**-7], jnp.bfloat16)]
    *_, (out, state) = outputs(make(jnp.float32), steps)
    assert out.dtype == jnp.bfloat16
    if isinstance(memory(state), jax.Array) and memory(state).shape == (1,):
        assert float(memory(state)[0]) == 1.0 + 2**-8
    else:
        assert memory(state).dtype == jnp.float32
