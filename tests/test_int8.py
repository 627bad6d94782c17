"""Every op for packed 8-bit codes equals the int32 product, to the bit; heads that use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_jax
from bitnet_jax import Scheme, quantize_weights
from bitnet_jax.dot import accumulate, dot_general
from bitnet_jax.embed import attend
from bitnet_jax.ops import decode, int8, xla
from bitnet_jax.ops.choose import choose_int8
from bitnet_jax.packed import pack_weight
from bitnet_jax.quantize import dequantize, quantize_activations

VARIANTS = int8.variants()
OPS = {
    "xla": xla.int8_product,
    **{
        f"native-{isa}": lambda *args, isa=isa: int8.int8_product(*args, isa=isa)
        for isa in VARIANTS
    },
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
layouts = pytest.mark.parametrize("table", [False, True], ids=["matrix", "table"])


def draw(seed, *shape, low=-127):
    return np.random.default_rng(seed).integers(low, 128, shape).astype(np.int8)


def check(op, x, codes, table):
    """codes (k, n)."""
    packed = (codes.T if table else codes).astype(np.int16) + 128
    out = jax.jit(op, static_argnums=2)(x, packed.astype(np.uint8), table)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, x.astype(np.int32) @ codes.astype(np.int32))


@every_op
@layouts
@pytest.mark.parametrize("rows, k, n", [(1, 1, 1), (1, 530, 3), (3, 31, 300), (1, 0, 3), (0, 5, 3)])
def test_shapes(op, table, rows, k, n):
    check(op, draw(1, rows, k, low=-128), draw(2, k, n), table)


@pytest.mark.parametrize("isa", VARIANTS)
@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 300), st.integers(1, 200), st.booleans(), st.integers(0, 99)
)
def test_any_shape(isa, rows, k, n, table, seed):
    x, codes = draw(seed, rows, k, low=-128), draw(seed + 1, k, n)
    packed = ((codes.T if table else codes).astype(np.int16) + 128).astype(np.uint8)
    out = int8.int8_product(jnp.asarray(x), jnp.asarray(packed), table, isa=isa)
    np.testing.assert_array_equal(out, x.astype(np.int32) @ codes.astype(np.int32))


@every_op
@layouts
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("code", [-127, 127])
def test_no_overflow(op, table, value, code):
    """The largest sums there are: k = 4,100 of one sign."""
    check(op, np.full((2, 4100), value, np.int8), np.full((4100, 37), code, np.int8), table)


@pytest.mark.parametrize("k", [0, 1, 77, 4097, 9000])
def test_one_row_of_a_table_in_plain_jax(k):
    """Exact in float32 although whole sums are not: the largest of each sign, and any."""
    for x in (
        draw(5, 1, k, low=-128),
        np.full((1, k), -128, np.int8),
        np.full((1, k), 127, np.int8),
    ):
        check(decode.int8_table, x, np.full((k, 3), 127, np.int8), True)
        check(decode.int8_table, x, draw(6, k, 3), True)


@every_op
def test_vmap(op):
    x, codes = draw(3, 3, 2, 45), draw(4, 45, 21)
    packed = (codes.astype(np.int16) + 128).astype(np.uint8)
    out = jax.jit(jax.vmap(lambda x: op(x, packed, False)))(x)
    np.testing.assert_array_equal(out, x.astype(np.int32) @ codes.astype(np.int32))


@every_op
def test_wrong_width(op):
    with pytest.raises(ValueError, match="fit"):
        op(jnp.zeros((1, 8), jnp.int8), jnp.zeros((7, 3), jnp.uint8), False)


def test_no_such_variant():
    with pytest.raises((ValueError, RuntimeError), match="variant|native"):
        int8.int8_product(jnp.ones((1, 1), jnp.int8), jnp.ones((1, 1), jnp.uint8), isa="none")


def test_few_rows_are_for_the_native_op():
    native = lambda other: "native" if VARIANTS else other
    chosen = [choose_int8("cpu", rows, True) for rows in (1, 16, 4096)]
    assert chosen == [native("decode"), native("xla"), "xla"]
    assert choose_int8("cpu", 1, False) == native("xla")


def test_a_packed_matrix_gives_the_sums_of_the_unpacked_one():
    weight = quantize_weights(jax.random.normal(jax.random.key(0), (40, 24)), Scheme("int8"))
    leaf, x = pack_weight(weight), jax.random.normal(jax.random.key(1), (2, 3, 40))
    codes = quantize_activations(x)[0]
    np.testing.assert_array_equal(accumulate(codes, leaf), accumulate(codes, weight))
    dims = (((2,), (0,)), ((), ()))
    np.testing.assert_array_equal(dot_general(x, leaf, dims), dot_general(x, weight, dims))
    slope = lambda w: jax.grad(lambda x: (dot_general(x, w, dims) ** 2).sum())(x)
    np.testing.assert_array_equal(slope(leaf), slope(weight))


def test_a_tied_head_multiplies_integers():
    table = quantize_weights(jax.random.normal(jax.random.key(0), (50, 24)), Scheme("int8", "row"))
    query = jax.random.normal(jax.random.key(1), (2, 3, 24))
    codes, scale = quantize_activations(query)
    sums = np.asarray(codes, np.int64) @ np.asarray(table.codes, np.int64).T
    expected = sums * np.asarray(scale, np.float64) * np.asarray(table.scale[:, 0], np.float64)
    for leaf in (table, pack_weight(table)):
        np.testing.assert_allclose(attend(query, leaf), expected, rtol=3e-7)
    assert attend(query, pack_weight(table), jnp.bfloat16).dtype == jnp.bfloat16
    # The float product is as near as 8 bits are; the gradient is that product's.
    exact = query @ dequantize(table).T
    assert jnp.abs(attend(query, table) - exact).max() < 0.02 * jnp.abs(exact).max()
    g = jax.random.normal(jax.random.key(2), exact.shape)
    slope = jax.grad(lambda q: (attend(q, pack_weight(table)) * g).sum())(query)
    np.testing.assert_allclose(slope, g @ dequantize(table), rtol=1e-4, atol=1e-5)


def test_other_tables_are_multiplied_in_float():
    table = jax.random.normal(jax.random.key(0), (32, 24))
    query = jax.random.normal(jax.random.key(1), (3, 24))
    for scheme in (Scheme("int4", "row"), Scheme("twn", "row"), Scheme("int8", 8)):
        leaf = bitnet_jax.quantize_weights(table, scheme)
        exact = query @ dequantize(leaf).T
        np.testing.assert_allclose(attend(query, pack_weight(leaf)), exact, rtol=1e-5, atol=1e-5)
