"""Kernels of several axes, integer leaves, weights quantised once: beyond the ternary matrix."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import (
    BitDense,
    BitDenseGeneral,
    BitEmbed,
    Policy,
    Scheme,
    checkpoint,
    convert,
    dequantise,
    dequantize,
    dot_general,
    pack,
    ternarise,
)
from bitnet_jax.convert import attach, prequantize
from bitnet_jax.embed import attend, take
from bitnet_jax.leaf import PACKED, Int4, Int8, PackedInt4, Prequantized, Sparse, Ternary
from bitnet_jax.packed import pack_codes, pack_weight, unpack_codes
from bitnet_jax.quantize import quantize_activations, quantize_kernel, quantize_weights
from bitnet_jax.recipe.residual import _WithResidual

from .battery import normal

LEVELS = {"int8": 127, "int4": 7}
# (shape, input axes): a query, an out projection, a convolution, a matrix
KERNELS = [((12, 2, 5), 1), ((2, 5, 12), 2), ((3, 3, 4, 6), 3), ((12, 7), 1)]
kernels = pytest.mark.parametrize("shape, inputs", KERNELS, ids=str)
rules = pytest.mark.parametrize("rule", LEVELS)


def contraction(x, inputs):
    """Dimension numbers of the last ``inputs`` axes of x with the first ones of a kernel."""
    return ((tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))), ((), ()))


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


# Kernels of several axes


@kernels
@pytest.mark.parametrize("scale", ["tensor", "channel", 4])
def test_a_packed_kernel_of_several_axes_is_the_latent_one(shape, inputs, scale):
    scheme, w = Scheme("twn", scale), normal(0, *shape)
    x = normal(1, 3, 2, *shape[:inputs])
    leaf = pack_weight(quantize_kernel(w, scheme, inputs))
    assert leaf.shape == shape and leaf.ndim == w.ndim and leaf[...] is leaf
    product = jax.jit(lambda x, w: dot_general(x, w, contraction(x, inputs), scheme=scheme))
    got, want = product(x, leaf), product(x, w)
    assert got.shape == (3, 2, *shape[inputs:])
    if scale == 4:  # separately compiled sums over groups round their own way
        assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    else:
        assert_array_equal(bits(got), bits(want))


@kernels
def test_the_values_have_the_kernels_shape(shape, inputs):
    w = normal(0, *shape)
    weight = quantize_kernel(w, Scheme("int8", "channel"), inputs)
    assert_allclose(dequantize(weight), w, atol=float(jnp.abs(w).max()) / 127)


def test_a_leaf_refuses_other_axes_and_indices():
    leaf = quantize_kernel(normal(0, 2, 5, 12), Scheme(), 2)
    with pytest.raises(ValueError, match=r"contracts its axes \(0, 1\)"):
        dot_general(normal(1, 3, 2), leaf, (((1,), (0,)), ((), ())))
    with pytest.raises(TypeError, match="dequantize"):
        leaf[0]


def test_policy_says_which_axes_are_inputs():
    params = {"query": {"kernel": normal(0, 8, 2, 4)}, "out": {"kernel": normal(1, 2, 4, 8)}}
    assert convert(params).report.unmatched == ("out/kernel", "query/kernel")
    policy = Policy(inputs=(("query", 1), ("out", 2)))
    result = convert(params, policy)
    assert not result.report.unmatched
    assert result.tree["query"]["kernel"].codes.shape == (2, 8)
    assert {x.format for x in result.report.leaves} == {"ternary"}
    assert dequantise(result.tree)["out"]["kernel"].shape == (2, 4, 8)
    with pytest.raises(ValueError, match="expected 1 or more"):
        Policy(inputs=(("query", 0),))
    with pytest.raises(ValueError, match="pattern"):
        Policy(inputs=(("(", 1),))


def test_all_axes_as_inputs_is_no_matrix():
    report = convert({"up": {"kernel": normal(0, 4, 4)}}, Policy(inputs=(("up", 2),))).report
    assert report.unmatched == ("up/kernel",)


def test_dense_general_runs_packed():
    layer, x = BitDenseGeneral((2, 4), axis=(-2, -1)), normal(0, 3, 5, 6)
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"kernel": (5, 6, 2, 4), "bias": (2, 4)}
    }
    packed = convert(variables, Policy((("kernel", "ternary"),), (("kernel", 2),))).tree
    apply = jax.jit(layer.apply)
    assert_array_equal(bits(apply(packed, x)), bits(apply(variables, x)))


def test_axes_survive_the_disk(tmp_path):
    params = {"out": {"kernel": normal(1, 2, 4, 8)}}
    tree = convert(params, Policy(inputs=(("out", 2),))).tree
    checkpoint.save(tmp_path / "c", tree)
    again = checkpoint.load(tmp_path / "c").tree
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert again["out"]["kernel"].in_shape == (2, 4)


# Integer leaves


@rules
@pytest.mark.parametrize("scale", ["tensor", "channel", "row", 3])
def test_integer_rule_against_float64(rule, scale):
    w = np.asarray(normal(0, 7, 5), np.float64)
    weight = quantize_weights(jnp.asarray(w, jnp.float32), Scheme(rule, scale))
    largest = {
        "tensor": lambda: np.full_like(w, np.abs(w).max()),
        "channel": lambda: np.broadcast_to(np.abs(w).max(0), w.shape),
        "row": lambda: np.broadcast_to(np.abs(w).max(1, keepdims=True), w.shape),
        3: lambda: np.concatenate(
            [np.broadcast_to(np.abs(w[i : i + 3]).max(0), w[i : i + 3].shape) for i in (0, 3, 6)]
        ),
    }[scale]()
    assert_array_equal(weight.codes, np.round(w / largest * LEVELS[rule]))
    assert_allclose(
        dequantize(weight), np.asarray(weight.codes) * largest / LEVELS[rule], rtol=1e-6
    )
    assert np.abs(weight.codes).max() == LEVELS[rule]


@rules
def test_zeros_and_extremes(rule):
    for w in (jnp.zeros((4, 3)), jnp.full((4, 3), 1e30), jnp.full((4, 3), 1e-30)):
        weight = quantize_weights(w, Scheme(rule, "channel"))
        assert jnp.isfinite(weight.scale).all() and jnp.isfinite(dequantize(weight)).all()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 9),
    out=st.integers(1, 4),
    width=st.sampled_from([4, 8]),
)
def test_packing_integers_is_exact(seed, size, out, width):
    top = 2 ** (width - 1) - 1
    codes = np.random.default_rng(seed).integers(-top, top + 1, (2, size, out)).astype(np.int8)
    packed = jax.jit(pack_codes, static_argnums=1)(codes, width)
    assert packed.dtype == jnp.uint8 and packed.shape == (2, -(-size * width // 8), out)
    again = jax.jit(unpack_codes, static_argnums=(1, 2))(packed, size, width)
    assert_array_equal(again, codes)


@rules
def test_the_same_layer_trains_and_serves_integers(rule):
    scheme = Scheme(rule, "channel")
    layer, x = BitDense(6, scheme=scheme), normal(0, 4, 8)
    variables = layer.init(jax.random.key(0), x)
    tree = convert(variables, scheme=scheme).tree
    assert type(tree["params"]["kernel"]).__name__ == f"PackedInt{rule[3:]}"
    apply = jax.jit(layer.apply)
    assert_array_equal(bits(apply(tree, x)), bits(apply(variables, x)))
    exact = x @ variables["params"]["kernel"]
    assert_allclose(apply(tree, x), exact, atol=(0.03 if rule == "int8" else 0.5))
    g = jax.grad(lambda v: layer.apply(v, x).sum())(variables)["params"]["kernel"]
    assert jnp.abs(g).min() > 0


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_policy_keeps_leaves_in_integers(format, tmp_path):
    params = {
        "embed": {"embedding": normal(0, 11, 8)},
        "up": {"kernel": normal(1, 64, 8)},
        "head": {"kernel": normal(2, 8, 11)},
    }
    policy = Policy((("embed|head", format), ("kernel", "ternary")))
    result = convert(params, policy)
    formats = {x.path: x.format for x in result.report.leaves}
    assert formats == {
        "embed/embedding": format, "up/kernel": "ternary", "head/kernel": format,
    }  # fmt: skip
    assert result.tree["embed"]["embedding"].scale.shape == (11, 1)
    checkpoint.save(tmp_path / "c", result.tree)
    again = checkpoint.load(tmp_path / "c").tree
    assert jax.tree.structure(again) == jax.tree.structure(result.tree)
    jax.tree.map(assert_array_equal, again, result.tree)


# Tables


@pytest.mark.parametrize("rule", ["int8", "int4", "twn"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [10, 11])
def test_take_is_a_row_of_the_values(rule, packed, rows):
    table = quantize_weights(normal(0, rows, 6), Scheme(rule, "row"))
    values = dequantize(table)
    table = pack_weight(table) if packed else table
    ids = jnp.array([[0, rows - 1, 3], [-1, 5, -rows]])
    assert_array_equal(jax.jit(take)(table, ids), values[ids])
    assert jnp.isnan(take(table, jnp.array([rows, -rows - 1]))).all()
    assert take(table, ids, jnp.bfloat16).dtype == jnp.bfloat16
    query = normal(1, 2, 6)
    logits = attend(query, table)
    if rule == "int8":  # multiplied in integers: the query is rounded too
        codes, scale = quantize_activations(query)
        query = codes * scale
    assert_allclose(logits, query @ values.T, rtol=1e-5, atol=1e-5)


def test_embed_is_flaxs_with_a_float_table():
    ours, theirs, ids = BitEmbed(10, 4), nn.Embed(10, 4), jnp.array([1, 9])
    variables = theirs.init(jax.random.key(0), ids)
    jax.tree.map(assert_array_equal, ours.init(jax.random.key(0), ids), variables)
    assert_array_equal(ours.apply(variables, ids), theirs.apply(variables, ids))
    query = normal(0, 2, 4)
    for layer in (ours, theirs):
        assert_array_equal(
            layer.apply(variables, query, method="attend"),
            theirs.apply(variables, query, method="attend"),
        )


# Quantised once, multiplied often


class Net(nn.Module):
    scheme: Scheme

    @nn.compact
    def __call__(self, x):
        x = nn.relu(BitDense(8, scheme=self.scheme, name="up")(x))
        return BitDenseGeneral((2, 3), scheme=self.scheme, name="heads")(x)


@pytest.mark.parametrize("scale", ["tensor", "channel", 3])
def test_prequantized_leaves_give_the_same_values_and_gradients(scale):
    scheme, policy = Scheme("twn", scale), Policy(inputs=(("heads", 1),))
    model, x = Net(scheme), normal(0, 5, 6)
    params = model.init(jax.random.key(0), x)

    def loss(p, x):
        return jnp.sum(model.apply(p, x) ** 2)

    def once(p, x):
        weights = prequantize(p, policy, scheme)
        return jax.value_and_grad(lambda p: loss(attach(p, weights), x))(p)

    (a, got), (b, want) = jax.jit(once)(params, x), jax.jit(jax.value_and_grad(loss))(params, x)
    assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda g, w: assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)


def test_prequantize_leaves_the_rest_alone():
    params = {"up": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}, "embed": {"embedding": jnp.eye(4)}}
    weights = prequantize(params)
    assert weights["up"]["bias"] is None and weights["embed"]["embedding"] is None
    tree = attach(params, weights)
    assert tree["up"]["kernel"].shape == (4, 4) and tree["up"]["bias"] is params["up"]["bias"]


def test_no_scheme_is_plain_float():
    x, w = normal(0, 3, 4), normal(1, 4, 5)
    dims = (((1,), (0,)), ((), ()))
    assert_array_equal(dot_general(x, w, dims, scheme=None), jax.lax.dot_general(x, w, dims))
    layer = BitDense(5, scheme=None)
    variables = layer.init(jax.random.key(0), x)
    assert_array_equal(layer.apply(variables, x), nn.Dense(5).apply(variables, x))
    packed = pack(ternarise(variables))  # a leaf is multiplied as it is, scheme or not
    assert_array_equal(layer.apply(packed, x), BitDense(5).apply(packed, x))


def test_structures_of_two_kinds_of_leaves_differ():
    # By `jax.tree_util.register_dataclass` they do not, and one jit lookup of a hundred goes wrong.
    codes, scale = jnp.ones((8, 4), jnp.int8), jnp.ones((1, 1))
    unpacked = [kind(codes, scale) for kind in (Ternary, Sparse, Int8, Int4)]
    packed = [kind(codes.view(jnp.uint8), scale, 8) for kind in PACKED]
    acting = [_WithResidual(codes, scale), Prequantized(codes, scale)]
    for leaves in (unpacked, packed, acting):
        assert len({type(x) for x in leaves}) == len(leaves)
        for a, b in itertools.combinations(leaves, 2):
            assert jax.tree.structure(a) != jax.tree.structure(b)


def test_a_leaf_keeps_its_paths_and_static_fields_as_a_pytree():
    leaf = PackedInt4(jnp.ones((4, 6), jnp.uint8), jnp.ones((2, 6)), 7, 4, (), (2, 3))
    leaves, structure = jax.tree.flatten(leaf)
    back = structure.unflatten(leaves)
    assert all(getattr(back, f.name) is getattr(leaf, f.name) for f in dataclasses.fields(leaf))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(leaf)]
    assert paths == [".codes", ".scale"]
