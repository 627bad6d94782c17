"""Attention against the formula in float64, and against JAX's own, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models.attention import attend


def inputs(heads=4, kv_heads=2, length=5, keys=7, size=6):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, size), (2, keys, kv_heads, size), (2, keys, kv_heads, size)]
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def formula(query, key, value, seen):
    """Head by head, token by token, in float64."""
    out = np.zeros(query.shape)
    share = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(query.shape[:3]):
        at = np.flatnonzero(seen[i])
        if not len(at):
            continue
        k, v = (x[b, at, h // share].astype(np.float64) for x in (key, value))
        s = k @ query[b, i, h].astype(np.float64) / np.sqrt(query.shape[-1])
        w = np.exp(s - s.max())
        out[b, i, h] = w @ v / w.sum()
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_the_formula(heads, kv_heads):
    q, k, v = inputs(heads, kv_heads)
    seen = np.arange(7) <= np.arange(5)[:, None] + 1
    seen[3] = False  # a token that sees nobody gives 0
    np.testing.assert_allclose(attend(q, k, v, seen), formula(q, k, v, seen), atol=1e-6)
    everyone = np.ones((5, 7), bool)
    np.testing.assert_allclose(attend(q, k, v), formula(q, k, v, everyone), atol=1e-6)


def test_gradients_are_those_of_jax():
    q, k, v = inputs()
    seen = np.arange(7) <= np.arange(5)[:, None] + 1
    mine = lambda q, k, v: (attend(q, k, v, seen) ** 2).sum()
    theirs = lambda q, k, v: (
        jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(seen)[None, None]) ** 2
    ).sum()
    for a, b in zip(*(jax.grad(f, (0, 1, 2))(q, k, v) for f in (mine, theirs))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_large_scores_do_not_overflow_and_bfloat16_stays():
    q, k, v = inputs()
    assert np.isfinite(attend(1e3 * q, 1e3 * k, v)).all()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    y = attend(*half)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), attend(q, k, v), atol=0.05)
