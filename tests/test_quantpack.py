"""Quantising and packing in one go: the same bits as one after the other, by every way there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bitnet_jax import Scheme, quantize_activations
from bitnet_jax.ops import quantise
from bitnet_jax.packed import pack_weight
from bitnet_jax.quantize import _by_xla, codes_by_cut, cut_of, quantize_kernel
from bitnet_jax.quantpack import quantize_packed
from bitnet_jax.reduce import LARGE, abs_sum, over, over_outputs

from .battery import normal, run_python

needs_native = pytest.mark.skipif(not quantise.available(), reason=quantise.status())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert_array_equal(x, y)


@needs_native
@pytest.mark.parametrize("rule", ["absmean", "threshold", "twn"])
@pytest.mark.parametrize(
    ("shape", "scale", "inputs", "dtype"),
    [
        ((301, 222), "tensor", None, "float32"),
        ((1027, 130), "channel", None, "float32"),
        ((514, 130), 64, None, "bfloat16"),
        ((301, 222), 7, None, "float32"),  # groups share bytes
        ((2, 301, 112), 50, None, "float32"),
        ((1001, 2, 64), "channel", 1, "float32"),
    ],
)
def test_the_native_op_has_the_bits_of_xla(rule, shape, scale, inputs, dtype):
    w, scheme = normal(0, *shape).astype(dtype), Scheme(rule, scale)
    assert w.size >= LARGE
    plain = jax.jit(lambda w: pack_weight(quantize_kernel(w, scheme, inputs)))(w)
    same(jax.jit(lambda w: quantize_packed(w, scheme, inputs))(w), plain)


@needs_native
def test_under_vmap():
    w, scheme = normal(1, 2, 300, 222), Scheme("twn", "channel")
    same(
        jax.jit(jax.vmap(lambda w: quantize_packed(w, scheme)))(w),
        jax.jit(jax.vmap(lambda w: pack_weight(quantize_kernel(w, scheme))))(w),
    )


@pytest.mark.parametrize("scheme", [Scheme("sherry"), Scheme("int8", "row"), Scheme("twn")])
def test_what_the_native_op_is_not_for(scheme):
    w = normal(2, 12, 5)
    same(quantize_packed(w, scheme), pack_weight(quantize_kernel(w, scheme)))


@given(st.floats(2**-16, 2**16, width=32), st.integers(-3, 3))
def test_the_cut_is_where_rounding_turns(mean, steps):
    mean = np.float32(mean)
    w = np.float32(0.5) * mean
    for _ in range(abs(steps)):
        w = np.nextafter(w, np.float32(np.sign(steps) * np.inf))
    w = np.array([w, -w, 3 * w, 0], np.float32)
    rounded = np.clip(np.round(w / mean), -1, 1)
    with jax.disable_jit():
        cut = cut_of(jnp.asarray(mean), Scheme())
    assert_array_equal(codes_by_cut(w, np.asarray(cut)), rounded)


@pytest.mark.parametrize("shape", [(1, 1000, 70), (3, 50, 500)])
def test_sums_are_taken_in_the_order_of_the_inputs(shape):
    w = np.abs(np.asarray(normal(3, *shape)))
    (found,) = jax.jit(lambda w: over(lambda x: (x,), jnp.add, w, (-2,)))(w)
    assert_array_equal(found, np.add.accumulate(w, axis=-2)[..., -1, :])
    (most,) = jax.jit(lambda w: over(lambda x: (x,), jnp.maximum, w, (-2, -1)))(w)
    assert_array_equal(most, w.max((-2, -1)))
    if quantise.available():
        flat = w.reshape(-1, shape[-1])
        sums = jax.jit(quantise.sums, static_argnums=1)
        assert_array_equal(sums(flat, shape[1]), found)
        assert_array_equal(jax.vmap(lambda w: sums(w, shape[1]))(w)[:, 0], found)
    for axes in ((-2,), (-2, -1)):  # in C++ where there is a compiler, beside the loops
        (loops,) = jax.jit(lambda w, axes=axes: over(lambda x: (x,), jnp.add, w, axes))(w)
        assert_array_equal(jax.jit(lambda w, axes=axes: abs_sum(-w, axes))(w), loops)


def test_a_nan_stays_in_its_own_sums():
    w = np.abs(np.asarray(normal(6, 1, 1000, 70)))
    w[0, 0, 3] = np.nan
    kept = lambda x: (jnp.where(x > 0, x, 0), (x > 0).astype(jnp.float32))
    found = jax.jit(lambda w: over(kept, jnp.add, w, (-2,)))(w)
    for a, b in zip(found, kept(w)):
        assert_array_equal(a, np.add.accumulate(np.asarray(b), axis=-2)[..., -1, :])


@needs_native
@pytest.mark.parametrize("outputs", [1, 333])
def test_codes_of_a_cut(outputs):
    w = np.asarray(normal(9, 3, 100, 333)).copy()
    cut = np.abs(np.asarray(normal(10, 3, 1, outputs)))
    w[0, 0], w[0, 1] = cut[0], -cut[0]  # on the cut
    w[1, 2, :3] = np.nan, np.inf, -np.inf
    cut[2, 0, 0] = np.nan
    expected = (w >= cut).astype(np.int8) - (w <= -cut)
    assert_array_equal(quantise.signs(w, cut), expected)
    assert_array_equal(jax.vmap(quantise.signs)(w[:, None], cut[:, None])[:, 0], expected)
    scheme = Scheme(scale="tensor" if outputs == 1 else "channel")
    found = quantize_kernel(w[0], scheme)
    cut = cut_of(found.scale, scheme)
    assert_array_equal(found.codes, (w[0] >= cut).astype(np.int8) - (w[0] <= -cut))


@needs_native
@pytest.mark.parametrize("shape", [(512, 40), (3, 100, 333), (1, 16384)])
def test_activations_have_the_bits_of_xla(shape):
    """Rows of all sizes, ties, infinities; by themselves, under vmap, and under grad."""
    x = np.asarray(normal(7, *shape)) * np.exp(30 * np.asarray(normal(8, *shape[:-1], 1)))
    x[0] = np.round(2 * x[0]) / 2
    x.flat[-40] = np.inf
    if shape[0] > 4:
        x[1], x[2, 3], x[4] = 0, -np.inf, 127 * np.sign(x[4])
    plain, ours = jax.jit(_by_xla), jax.jit(quantize_activations)
    same(ours(x), plain(x))
    assert "bitnet_codes" in ours.lower(x).as_text()
    assert "bitnet_codes" not in ours.lower(x[(slice(1),) * x.ndim]).as_text()
    stack = np.stack([x, -x])
    same(jax.jit(jax.vmap(quantize_activations))(stack), plain(stack))
    grad = lambda f: jax.jit(jax.grad(lambda x: f(x)[1].sum()))(normal(9, *shape))
    assert_array_equal(grad(quantize_activations), grad(_by_xla))
    x.flat[-1] = np.nan  # which XLA's maximum may lose
    assert_array_equal(np.isnan(ours(x)[1]).ravel(), np.isnan(x).any(-1).ravel())


def test_outputs_are_added_half_by_half():
    x = np.asarray(normal(4, 1, 13))
    y = x
    while y.size > 1:
        h = y.shape[1] // 2
        y = np.concatenate([y[:, :h] + y[:, h : 2 * h], y[:, 2 * h :]], 1)
    assert_array_equal(over_outputs(jnp.add, x), y)


def test_without_the_op_xla_does_it(monkeypatch):
    w, scheme = normal(5, 300, 230), Scheme("twn", "channel")
    before = quantize_packed(w, scheme)
    monkeypatch.setattr(quantise, "available", lambda: False)
    same(quantize_packed(w, scheme), before)


def test_large_weights_and_activations_on_meshes():
    """A stack over two devices has the codes and scales of one, by every way there."""
    run_python(
        """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bitnet_jax import Scheme, quantize_activations, quantize_weights
w = np.random.default_rng(0).standard_normal((2, 512, 384)).astype(np.float32)
weights = [lambda w, s=s: quantize_weights(w, s) for s in (Scheme(), Scheme("twn", "channel"))]
for f in (*weights, quantize_activations):
    want = jax.tree.leaves(jax.jit(f)(w))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
        put = jax.device_put(w, NamedSharding(mesh, P("d")))
        for way in (f, jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))):
            for a, b in zip(jax.tree.leaves(jax.jit(way)(put)), want):
                np.testing.assert_array_equal(a, b)
""",
        devices=2,
    )
