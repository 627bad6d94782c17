import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bitnet_jax import PackedTernary, Scheme, Ternary, is_quantized
from bitnet_jax.packed import (
    pack_codes,
    pack_weight,
    unpack_codes,
    unpack_weight,
)

from .battery import normal, pack, quantize, unpack

pack_jit = jax.jit(pack_codes)
unpack_jit = jax.jit(unpack_codes, static_argnums=1)


def codes_of(seed, *shape):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def bytes_of(codes):
    """The byte layout of the docstring, an entry at a time."""
    *lead, size, out = codes.shape
    packed = np.full((*lead, -(-size // 4), out), 0b01010101, np.int64)
    for i in range(size):
        packed[..., i // 4, :] += codes[..., i, :].astype(np.int64) << 2 * (i % 4)
    return packed.astype(np.uint8)


def leaf_of(shape=(3, 6, 4), scheme=Scheme("twn", 4)):
    return pack(quantize(normal(0, *shape), scheme))


@settings(max_examples=15)
@given(
    st.sampled_from([(), (2,), (2, 1, 3)]),
    st.sampled_from([0, 1, 3, 4, 5, 8, 15]),
    st.sampled_from([1, 3]),
    st.integers(0, 10**6),
)
def test_round_trip_and_byte_layout(lead, size, out, seed):
    codes = codes_of(seed, *lead, size, out)
    packed = pack_jit(codes)
    assert packed.dtype == jnp.uint8
    assert_array_equal(packed, bytes_of(codes))
    back = unpack_jit(packed, size)
    assert back.dtype == jnp.int8
    assert_array_equal(back, codes)


def test_eager_equals_jit():
    codes = codes_of(1, 2, 7, 3)
    assert_array_equal(pack_codes(codes), pack_jit(codes))
    assert_array_equal(unpack_codes(pack_codes(codes), 7), codes)


def test_vmap_equals_a_stack():
    codes = codes_of(2, 3, 6, 4)
    assert_array_equal(jax.vmap(pack_codes)(codes), pack_jit(codes))
    back = jax.vmap(lambda p: unpack_codes(p, 6))(pack_jit(codes))
    assert_array_equal(back, codes)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_padding_reads_as_code_zero(size):
    packed = pack_jit(np.ones((size, 2), np.int8))
    whole = unpack_jit(packed, 4 * packed.shape[0])
    assert_array_equal(whole[size:], np.zeros((4 * packed.shape[0] - size, 2)))


def test_every_byte_of_four_codes():
    codes = np.array(np.meshgrid(*[[-1, 0, 1]] * 4)).reshape(4, -1).astype(np.int8)
    packed = np.asarray(pack_jit(codes))
    assert len(np.unique(packed)) == 81
    assert_array_equal(unpack_jit(packed, 4), codes)


@pytest.mark.parametrize("shape", [(8, 3), (5, 3), (1, 1), (2, 3, 7, 4)], ids=str)
@pytest.mark.parametrize("scale", ["tensor", "channel", 3], ids=str)
def test_weight_round_trip_shape_and_bytes(shape, scale):
    weight = quantize(normal(1, *shape), Scheme("threshold", scale))
    leaf = pack(weight)
    assert leaf.shape == weight.shape == shape
    assert leaf.ndim == len(shape) and leaf.dtype == weight.dtype == jnp.float32
    *lead, size, out = shape
    codes = int(np.prod(lead)) * -(-size // 4) * out
    assert leaf.nbytes == codes + 4 * weight.scale.size
    back = unpack(leaf)
    assert jax.tree.structure(back) == jax.tree.structure(weight)
    jax.tree.map(assert_array_equal, back, weight)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


@pytest.mark.parametrize("kind", [pack_weight, lambda w: w], ids=["packed", "ternary"])
def test_leaves_survive_transformations(kind):
    leaf = kind(quantize(normal(0, 3, 6, 4), Scheme("twn", 4)))
    same(jax.jit(lambda x: x)(leaf), leaf)
    same(jax.vmap(lambda x: x)(leaf), leaf)
    same(jax.lax.scan(lambda carry, x: (carry, x), 0, leaf)[1], leaf)
    same(jax.device_put(leaf, jax.devices()[0]), leaf)
    abstract = jax.eval_shape(lambda: leaf)
    assert type(abstract) is type(leaf) and abstract.shape == (3, 6, 4)


def test_logical_shape_inside_vmap_and_scan():
    """A full static shape would go stale here: the leading axis is mapped away."""
    leaf, seen = leaf_of(), []
    jax.vmap(lambda x: seen.append(x.shape) or x)(leaf)
    jax.lax.scan(lambda carry, x: (carry, seen.append(x.shape)), 0, leaf)
    assert seen == [(6, 4), (6, 4)]
    assert_array_equal(jax.vmap(lambda x: unpack_weight(x).codes)(leaf), unpack(leaf).codes)


def test_static_fields_are_part_of_the_structure():
    leaf = leaf_of()
    other = PackedTernary(leaf.codes, leaf.scale, 5, leaf.group)
    assert jax.tree.structure(leaf) != jax.tree.structure(other)
    assert len(jax.tree.leaves(leaf)) == 2


def test_is_quantized():
    leaf = leaf_of()
    assert is_quantized(leaf) and is_quantized(unpack(leaf))
    assert not is_quantized(leaf.codes) and not is_quantized({"codes": 1, "scale": 1})
    assert isinstance(unpack(leaf), Ternary)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacked_codes_reduced_in_the_same_program(bits):
    """XLA's CPU backend saturated the conversion of uint8 to int8 there: -1 became 127."""
    most = {2: 1, 4: 7, 8: 127}[bits]
    codes = np.random.default_rng(0).integers(-most, most + 1, (64, 32)).astype(np.int8)
    packed = pack_codes(jnp.asarray(codes), bits)
    values = jax.jit(lambda b: unpack_codes(b, 64, bits).astype(jnp.float32))
    for reduce in (jnp.max, jnp.min, jnp.sum, lambda x: x.ravel() @ x.ravel()):
        assert jax.jit(lambda b: reduce(values(b)))(packed) == reduce(codes.astype(np.float32))  # noqa: B023
