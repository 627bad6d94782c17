import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import Scheme, quantize_weights
from bitnet_jax.quantize import dequantize
from bitnet_jax.reconstruct import (
    _upper_of_inverse,
    corrected,
    damped,
    output_error,
    reconstruct,
)


def problem(size, out, tokens=256, seed=0):
    """Inputs that are alike, as those of a network are, and a matrix."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(size) + 0.4 * rng.standard_normal((size, size)) / size**0.5 * 4
    x = rng.standard_normal((tokens, size)) @ mixing
    w = rng.standard_normal((size, out)) * size**-0.5
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("size, out", [(1, 1), (50, 8)])
@pytest.mark.parametrize("scheme", [
    Scheme("twn", "channel"), Scheme("twn", "tensor"), Scheme("twn", 16), Scheme("absmean"),
    Scheme("threshold", "channel"), Scheme("sherry", 16), Scheme("int4", 16),
], ids=str)  # fmt: skip
def test_every_round_lowers_the_error(size, out, scheme):
    x, w = problem(size, out)
    gram = damped(x.T @ x)
    errors = [
        float(output_error(w, gram, weight).sum())
        for weight in (
            quantize_weights(w, scheme),
            *(reconstruct(w, gram, scheme, rounds) for rounds in (0, 1, 3, 8)),
        )
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors)), errors
    if size > 1:
        assert errors[-1] < 0.8 * errors[0]


def test_the_error_is_that_of_the_outputs():
    x, w = problem(40, 6)
    weight = reconstruct(w, damped(x.T @ x), rounds=2)
    difference = np.asarray(x, np.float64) @ np.asarray(w - dequantize(weight), np.float64)
    np.testing.assert_allclose(output_error(w, x.T @ x, weight), (difference**2).sum(0), rtol=1e-3)


def test_near_the_best_of_all_codes():
    """Against every one of 3^6 codes with its best scale; rounding alone is far from it."""
    x, w = problem(6, 60)
    gram = damped(x.T @ x)
    codes = np.array(list(itertools.product([-1, 0, 1], repeat=6)), np.float64)
    h, t = np.asarray(gram, np.float64), np.asarray(w, np.float64)
    fit, size = codes @ h @ t, np.einsum("ni,ij,nj->n", codes, h, codes)[:, None]
    gain = np.where(size > 0, np.maximum(fit, 0) ** 2 / np.where(size > 0, size, 1), 0)
    best = (np.einsum("io,ij,jo->o", t, h, t) - gain.max(0)).sum()
    found = float(output_error(w, gram, reconstruct(w, gram, rounds=8)).sum())
    rounded = float(output_error(w, gram, quantize_weights(w, Scheme("twn", "channel"))).sum())
    assert best * (1 - 1e-4) <= found < 1.5 * best
    assert rounded > 1.5 * found


def test_scales_are_least_squares():
    x, w = problem(48, 6)
    gram = damped(x.T @ x)
    weight = reconstruct(w, gram, Scheme("twn", "channel"), rounds=3)
    q, h = np.asarray(weight.codes, np.float64), np.asarray(gram, np.float64)
    wanted = np.einsum("io,ij,jo->o", q, h, np.asarray(w, np.float64))
    wanted /= np.einsum("io,ij,jo->o", q, h, q)
    np.testing.assert_allclose(weight.scale[0], wanted, rtol=1e-4)


def test_three_of_four_stay_three_of_four():
    x, w = problem(64, 8)
    weight = reconstruct(w, damped(x.T @ x), Scheme("sherry", "channel"))
    zeros = np.asarray(weight.codes).reshape(-1, 4, 8) == 0
    assert (zeros.sum(1) == 1).all()


def test_the_corrected_matrix_is_the_least_squares_one():
    """Inputs that lost something: T makes X' T closest to X W, against float64 lstsq."""
    x, w = problem(20, 5)
    changed = x + 0.3 * jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    target = corrected(w, changed.T @ changed, changed.T @ x, share=1e-6)
    wanted, *_ = np.linalg.lstsq(
        np.asarray(changed, np.float64), np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    )
    np.testing.assert_allclose(target, wanted, atol=2e-3)


def test_inputs_that_are_always_zero_do_no_harm():
    x, w = problem(10, 4)
    x = x.at[:, 3:].set(0)
    weight = reconstruct(w, damped(x.T @ x))
    assert bool(jnp.isfinite(weight.scale).all())
    assert bool((weight.scale > 0).all())
    nothing = reconstruct(w, damped(0 * x.T @ x))
    assert bool(jnp.isfinite(nothing.scale).all())


@pytest.mark.parametrize("size", [1, 7, 96])
def test_the_factor_of_the_inverse(size):
    x, _ = problem(size, 1)
    h = damped(x.T @ x)
    upper = np.asarray(_upper_of_inverse(h), np.float64)
    assert not np.tril(upper, -1).any() and (np.diag(upper) > 0).all()
    inverse = np.linalg.inv(np.asarray(h, np.float64))
    np.testing.assert_allclose(upper.T @ upper, inverse, atol=1e-5 * np.abs(inverse).max())
