import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import (
    Scheme,
    Ternary,
    dequantize,
    quantize_activations,
    quantize_weights,
    straight_through,
)

from .battery import RULES, SCALES, SCHEMES, golden, name_of, normal, quantize

FLOOR = {"absmean": 1e-5, "threshold": 1e-8, "twn": 1e-8}
SHARE = {"threshold": 0.1, "twn": 0.7}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WEIGHTS = sorted(k.removeprefix("w/") for k in golden("weight_quant") if k.startswith("w/"))
ACTIVATIONS = sorted(k.removeprefix("x/") for k in golden("activation_quant") if k[:2] == "x/")
F32 = {"rtol": 3e-7, "atol": 0}

values_of = jax.jit(dequantize)
to_int8 = jax.jit(quantize_activations)


def reference(w, scheme):
    """Codes, scale and the relative distance of each weight from a boundary, in float64 loops."""
    w = np.asarray(w, np.float64)
    size, out = w.shape
    step = scheme.scale if isinstance(scheme.scale, int) else size
    groups = -(-size // step)
    codes, margin = np.zeros(w.shape, np.int8), np.zeros(w.shape)
    scale = np.zeros((groups, 1 if scheme.scale == "tensor" else out))
    for i in range(groups):
        for j in range(scale.shape[1]):
            at = np.s_[i * step : (i + 1) * step, slice(None) if scheme.scale == "tensor" else [j]]
            block = w[at]
            mean = max(np.abs(block).mean(), FLOOR[scheme.rule])
            if scheme.rule == "absmean":
                codes[at] = np.clip(np.round(block / mean), -1, 1)
                margin[at] = np.abs(np.abs(block) / mean - 0.5)
                scale[i, j] = mean
                continue
            limit = SHARE[scheme.rule] if scheme.threshold is None else scheme.threshold
            codes[at] = np.where(np.abs(block) < limit * mean, 0, np.sign(block))
            margin[at] = np.abs(np.abs(block) / mean - limit)
            kept = np.abs(block)[codes[at] != 0]
            twn = max(kept.mean(), FLOOR["twn"]) if kept.size else FLOOR["twn"]
            scale[i, j] = twn if scheme.rule == "twn" else mean
    return codes, scale, margin


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("threshold", ["0.1", "0.05", "0.5"])
def test_golden_weights(name, threshold):
    """0.1 is the rule's own threshold."""
    data = golden("weight_quant")
    share = None if threshold == "0.1" else float(threshold)
    weight = quantize(data[f"w/{name}"].T, Scheme("threshold", "channel", share))
    assert_array_equal(weight.codes.T, data[f"trits/{threshold}/{name}"])
    assert_allclose(weight.scale.T, data[f"scale/{name}"], **F32)
    assert_allclose(values_of(weight).T, data[f"weight_quant/{threshold}/{name}"], **F32)
    if share is None:
        assert_allclose(values_of(weight).T, data[f"dequant/{name}"], **F32)


@pytest.mark.parametrize("name", ["vec_64", "vec_zero_9", "conv_4x3x3x3", "three_d_2x5x7"])
def test_golden_not_matrices(name):
    """A vector has one scale, so it is a column; others have one for each leading index."""
    data = golden("weight_quant")
    w = data[f"nd_w/{name}"]
    matrix = w[:, None] if w.ndim == 1 else w.reshape(w.shape[0], -1).T
    weight = quantize(matrix, Scheme("threshold", "tensor" if w.ndim == 1 else "channel"))
    assert_array_equal(weight.codes.T.reshape(w.shape), data[f"nd_trits/{name}"])
    assert_allclose(weight.scale.ravel(), data[f"nd_scale/{name}"].ravel(), **F32)
    assert_allclose(values_of(weight).T.reshape(w.shape), data[f"nd_dequant/{name}"], **F32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["a_16x48", "b_5x7"])
def test_golden_low_precision_weights(dtype, name):
    """The reference rounds its scale to the low precision, we do not: codes may differ where a
    weight is nearer to the threshold than that rounding, and nowhere else."""
    data = golden("weight_quant_lowprec")
    w = data[f"{dtype}/w/{name}"].T
    weight = quantize(
        jnp.asarray(w, {"bf16": jnp.bfloat16, "fp16": jnp.float16}[dtype]),
        Scheme("threshold", "channel"),
    )
    codes, scale, margin = reference(w, Scheme("threshold", "channel"))
    assert_array_equal(weight.codes, codes)
    assert_allclose(weight.scale, scale, **F32)
    rounding = {"bf16": 2**-8, "fp16": 2**-11}[dtype]
    sure = margin > 0.1 * 3 * rounding
    assert sure.mean() > 0.9
    assert_array_equal(np.asarray(weight.codes)[sure], data[f"{dtype}/trits/{name}"].T[sure])
    assert_allclose(weight.scale.T, data[f"{dtype}/scale/{name}"], rtol=2 * rounding)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_golden_low_precision_activations(dtype):
    """The reference rounds 127 / max to the low precision: the codes move by as much."""
    data = golden("weight_quant_lowprec")
    x = data[f"{dtype}/x"]
    codes, scale = to_int8(jnp.asarray(x, {"bf16": jnp.bfloat16, "fp16": jnp.float16}[dtype]))
    largest = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    assert_array_equal(codes, np.round(np.float32(x) * np.float32(127 / np.float32(largest))))
    assert_allclose(scale, largest / 127, **F32)
    coarse = {"bf16": 2**-7, "fp16": 2**-10}[dtype]
    difference = np.abs(codes * scale - data[f"{dtype}/activation_quant"])
    assert (difference <= largest * (1 / 127 + 2 * coarse)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_golden_activations(name):
    data = golden("activation_quant")
    codes, scale = to_int8(data[f"x/{name}"])
    assert_array_equal(codes, data[f"codes/{name}"])
    assert_allclose(scale * 127, data[f"gamma/{name}"], **F32)
    assert_allclose(codes * scale, data[f"activation_quant/{name}"], **F32)


@pytest.mark.parametrize("scheme", SCHEMES + (Scheme("twn", 1), Scheme("absmean", 64)), ids=name_of)
@pytest.mark.parametrize("shape", [(13, 6), (1, 1), (5, 1)], ids=str)
def test_weights_against_float64(scheme, shape):
    w = normal(sum(shape), *shape)
    weight = quantize(w, scheme)
    codes, scale, margin = reference(w, scheme)
    sure = margin > 1e-6
    assert_array_equal(np.asarray(weight.codes)[sure], codes[sure])
    if sure.all():
        assert_allclose(weight.scale, scale, rtol=1e-6)
    group = scheme.scale if isinstance(scheme.scale, int) else 0
    assert weight.codes.shape == shape and weight.codes.dtype == jnp.int8
    assert weight.scale.shape == scale.shape and weight.scale.dtype == jnp.float32
    assert weight.group == group


matrices = st.sampled_from([(1, 1), (4, 3), (5, 1), (9, 2), (1, 4)])
schemes = st.builds(Scheme, st.sampled_from(RULES), st.sampled_from(SCALES))
magnitudes = st.sampled_from([1e-6, 1e-3, 1.0, 1e3])
seeds = st.integers(0, 10**6)


@settings(max_examples=24)
@given(matrices, schemes, st.sampled_from(DTYPES), magnitudes, seeds)
def test_weights_are_codes_and_positive_scales(shape, scheme, dtype, magnitude, seed):
    w = jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * magnitude).astype(dtype)
    weight = quantize(w, scheme)
    codes, scale = np.asarray(weight.codes), np.asarray(weight.scale)
    assert set(np.unique(codes)) <= {-1, 0, 1}
    assert (scale > 0).all() and np.isfinite(scale).all()
    assert (codes * np.sign(np.asarray(w, np.float32)) >= 0).all()
    rows = np.arange(shape[0]) // (weight.group or shape[0])
    assert_array_equal(values_of(weight), codes * np.broadcast_to(scale[rows], shape))


@settings(max_examples=20)
@given(matrices, st.sampled_from(SCALES), seeds)
def test_twn_scale_is_the_least_squares_one(shape, scale, seed):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight = quantize(w, Scheme("twn", scale))
    codes = np.asarray(weight.codes, np.float64)
    step = weight.group or shape[0]
    for i, j in np.ndindex(weight.scale.shape):
        at = np.s_[i * step : (i + 1) * step, slice(None) if scale == "tensor" else [j]]
        best = (w[at] * codes[at]).sum() / (codes[at] ** 2).sum()
        assert_allclose(weight.scale[i, j], best, rtol=1e-6)


@settings(max_examples=6)
@given(matrices, schemes, st.sampled_from([(2,), (1, 3)]), seeds)
def test_stacked_matrices_are_quantised_one_by_one(shape, scheme, lead, seed):
    w = np.random.default_rng(seed).standard_normal((*lead, *shape)).astype(np.float32)
    stacked = quantize(w, scheme)
    mapped = lambda w: quantize(w, scheme)
    for _ in lead:
        mapped = jax.vmap(mapped)
    jax.tree.map(assert_array_equal, jax.jit(mapped)(w), stacked)
    first = quantize(w[(0,) * len(lead)], scheme)
    jax.tree.map(lambda a, b: assert_array_equal(a[(0,) * len(lead)], b), stacked, first)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=name_of)
def test_low_precision_weights_are_widened_first(scheme, dtype):
    w = normal(3, 12, 5, dtype=dtype)
    jax.tree.map(
        assert_array_equal,
        quantize(w, scheme),
        quantize(w.astype(jnp.float32), scheme),
    )


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=name_of)
def test_jit_changes_no_code(scheme):
    w = normal(4, 33, 10)
    eager, jitted = quantize_weights(w, scheme), quantize(w, scheme)
    assert_array_equal(eager.codes, jitted.codes)
    assert_allclose(eager.scale, jitted.scale, **F32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_zero_weights_have_zero_codes_and_a_finite_scale(scheme):
    weight = quantize(jnp.zeros((7, 3)), scheme)
    assert_array_equal(weight.codes, np.zeros((7, 3)))
    assert_allclose(weight.scale, np.full(weight.scale.shape, FLOOR[scheme.rule]), rtol=1e-6)


def test_absmean_rounds_half_to_even():
    """|w| / mean is 0.5 exactly for half the weights, which round to 0."""
    weight = quantize(jnp.array([[1.0], [3.0], [1.0], [3.0]]))
    assert weight.scale.item() == 2.0
    assert weight.codes.ravel().tolist() == [0, 1, 0, 1]


def test_threshold_keeps_a_weight_on_it():
    weight = quantize(jnp.array([[0.5], [-0.5], [1.5], [1.5]]), Scheme("threshold", threshold=0.5))
    assert weight.codes.ravel().tolist() == [1, -1, 1, 1]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_requantising_absmean_keeps_codes_but_shrinks_the_scale(scale):
    """The trap the Ternary type guards against: the scale shrinks by the density of the codes."""
    once = quantize(normal(5, 40, 6), Scheme("absmean", scale))
    twice = quantize(values_of(once), Scheme("absmean", scale))
    assert_array_equal(once.codes, twice.codes)
    ones = Ternary(jnp.abs(once.codes), jnp.ones_like(once.scale), once.group)
    density = quantize(values_of(ones), Scheme("threshold", scale)).scale
    assert_allclose(twice.scale, once.scale * density, rtol=1e-6)
    assert float((twice.scale / once.scale).mean()) < 0.8


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_requantising_twn_changes_nothing(scale):
    once = quantize(normal(6, 40, 6), Scheme("twn", scale))
    twice = quantize(values_of(once), Scheme("twn", scale))
    assert_array_equal(once.codes, twice.codes)
    assert_allclose(once.scale, twice.scale, rtol=1e-6)


@settings(max_examples=40)
@given(
    st.sampled_from([(1,), (7,), (3, 5), (2, 1, 4)]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    seeds,
)
def test_activations_are_within_half_a_step(shape, dtype, magnitude, seed):
    x = np.random.default_rng(seed).standard_normal(shape) * magnitude
    x = jnp.asarray(x).astype(dtype)
    codes, scale = to_int8(x)
    wide, step = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    assert codes.shape == x.shape and codes.dtype == jnp.int8
    assert scale.shape == (*x.shape[:-1], 1) and scale.dtype == jnp.float32
    assert (np.abs(wide - np.asarray(codes) * step) <= step * (0.5 + 1e-4)).all()
    assert np.abs(np.asarray(codes, np.int32)).max() <= 127


def test_zero_rows_of_activations_are_finite():
    codes, scale = to_int8(jnp.array([[0.0, 0.0], [1.0, 2.0]]))
    assert codes[0].tolist() == [0, 0]
    assert_allclose(scale.ravel(), [1e-5 / 127, 2 / 127], rtol=1e-6)


def test_activations_of_no_features():
    codes, scale = to_int8(jnp.zeros((3, 0)))
    assert codes.shape == (3, 0) and np.isfinite(scale).all()


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    x = normal(7, 4, 5)
    value, gradient = jax.value_and_grad(lambda x: (straight_through(x, x * 0) ** 2 + x).sum())(x)
    assert_allclose(value, x.sum(), rtol=1e-6)
    assert_array_equal(gradient, np.ones_like(x))
    assert straight_through(x.astype(jnp.bfloat16), x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "median"},
        {"scale": "column"},
        {"scale": 0},
        {"scale": -4},
        {"scale": True},
        {"scale": 1.5},
        {"threshold": 0.1},
        {"rule": "twn", "threshold": -1.0},
        {"rule": "threshold", "threshold": float("nan")},
    ],
    ids=str,
)
def test_a_scheme_that_does_not_exist(arguments):
    with pytest.raises(ValueError, match=f"^{next(reversed(arguments))} "):
        Scheme(**arguments)


@pytest.mark.parametrize("shape", [(8, 40), (64, 32), (300, 300)])
def test_a_scale_takes_few_operations(shape):
    """Nothing to fold, and no axis of length 1 that XLA would move, an operation a round."""
    text = quantize_weights.lower(jnp.ones(shape), Scheme()).as_text()
    for folded in ("pad", "iota", "clamp", "minimum"):
        assert f"stablehlo.{folded}" not in text
    (bounded,) = (line for line in text.splitlines() if "stablehlo.maximum" in line)
    assert bounded.endswith("tensor<1xf32>")
