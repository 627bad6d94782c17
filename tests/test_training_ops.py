"""The products of a training step: exact where they are integers, close where they are not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import Scheme, dot_general
from bitnet_jax.dot import accumulate
from bitnet_jax.leaf import Int8
from bitnet_jax.ops import choose_dense, training

from .battery import normal, quantize, run_python, ste_matmul, sums_in_turns

VARIANTS = training.variants()
needs_native = pytest.mark.skipif(not VARIANTS, reason=training.status())
each_isa = pytest.mark.parametrize("isa", VARIANTS)
MATMUL = (((1,), (0,)), ((), ()))
CHOOSE = sys.modules["bitnet_jax.ops.choose"]  # the package's own name for it is the function


def draw(seed, *shape, low=-128, high=128):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int8)


def product(x, codes):
    return x.astype(np.int32) @ codes.astype(np.int32)


@each_isa
@settings(max_examples=12)
@given(
    st.integers(1, 70), st.integers(1, 300), st.integers(1, 150), st.integers(0, 99), st.booleans()
)
def test_ternary_product_of_any_shape(isa, rows, k, n, seed, transposed):
    x, codes = draw(seed, rows, k), draw(seed + 1, k, n, low=-1, high=2)
    lies = np.ascontiguousarray(codes.T) if transposed else codes
    run = lambda x: training.ternary_product(jnp.asarray(x), lies, transposed=transposed, isa=isa)
    assert_array_equal(run(x), product(x, codes))
    # Integers below 2 ** 24 are exact in float32, in whatever order they are added.
    assert_array_equal(run(x.astype(np.float32)), product(x, codes))


@each_isa
@pytest.mark.parametrize("value", [-128, 127])
def test_ternary_product_does_not_overflow(isa, value):
    x, codes = np.full((33, 4100), value, np.int8), np.ones((4100, 5), np.int8)
    assert_array_equal(training.ternary_product(x, codes, isa=isa), product(x, codes))


@each_isa
@pytest.mark.parametrize("rows", [9, 40])
def test_ternary_product_of_sums_that_run_up_after_a_while(isa, rows):
    x, codes = sums_in_turns(rows, rows, 4100, 37)
    assert_array_equal(training.ternary_product(x, codes, isa=isa), product(x, codes))


@each_isa
def test_ternary_product_of_floats(isa):
    x, codes = normal(0, 40, 333), draw(1, 333, 50, low=-1, high=2)
    out = training.ternary_product(x, codes, isa=isa)
    assert_allclose(out, np.asarray(x, np.float64) @ codes, rtol=1e-5, atol=1e-5)


@each_isa
def test_damaged_codes_count_by_their_sign(isa):
    x, codes = draw(2, 9, 30), draw(3, 30, 20)
    out = training.ternary_product(x, codes, isa=isa)
    assert_array_equal(out, product(x, np.sign(codes)))


def sixteen_bits(codes, scale, g):
    """The equation of `grad_weight`, in float64 but for what is rounded."""
    out = 0
    for i in range(0, len(g), 512):
        h = g[i : i + 512] * scale[i : i + 512, None]
        unit = np.abs(h).max(0) / np.float32(32767)
        steps = np.round(h * np.where(unit > 0, np.float32(1) / np.where(unit > 0, unit, 1), 0))
        out = out + codes[i : i + 512].astype(np.float64).T @ steps.astype(np.float64) * unit
    return out


@each_isa
@pytest.mark.parametrize("rows, k, n", [(1, 1, 1), (7, 13, 5), (64, 24, 32), (1100, 37, 50)])
def test_grad_weight(isa, rows, k, n):
    codes, scale = draw(4, rows, k), np.abs(np.asarray(normal(5, rows)))
    g = np.asarray(normal(6, rows, n))
    out = training.grad_weight(codes, scale, g, isa=isa)
    expected = sixteen_bits(codes, scale, g)
    assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    exact = (codes * scale[:, None]).T.astype(np.float64) @ g
    assert np.abs(out - exact).max() <= 1e-4 * np.abs(exact).max()


@each_isa
@pytest.mark.parametrize("value", [-128, 127])
def test_grad_weight_does_not_overflow(isa, value):
    rows = 1025
    codes, g = np.full((rows, 7), value, np.int8), np.full((rows, 17), -3, np.float32)
    out = training.grad_weight(codes, np.ones(rows, np.float32), g, isa=isa)
    assert_allclose(out, np.full((7, 17), -3.0 * value * rows), rtol=1e-4)


@each_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(isa, value):
    g = np.ones((20, 20), np.float32)
    g[3, 5] = value
    out = training.grad_weight(draw(7, 20, 4), np.ones(20, np.float32), g, isa=isa)
    assert np.isnan(out[:, 5]).all() and np.isfinite(np.delete(out, 5, 1)).all()


@each_isa
def test_gradients_of_zero_and_tiny_ones(isa):
    codes, scale = draw(8, 20, 4), np.ones(20, np.float32)
    for size in (0.0, 1e-38, 1e30):
        g = np.asarray(normal(9, 20, 3)) * np.float32(size)
        out = training.grad_weight(codes, scale, g, isa=isa)
        exact = codes.astype(np.float64).T @ g.astype(np.float64)
        assert np.abs(out - exact).max() <= 1e-4 * np.abs(exact).max() + 1e-33


@needs_native
def test_nothing_to_multiply():
    assert training.ternary_product(jnp.zeros((0, 5), jnp.int8), draw(0, 5, 3)).shape == (0, 3)
    out = training.ternary_product(jnp.zeros((2, 0), jnp.int8), jnp.zeros((0, 3), jnp.int8))
    assert_array_equal(out, np.zeros((2, 3)))
    out = training.grad_weight(jnp.zeros((0, 2), jnp.int8), jnp.zeros(0), jnp.zeros((0, 3)))
    assert_array_equal(out, np.zeros((2, 3)))


@needs_native
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(axes):
    x, codes = draw(10, 3, 2, 45), draw(11, 3, 45, 21, low=-1, high=2)
    pick = [a if axis == 0 else a[1] for a, axis in zip((x, codes), axes)]
    out = jax.jit(jax.vmap(training.ternary_product, axes))(*pick)
    assert_array_equal(out, product(*pick))
    scale, g = np.ones((3, 2), np.float32), normal(12, 3, 2, 7)
    weight = jax.vmap(training.grad_weight, (axes[0], None, axes[1]))
    pick = [a if axis == 0 else a[1] for a, axis in zip((x, g), axes)]
    each = [
        training.grad_weight(*(a if a.ndim == 2 else a[i] for a in pick[:1]), scale[0],
                             *(a if a.ndim == 2 else a[i] for a in pick[1:]))
        for i in range(3)
    ]  # fmt: skip
    assert_array_equal(jax.jit(weight)(pick[0], scale[0], pick[1]), each)


@needs_native
def test_sharded_over_two_devices():
    run_python(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from bitnet_jax import dot_general
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
random = np.random.default_rng(0)
x, w = (random.standard_normal(s).astype(np.float32) for s in ((40, 70), (70, 60)))
def loss(x, w, op, precision=None):
    return jnp.cos(dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, op=op)).sum()
def step(x, w):
    w = jax.lax.pcast(w, "d", to="varying")
    dx, dw = jax.grad(loss, (0, 1))(x, w, "native", "high")
    return dx, jax.lax.psum(dw, "d")
shards = jax.shard_map(step, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
for a, b in zip(jax.jit(shards)(x, w), jax.grad(loss, (0, 1))(x, w, "xla")):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)
""",
        devices=2,
    )


def gradients(x, w, g, scheme, op, precision=None):
    f = lambda x, w: dot_general(x, w, MATMUL, precision, scheme=scheme, op=op)
    y, vjp = jax.vjp(f, x, w)
    return y, *vjp(g)


SCHEMES = [Scheme(), Scheme("twn", "channel"), Scheme("twn", 16)]


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_both_forms_of_a_layer_agree(scheme):
    """The forward pass to the bit, gradients to float rounding."""
    x, w, g = normal(13, 40, 70), normal(14, 70, 33), normal(15, 40, 33)
    xla, native = (gradients(x, w, g, scheme, op) for op in ("xla", "native"))
    assert_array_equal(native[0], xla[0])
    assert_allclose(native[1], xla[1], rtol=1e-5, atol=1e-5)
    assert_allclose(native[2], xla[2], rtol=1e-5, atol=1e-5)
    high = gradients(x, w, g, scheme, "native", "high")
    assert_array_equal(high[0], xla[0])
    assert_array_equal(high[1], native[1])
    assert np.abs(high[2] - xla[2]).max() > 1e-6 * np.abs(xla[2]).max()
    assert np.abs(high[2] - xla[2]).max() <= 1e-4 * np.abs(xla[2]).max()


@needs_native
def test_accumulators_of_groups_and_stacks_agree():
    x, w = draw(16, 3, 2, 5, 26), normal(17, 3, 26, 9)
    for scheme in SCHEMES:
        weight = quantize(w, scheme)
        xla, native = (accumulate(jnp.asarray(x), weight, 1, op) for op in ("xla", "native"))
        assert_array_equal(xla, native)


def test_int8_codes_are_not_taken_for_ternary_ones():
    x, w = draw(18, 40, 70), Int8(jnp.asarray(draw(19, 70, 33)), jnp.ones((1, 1)))
    out = accumulate(jnp.asarray(x), w, 0, "native")
    assert_array_equal(out[0], product(x, np.asarray(w.codes)))


@needs_native
@pytest.mark.parametrize("amx", [False, True])
def test_the_default_reaches_the_native_form_where_it_is_chosen(monkeypatch, amx):
    monkeypatch.setattr(CHOOSE, "matrix_units", lambda: amx)
    if amx:
        monkeypatch.setattr(training, "variants", lambda: ("avx512vnni",))
    rows = 96 if amx else 64  # a product is traced once a shape
    x, w = normal(20, rows, 128), normal(21, 128, 128)
    step = jax.jit(jax.value_and_grad(lambda x, w: dot_general(x, w, MATMUL).sum(), (0, 1)))
    assert step.lower(x, w).as_text().count("bitnet_ternary_product") == (1 if amx else 2)
    _, (dx, dw) = step(x, w)
    want = jax.grad(lambda x, w: ste_matmul(x, w, Scheme()).sum(), (0, 1))(x, w)
    assert_allclose(dx, want[0], rtol=1e-4, atol=1e-4)
    assert_allclose(dw, want[1], rtol=1e-4, atol=1e-4)


def test_the_table_of_choices(monkeypatch):
    monkeypatch.setattr(CHOOSE, "matrix_units", lambda: False)
    here = "native" if VARIANTS else "xla"
    assert choose_dense("cpu", 1024, 384, 384) == here
    assert choose_dense("cpu", 1, 384, 384) == choose_dense("cuda", 1024, 384, 384) == "xla"
    monkeypatch.setattr(CHOOSE, "matrix_units", lambda: True)
    assert choose_dense("cpu", 1024, 384, 384) == "xla"
    monkeypatch.setattr(training, "variants", lambda: ("avx512vnni", "avx2", "portable"))  # AMX
    chosen = [choose_dense("cpu", 1024, 384, 384, t) for t in ("int8", "bfloat16", jnp.float32)]
    assert chosen == ["xla", "xla", "native"]
    monkeypatch.setattr(training, "variants", lambda: ("portable",))  # ARM
    assert choose_dense("cpu", 1024, 384, 384, "float32") == "xla"


@pytest.mark.parametrize("isa", [None, "mmx"])
def test_wrong_shapes_and_variants(isa):
    with pytest.raises((ValueError, RuntimeError)):
        training.ternary_product(
            jnp.zeros((2, 3), jnp.int8), draw(0, 4 - (isa == "mmx"), 2), isa=isa
        )
    with pytest.raises((ValueError, RuntimeError)):
        training.grad_weight(draw(0, 4, 2), jnp.ones(3 + (isa == "mmx")), jnp.ones((4, 2)), isa=isa)
