"""Attention against the formula in float64, and against JAX's own, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from bitnet_jax.models.attention import _by_xla, attend, attend_cache
from bitnet_jax.ops import attention as native

from .battery import run_python

VARIANTS = native.variants()
needs_native = pytest.mark.skipif(not VARIANTS, reason=native.status())
each_isa = pytest.mark.parametrize("isa", VARIANTS)
# Fewer than 16 queries are XLA's everywhere, more are the op's where there is one.
LENGTHS = pytest.mark.parametrize("length", [5, 50])


def inputs(heads=4, kv_heads=2, length=5, keys=7, size=6):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, size), (2, keys, kv_heads, size), (2, keys, kv_heads, size)]
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def causal(length, keys):
    seen = np.arange(keys) <= np.arange(length)[:, None] + 1
    seen[3:4] = False  # a token that sees nobody gives 0
    return seen


def formula(query, key, value, seen, g=None):
    """Head by head, in float64: y, and with a gradient of it also those of query, key and value."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, size = query.shape
    share = heads // key.shape[2]
    seen = np.broadcast_to(seen, (batch, heads, length, key.shape[1]))
    y, dq, dk, dv = (np.zeros(x.shape) for x in (query, query, key, value))
    for b, h in np.ndindex(batch, heads):
        q, k, v = query[b, :, h], key[b, :, h // share], value[b, :, h // share]
        s = np.where(seen[b, h], q @ k.T / np.sqrt(size), -np.inf)
        w = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e30))
        w /= np.maximum(w.sum(-1, keepdims=True), 1e-300)
        y[b, :, h] = w @ v
        if g is not None:
            dw = g[b, :, h] @ v.T
            ds = w * (dw - (w * dw).sum(-1, keepdims=True)) / np.sqrt(size)
            dq[b, :, h] = ds @ k
            dk[b, :, h // share] += ds.T @ q
            dv[b, :, h // share] += w.T @ g[b, :, h]
    return y if g is None else (y, dq, dk, dv)


@LENGTHS
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_the_formula(heads, kv_heads, length):
    q, k, v = inputs(heads, kv_heads, length)
    seen = causal(length, 7)
    assert_allclose(attend(q, k, v, seen), formula(q, k, v, seen), atol=1e-6)
    assert_allclose(attend(q, k, v), formula(q, k, v, True), atol=1e-6)


@LENGTHS
def test_gradients_are_those_of_jax(length):
    q, k, v = inputs(length=length)
    seen = jnp.asarray(causal(length, 7) | (np.arange(7) == 0))
    mine = lambda q, k, v: (attend(q, k, v, seen) ** 2).sum()
    theirs = lambda q, k, v: (
        jax.nn.dot_product_attention(q, k, v, mask=seen[None, None]) ** 2
    ).sum()
    for a, b in zip(*(jax.grad(f, (0, 1, 2))(q, k, v) for f in (mine, theirs))):
        assert_allclose(a, b, atol=1e-5)


def some_mask(data, heads, length, keys):
    # Which axes of the mask are as long as their own; the others are 1.
    axes = [n if data.draw(st.booleans()) else 1 for n in (2, heads, length, keys)]
    seen = np.random.default_rng(1).random(axes) < data.draw(st.sampled_from([0.1, 0.9]))
    return seen & causal(length, keys) if data.draw(st.booleans()) else seen


@each_isa
@settings(max_examples=25)
@given(st.data())
def test_the_op_on_any_shape(isa, data):
    draw = lambda least, most: data.draw(st.integers(least, most))
    groups, share = draw(1, 2), draw(1, 2)
    length, keys, size = draw(1, 110), draw(1, 140), draw(1, 70)
    q, k, v = inputs(groups * share, groups, length, keys, size)
    seen = some_mask(data, groups * share, length, keys)
    g = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    y, log_sum = native.forward(q, k, v, seen, isa=isa)
    found = y, *native.backward(q, k, v, seen, y, log_sum, g, isa=isa)
    for a, b in zip(found, formula(q, k, v, seen, g)):
        assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def as_a_cache(key, value):
    return key.transpose(0, 2, 3, 1).copy(), value.transpose(0, 2, 1, 3).copy()


@each_isa
@settings(max_examples=25)
@given(st.data())
def test_the_op_on_any_cache(isa, data):
    """Longer than the 1,024 keys that are read at a time, too."""
    draw = lambda least, most: data.draw(st.integers(least, most))
    groups, share = draw(1, 2), draw(1, 3)
    length, size = draw(1, 15), draw(1, 70)
    keys = data.draw(st.sampled_from([1, 7, 60, 1023, 1025, 2100]))
    q, k, v = inputs(groups * share, groups, length, keys, size)
    seen = some_mask(data, groups * share, length, keys)
    y = native.cached(q, *as_a_cache(k, v), seen, isa=isa)
    wanted = formula(q, k, v, seen)
    assert_allclose(y, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


@needs_native
def test_what_no_query_sees_of_a_cache_is_not_read():
    q, k, v = inputs(length=3, keys=300)
    key, value = as_a_cache(k, v)
    seen = np.arange(300)[None, None, None] < 100
    key[..., 100:] = value[:, :, 100:] = np.nan
    assert_allclose(attend_cache(q, key, value, seen), formula(q, k, v, seen), atol=1e-5)


@LENGTHS
def test_from_a_cache_it_is_the_same_attention(length):
    """Where the op serves, and where it does not; with gradients, of second order too, and vmap."""
    q, k, v = inputs(length=length)
    seen = jnp.asarray(causal(length, 7) | (np.arange(7) == 0))
    key, value = as_a_cache(k, v)
    mine = lambda q, k, v: (attend_cache(q, k, v, seen) ** 2).sum()
    theirs = lambda q, k, v: (
        _by_xla(q, k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3), seen) ** 2
    ).sum()
    assert_allclose(attend_cache(q, key, value, seen), formula(q, k, v, seen), atol=1e-6)
    found = [jax.jit(jax.grad(f, (0, 1, 2)))(q, key, value) for f in (mine, theirs)]
    for a, b in zip(*found):
        assert_allclose(a, b, atol=1e-5)
    second = lambda f: jax.grad(lambda q: jax.grad(f)(q, key, value).sum())(q)
    assert_allclose(second(mine), second(theirs), atol=1e-3)
    one = lambda q, k, v: attend_cache(q[None], k[None], v[None], seen)[0]
    assert_allclose(jax.vmap(one)(q, key, value), attend_cache(q, key, value, seen), atol=1e-6)


@each_isa
def test_what_is_not_a_number_stays_none(isa):
    q, k, v = inputs(length=20)
    seen = np.ones((1, 1, 1, 1), bool)
    for operand in range(3):
        wrong = [x.copy() for x in (q, k, v)]
        wrong[operand][1, 2, 0, 3] = np.nan
        y, log_sum = native.forward(*wrong, seen, isa=isa)
        assert np.isfinite(y[0]).all()
        reached = y[1, 2, 0] if operand == 0 else y[1, :, :2] if operand == 1 else y[1, :, :2, 3]
        assert np.isnan(reached).all()
        dq, _, dv = native.backward(*wrong, seen, y, log_sum, np.ones_like(q), isa=isa)
        assert np.isnan(dq[1]).any() and np.isfinite(dq[0]).all() and np.isfinite(dv[0]).all()


@LENGTHS
def test_large_scores_do_not_overflow_and_bfloat16_stays(length):
    q, k, v = inputs(length=length)
    assert np.isfinite(attend(1e3 * q, 1e3 * k, v)).all()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    y = attend(*half)
    assert y.dtype == jnp.bfloat16
    assert_allclose(y.astype(jnp.float32), attend(q, k, v), atol=0.05)


def test_a_mask_that_does_not_fit_is_refused():
    for length in (5, 50):
        with pytest.raises((ValueError, TypeError), match="[Ii]ncompatible|broadcast"):
            attend(*inputs(length=length), jnp.ones((length, 9), bool))


@needs_native
@pytest.mark.parametrize(
    "length, keys, dtype", [(15, 9, "float32"), (20, 1300, "float32"), (20, 9, "bfloat16")]
)
def test_what_the_op_leaves_to_xla(length, keys, dtype):
    few = [jnp.asarray(x, dtype) for x in inputs(length=length, keys=keys)]
    assert not native.serves(*few)
    assert native.serves(*inputs(length=21, keys=1300))


@needs_native
def test_every_transformation_has_the_op():
    q, k, v = inputs(length=20)
    seen = jnp.asarray(causal(20, 7))
    loss = lambda q, k, v: (jnp.cos(attend(q, k, v, seen))).sum()
    gradients = jax.grad(loss, (0, 1, 2))
    expected = gradients(q, k, v)
    assert "bitnet_attention_gradients" in jax.jit(gradients).lower(q, k, v).as_text()
    remat = jax.grad(jax.checkpoint(loss), (0, 1, 2))
    added = lambda *a: jax.lax.scan(lambda c, _: (c + loss(*a), ()), 0.0, length=1)[0]
    scan = jax.grad(added, (0, 1, 2))
    for f in (jax.jit(gradients), jax.jit(remat), jax.jit(scan)):
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), f(q, k, v), expected)
    each = jax.vmap(gradients, (0, None, None))(jnp.stack([q, 2 * q]), k, v)
    jax.tree.map(lambda a, b: assert_allclose(a[0], b, atol=1e-6), each, expected)
    assert jax.eval_shape(gradients, q, k, v)[1].shape == k.shape
    elsewhere = jax.jit(gradients).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert "bitnet_attention" not in elsewhere and "dot_general" in elsewhere


@needs_native
def test_derivatives_of_second_order():
    q, k, v = inputs(length=20)
    seen = jnp.asarray(causal(20, 7))

    def second(attend):
        loss = lambda a: (jnp.cos(attend(*a, seen))).sum()
        change = jax.tree.map(jnp.ones_like, (q, k, v))
        along = lambda a: sum(g.sum() for g in jax.grad(loss)(a))
        return jax.grad(along)((q, k, v)), jax.jvp(jax.grad(loss), ((q, k, v),), (change,))[1]

    for a, b in zip(jax.tree.leaves(second(attend)), jax.tree.leaves(second(_by_xla))):
        assert_allclose(a, b, atol=1e-4)


@needs_native
def test_sharded_over_two_devices():
    run_python(
        """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from bitnet_jax.models.attention import attend
random = np.random.default_rng(0)
operands = [random.standard_normal((4, 20, 2, 6)).astype(np.float32) for _ in range(3)]
gradients = jax.grad(lambda *a: np.pi * (attend(*a) ** 2).sum(), (0, 1, 2))
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
shards = jax.shard_map(gradients, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
found = [jax.jit(shards)(*operands)]
explicit = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
with jax.set_mesh(explicit):
    found.append(jax.jit(gradients)(*jax.device_put(operands, jax.NamedSharding(explicit, P("d")))))
for f in found:
    for a, b in zip(f, gradients(*operands)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
""",
        devices=2,
    )
