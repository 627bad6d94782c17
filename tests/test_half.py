"""Scales whose products with the codes are exact in float16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax import Scheme, dequantize, quantize_weights
from bitnet_jax.half import exact_in_half

SCHEMES = [
    Scheme("absmean"), Scheme("twn", "channel"), Scheme("threshold", 8), Scheme("twn", "row"),
    Scheme("int8", "channel"), Scheme("int8", "row"), Scheme("int4", 8), Scheme("int4", "row"),
]  # fmt: skip


def exact(w: jax.Array, scheme: Scheme):
    return exact_in_half({"w": quantize_weights(w, scheme)}, {"w": w})["w"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([1e-4, 0.02, 1.0, 300.0]))
@settings(max_examples=8, deadline=None)
def test_values_are_float16(scheme, seed, size):
    w = size * jax.random.normal(jax.random.key(seed), (20, 6))
    values = np.asarray(dequantize(exact(w, scheme)))
    np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_little_is_lost(scheme):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    noise = lambda q: float(jnp.sum((w - dequantize(q)) ** 2) / jnp.sum(w**2))
    # int8 keeps 4 significant bits of its scale: up to 1/8 of the largest weights is cut off.
    allowed = 5e-3 if scheme.rule == "int8" else 1.01 * noise(quantize_weights(w, scheme)) + 1e-4
    assert noise(exact(w, scheme)) < allowed


@pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES if s.rule in ("twn", "int8", "int4")], ids=str
)
def test_quantising_the_values_again_gives_the_same(scheme):
    first = exact(jax.random.normal(jax.random.key(1), (48, 16)), scheme)
    again = exact(dequantize(first), scheme)
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(first.scale, again.scale)


def test_ternary_codes_are_kept_and_scales_are_the_nearest():
    w = jax.random.normal(jax.random.key(2), (32, 8))
    before, after = quantize_weights(w, SCHEMES[1]), exact(w, SCHEMES[1])
    np.testing.assert_array_equal(before.codes, after.codes)
    np.testing.assert_array_equal(after.scale, before.scale.astype(np.float16).astype(np.float32))


def test_other_leaves_and_zeros():
    tree = {"norm": jnp.ones(3), "w": quantize_weights(jnp.zeros((4, 2)), SCHEMES[4])}
    found = exact_in_half(tree, {"norm": jnp.ones(3), "w": jnp.zeros((4, 2))})
    assert found["norm"] is tree["norm"]
    assert not np.asarray(found["w"].codes).any() and np.isfinite(found["w"].scale).all()
