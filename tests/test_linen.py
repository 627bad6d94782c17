import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import (
    BitDense,
    PackedTernary,
    Policy,
    Scheme,
    Ternary,
    convert,
    dot_general,
    is_quantized,
    with_scheme,
)

from .battery import (
    SCHEMES,
    name_of,
    normal,
    pack,
    quantize,
    ste_activation,
    ste_matmul,
    ste_weight,
)

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
boxed = functools.partial(nn.with_partitioning, names=("in", "out"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert_array_equal(x, y)


def packed(variables, **policy):
    return convert(variables, Policy((("kernel$", "ternary"),)), **policy).tree


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.float32, "param_dtype": jnp.float16, "precision": "highest"},
        {"kernel_init": nn.initializers.normal(3), "bias_init": nn.initializers.ones},
    ],
    ids=lambda arguments: " ".join(arguments) or "plain",
)
@pytest.mark.parametrize("shape", [(8,), (2, 3, 1, 8)], ids=str)
def test_drop_in_for_dense(arguments, shape):
    x = normal(0, *shape)
    ours, theirs = BitDense(4, **arguments), nn.Dense(4, **arguments)
    variables = ours.init(KEY, x)
    same(variables, theirs.init(KEY, x))
    y, z = ours.apply(variables, x), theirs.apply(variables, x)
    assert (y.shape, y.dtype) == (z.shape, z.dtype)
    abstract = jax.eval_shape(ours.apply, variables, x)
    assert (abstract.shape, abstract.dtype) == (z.shape, z.dtype)


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=name_of)
def test_output_and_gradients(scheme):
    x, layer = normal(1, 5, 9), BitDense(4, scheme=scheme, bias_init=nn.initializers.normal(1))
    params = layer.init(KEY, x)["params"]

    def official(params, x):
        return ste_matmul(x, params["kernel"], scheme) + params["bias"]

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.cos(f(p, x)).sum(), (0, 1)))

    got = loss(lambda p, x: layer.apply({"params": p}, x))(params, x)
    want = loss(official)(params, x)
    jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), got, want)


def test_features_by_position():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BitDense(3)(BitDense(5, False, jnp.bfloat16)(x))

    y, variables = Net().init_with_output(KEY, jnp.ones((2, 8)))
    assert y.shape == (2, 3)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "BitDense_0": {"bias": (3,), "kernel": (5, 3)},
        "BitDense_1": {"kernel": (8, 5)},
    }


def test_equality_and_hash_are_those_of_dense():
    assert nn.Dense(3) == nn.Dense(3) and hash(nn.Dense(3)) == hash(nn.Dense(3))
    assert BitDense(3) == BitDense(3) and hash(BitDense(3)) == hash(BitDense(3))
    twn = BitDense(3, scheme=Scheme("twn"))
    assert twn == BitDense(3, scheme=Scheme("twn")) and twn != BitDense(3)
    assert hash(twn.clone()) == hash(twn)


def test_codes_do_not_depend_on_the_compute_dtype():
    """Casting the kernel to bfloat16 first would flip codes; only the output is rounded."""
    x = normal(2, 4, 64, dtype=jnp.bfloat16)
    variables = BitDense(32, use_bias=False).init(KEY, x)
    wide = BitDense(32, use_bias=False, dtype=jnp.float32).apply(variables, x)
    narrow = BitDense(32, use_bias=False, dtype=jnp.bfloat16).apply(variables, x)
    assert narrow.dtype == jnp.bfloat16
    assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme("twn", "channel")], ids=name_of)
def test_the_tree_decides(scheme, dtype):
    x, layer = normal(3, 2, 3, 9), BitDense(4, dtype=dtype, scheme=scheme)
    variables = layer.init(KEY, x)
    leaf = packed(variables, scheme=scheme)
    assert isinstance(leaf["params"]["kernel"], PackedTernary)
    f = jax.jit(layer.apply)
    latent, ternary = f(variables, x), f(leaf, x)
    assert latent.dtype == ternary.dtype
    assert_array_equal(latent, ternary)
    weight = {
        "params": {**leaf["params"], "kernel": quantize(variables["params"]["kernel"], scheme)}
    }
    assert isinstance(weight["params"]["kernel"], Ternary)
    assert_array_equal(f(weight, x), latent)


def test_gradient_flows_through_a_packed_layer():
    x, layer = normal(4, 3, 8), BitDense(4)
    variables = layer.init(KEY, x)
    f = jax.jit(jax.grad(lambda x, v: jnp.cos(layer.apply(v, x)).sum()))
    assert_allclose(f(x, packed(variables)), f(x, variables), **CLOSE)


def test_vmap_over_inputs_and_over_stacked_layers():
    x, layer = normal(5, 3, 4, 8), BitDense(4)
    stacked = jax.vmap(lambda key: layer.init(key, x[0]))(jax.random.split(KEY, 3))
    each = [layer.apply(jax.tree.map(lambda a, i=i: a[i], stacked), x[i]) for i in range(3)]
    assert_allclose(jax.vmap(layer.apply)(stacked, x), jnp.stack(each), **CLOSE)
    leaf = convert(stacked, Policy((("kernel$", "ternary-stack"),))).tree
    assert_allclose(jax.vmap(layer.apply)(leaf, x), jnp.stack(each), **CLOSE)


class Block(nn.Module):
    scheme: Scheme = Scheme()
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, _):
        return x + BitDense(8, scheme=self.scheme, kernel_init=self.kernel_init)(jnp.tanh(x)), None


def deep(block, **arguments):
    scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(**arguments)


def unrolled(params, x, scheme):
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], params)["BitDense_0"]
        x = x + ste_matmul(jnp.tanh(x), layer["kernel"], scheme) + layer["bias"]
    return x


@pytest.mark.parametrize(
    "wrap, scheme",
    [(lambda b: b, Scheme()), (nn.remat, Scheme("twn", 3))],
    ids=["scan-absmean", "scan of remat-twn-3"],
)
def test_scan_trains_and_applies_packed(wrap, scheme):
    x, model = normal(6, 2, 8), deep(wrap(Block), scheme=scheme)
    params = model.init(KEY, x, None)["params"]
    assert jax.tree.map(jnp.shape, params) == {"BitDense_0": {"bias": (3, 8), "kernel": (3, 8, 8)}}
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, None)[0])
    got = jax.grad(lambda p: jnp.cos(run(p, x)).sum())(params)
    want = jax.jit(jax.grad(lambda p: jnp.cos(unrolled(p, x, scheme)).sum()))(params)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    policy = Policy((("kernel$", "ternary-stack"),))
    leaf = convert({"params": params}, policy, scheme).tree["params"]
    assert leaf["BitDense_0"]["kernel"].shape == (3, 8, 8)
    assert_allclose(run(leaf, x), run(params, x), **CLOSE)


def test_partition_metadata_is_that_of_dense():
    x, init = normal(7, 2, 8), boxed(nn.initializers.lecun_normal())
    ours, theirs = BitDense(4, kernel_init=init), nn.Dense(4, kernel_init=init)
    variables = ours.init(KEY, x)
    same(variables, theirs.init(KEY, x))
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    spec = nn.get_partition_spec(variables)
    assert spec == nn.get_partition_spec(theirs.init(KEY, x))
    assert spec["params"]["kernel"] == PartitionSpec("in", "out")
    assert_array_equal(ours.apply(variables, x), ours.apply(nn.unbox(variables), x))


def test_partition_metadata_under_scan():
    x, init = normal(7, 2, 8), boxed(nn.initializers.lecun_normal())
    scan = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    variables = scan(kernel_init=init).init(KEY, x, None)
    spec = nn.get_partition_spec(variables)["params"]["BitDense_0"]["kernel"]
    assert spec == PartitionSpec("layers", "in", "out")


def test_boxed_trees_convert_and_apply():
    x, layer = normal(8, 2, 8), BitDense(4, kernel_init=boxed(nn.initializers.lecun_normal()))
    variables = layer.init(KEY, x)
    result = convert(variables)
    assert [(leaf.path, leaf.format) for leaf in result.report.leaves] == [
        ("bias", "float16"),
        ("kernel", "ternary"),
    ]
    assert_array_equal(layer.apply(packed(variables), x), layer.apply(variables, x))


def test_each_component_of_a_packed_kernel_in_a_box_of_its_own():
    x, layer = normal(8, 2, 8), BitDense(4, use_bias=False)
    variables = layer.init(KEY, x)
    leaf = packed(variables)["params"]["kernel"]
    box = lambda a: nn.Partitioned(a, ("in", "out"))
    kernel = PackedTernary(box(leaf.codes), box(leaf.scale), leaf.in_features, leaf.group)
    spec = nn.get_partition_spec({"kernel": kernel})["kernel"]
    assert spec.codes == spec.scale == PartitionSpec("in", "out")
    y = layer.apply({"params": {"kernel": kernel}}, x)
    assert_array_equal(y, layer.apply(variables, x))


@pytest.mark.parametrize("make", [pack, lambda w: w], ids=["packed", "ternary"])
@pytest.mark.parametrize("shape", [(7, 4), (8, 5), (2, 8, 4)], ids=str)
def test_a_leaf_of_another_shape_is_named(make, shape):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BitDense(4, use_bias=False, name="up")(x)

    leaf = make(quantize(jnp.ones(shape)))
    with pytest.raises(ValueError) as error:
        Net().apply({"params": {"up": {"kernel": leaf}}}, jnp.ones((2, 8)))
    assert str(error.value) == (
        f"up/kernel: quantised leaf of shape {shape}, "
        "but the layer's input and features need (8, 4)"
    )


def test_dot_general_of_ones_own_comes_first():
    x = normal(9, 2, 8)
    variables = BitDense(4).init(KEY, x)
    plain = BitDense(4, dot_general=jax.lax.dot_general)
    assert_allclose(plain.apply(variables, x), nn.Dense(4).apply(variables, x), **CLOSE)


def test_dense_general_is_one_argument():
    x, scheme = normal(10, 2, 3, 4, 5), Scheme("twn", "channel")
    layer = nn.DenseGeneral((6, 2), axis=(-2, -1), dot_general=with_scheme(scheme))
    params = layer.init(KEY, x)["params"]
    assert params["kernel"].shape == (4, 5, 6, 2)

    def official(params, x):
        x, w = x.reshape(6, 20), params["kernel"].reshape(20, 12)
        return (ste_activation(x) @ ste_weight(w, scheme)).reshape(2, 3, 6, 2) + params["bias"]

    def gradients(f):
        return jax.jit(jax.grad(lambda p, x: jnp.cos(f(p, x)).sum(), (0, 1)))(params, x)

    got, want = gradients(lambda p, x: layer.apply({"params": p}, x)), gradients(official)
    jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), got, want)


def test_attention_is_two_arguments():
    x = normal(11, 2, 5, 8)
    ternary = {"qkv_dot_general": dot_general, "out_dot_general": dot_general}
    layer = nn.MultiHeadDotProductAttention(num_heads=2, **ternary)
    plain = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = layer.init(KEY, x)
    same(variables, plain.init(KEY, x))
    y, gradients = jax.value_and_grad(lambda v: (layer.apply(v, x) ** 2).sum())(variables)
    assert np.isfinite(y)
    assert y != (plain.apply(variables, x) ** 2).sum()
    kernels = {k: v["kernel"] for k, v in gradients["params"].items()}
    assert sorted(kernels) == ["key", "out", "query", "value"]
    assert all(float(jnp.abs(g).max()) > 0 for g in kernels.values())


def test_training_lowers_the_loss():
    x, target, layer = normal(12, 16, 8), normal(13, 16, 2), BitDense(2)
    params = layer.init(KEY, x)

    @jax.jit
    def step(params):
        f = lambda p: ((layer.apply(p, x) - target) ** 2).mean()
        loss, g = jax.value_and_grad(f)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), loss

    losses = []
    for _ in range(30):
        params, loss = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert not any(is_quantized(x) for x in jax.tree.leaves(params, is_leaf=is_quantized))
