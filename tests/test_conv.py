import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import bitnet_jax
from bitnet_jax import BitConv, Policy, Scheme, convert, dequantize, quantize_activations
from bitnet_jax.conv import conv_general_dilated
from bitnet_jax.convert import attach, prequantize
from bitnet_jax.nnx import update, variables
from bitnet_jax.quantize import quantize_kernel

from .battery import normal

DIMS = ("NHWC", "HWIO", "NHWC")
CASES = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 1), "padding": ((1, 2), (0, 1))},
    "dilated": {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
    "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}
SCALES = ("tensor", "channel", 5)
cases = pytest.mark.parametrize("case", CASES)
scales = pytest.mark.parametrize("scale", SCALES)
X, W = normal(0, 3, 9, 7, 4), normal(1, 3, 2, 4, 6)


def setting(case):
    options = CASES[case] | {"dimension_numbers": DIMS}
    return options, W[:, :, ::2] if case == "grouped" else W


def by_hand(x, w, scheme, options):
    """The straight-through convolution, by float32 products only."""
    codes, scale = quantize_activations(x.reshape(len(x), -1))
    qx = (codes * scale).reshape(x.shape)
    qw = dequantize(quantize_kernel(w, scheme, w.ndim - 1))
    x, w = (a + jax.lax.stop_gradient(q - a) for a, q in ((x, qx), (w, qw)))
    return jax.lax.conv_general_dilated(x, w, **options, precision="highest")


@cases
@scales
def test_values_and_gradients_are_the_straight_through_ones(case, scale):
    (options, w), scheme = setting(case), Scheme("twn", scale)
    ours = lambda x, w: conv_general_dilated(x, w, **options, scheme=scheme)
    theirs = lambda x, w: by_hand(x, w, scheme, options)
    assert_allclose(ours(X, w), theirs(X, w), rtol=1e-5, atol=1e-5)
    square = lambda f: lambda x, w: (f(x, w) ** 2).sum()
    got, want = (jax.grad(square(f), (0, 1))(X, w) for f in (ours, theirs))
    for a, b in zip(got, want):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@cases
@scales
@pytest.mark.parametrize("rule", ["absmean", "int8", "int4"])
def test_packed_kernels_give_the_same(case, scale, rule):
    (options, w), scheme = setting(case), Scheme(rule, scale)
    policy = Policy((("kernel", "ternary"),), (("kernel", 3),))
    leaf = convert({"kernel": w}, policy, scheme).tree["kernel"]
    assert leaf.shape == w.shape
    f = jax.jit(lambda x, w: conv_general_dilated(x, w, **options, scheme=scheme))
    assert_array_equal(f(X, leaf), f(X, w))
    dx = jax.grad(lambda x: f(x, leaf).sum())(X)
    assert_allclose(dx, jax.grad(lambda x: f(x, w).sum())(X), rtol=1e-5, atol=1e-5)


def test_integer_sums_are_exact():
    codes = np.random.default_rng(0).integers(-127, 128, (1, 5, 5, 300)).astype(np.float32)
    codes[0, 0, 0, 0] = 127  # so that the codes are the values
    w = np.sign(np.asarray(normal(2, 5, 5, 300, 2))).astype(np.float32)
    y = conv_general_dilated(
        jnp.asarray(codes), jnp.asarray(w), (1, 1), "VALID", dimension_numbers=DIMS
    )
    exact = np.einsum("bhwi,hwio->bo", codes.astype(np.int64), w.astype(np.int64))
    assert_array_equal(np.asarray(y)[:, 0, 0], exact)


def test_layers_are_drop_ins():
    x = normal(3, 2, 8, 8, 4)
    ours, theirs = BitConv(6, (3, 3), strides=2), nn.Conv(6, (3, 3), strides=2)
    tree = theirs.init(jax.random.key(0), x)
    jax.tree.map(assert_array_equal, ours.init(jax.random.key(0), x), tree)
    plain = BitConv(6, (3, 3), strides=2, scheme=None)
    assert_allclose(plain.apply(tree, x), theirs.apply(tree, x), rtol=1e-6, atol=1e-6)
    assert ours.apply(tree, x).shape == theirs.apply(tree, x).shape
    policy = Policy(inputs=(("kernel", 3),))
    packed = convert(tree, policy)
    assert not packed.report.unmatched
    apply = jax.jit(ours.apply)

    module = bitnet_jax.nnx.BitConv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    update(module, tree)
    run = nnx.jit(lambda m, x: m(x))
    assert_array_equal(run(module, x), apply(tree, x))
    update(module, packed.tree)
    assert_array_equal(run(module, x), apply(packed.tree, x))
    assert jnp.abs(variables(module)["params"]["kernel"].scale).max() > 0


def test_quantised_once_gives_the_same_gradient():
    model, x = BitConv(3, (3,)), normal(4, 2, 9, 4)
    params = model.init(jax.random.key(0), x)
    policy = Policy(inputs=(("kernel", 2),))
    loss = lambda p: (model.apply(p, x) ** 2).sum()
    weights = prequantize(params, policy)
    got = jax.grad(lambda p: loss(attach(p, weights)))(params)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), got, jax.grad(loss)(params))


def test_other_layouts_are_refused_and_dtypes_kept():
    with pytest.raises(ValueError, match="expected lhs"):
        conv_general_dilated(X, W, (1, 1), "SAME", dimension_numbers=("HNWC", "HWIO", "HNWC"))
    half = conv_general_dilated(X.astype(jnp.bfloat16), W, (1, 1), "SAME", dimension_numbers=DIMS)
    assert half.dtype == jnp.bfloat16
    plain = conv_general_dilated(X, W, (1, 1), "SAME", dimension_numbers=DIMS, scheme=None)
    want = jax.lax.conv_general_dilated(X, W, (1, 1), "SAME", dimension_numbers=DIMS)
    assert_array_equal(plain, want)
