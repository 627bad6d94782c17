import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from optax.contrib import MuonDimensionNumbers

import bitnet_jax
from bitnet_jax import (
    BitDense,
    BitDenseGeneral,
    BitEmbed,
    BitLinear,
    BitnetError,
    Policy,
    Scheme,
    checkpoint,
    convert,
)
from bitnet_jax.nnx import promote_dtype, update, variables
from bitnet_jax.optim import labels, mugrokfast

from .battery import SCHEMES, name_of, normal

TWN = Scheme("twn", "channel")
OURS = {"dot_general": bitnet_jax.with_scheme(TWN), "promote_dtype": promote_dtype}
HEADS = (("(query|key|value)/kernel", 1), ("out/kernel", 2))
ATTENTION = {f"{part}_{name}": value for part in ("qkv", "out") for name, value in OURS.items()}


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


def same(a, b):
    assert_array_equal(bits(a), bits(b))


def rngs(seed=0):
    return nnx.Rngs(seed)


@nnx.jit
def run(model, *args):
    return model(*args)


# A drop-in


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
    ids=str,
)
def test_drop_in_for_linear(arguments):
    ours, theirs = (kind(8, 4, rngs=rngs(), **arguments) for kind in (BitLinear, nnx.Linear))
    jax.tree.map(assert_array_equal, variables(ours), variables(theirs))
    x = normal(0, 2, 3, 8)
    assert (ours(x).shape, ours(x).dtype) == (theirs(x).shape, theirs(x).dtype)
    assert not jnp.allclose(ours(x), theirs(x))
    plain = BitLinear(8, 4, rngs=rngs(), scheme=None, **arguments)
    assert_array_equal(plain(x), theirs(x))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_bitlinear_is_bitdense(scheme):
    linear, dense, x = (
        BitLinear(8, 4, rngs=rngs(), scheme=scheme),
        BitDense(4, scheme=scheme),
        normal(0, 5, 8),
    )
    tree = variables(linear)
    same(run(linear, x), jax.jit(dense.apply)(tree, x))
    g = nnx.grad(lambda m: (m(x) ** 2).sum())(linear)
    want = jax.grad(lambda p: (dense.apply(p, x) ** 2).sum())(tree)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), variables(g), want)


def test_metadata_stays():
    layer = BitLinear(8, 4, rngs=rngs(), kernel_metadata={"note": "mine"})
    assert layer.kernel.get_metadata()["note"] == "mine"
    update(layer, convert(variables(layer)).tree)
    assert layer.kernel.get_metadata()["note"] == "mine"


def test_packed_in_stock_layers():
    general = nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), rngs=rngs(), **OURS)
    linear = nnx.Linear(8, 4, rngs=rngs(), **OURS)
    attention = nnx.MultiHeadAttention(2, 8, rngs=rngs(), decode=False, **ATTENTION)
    x = normal(0, 3, 6, 8)
    for layer, inputs, y in (
        (general, (("kernel", 2),), x.reshape(3, 6, 2, 4)),
        (linear, (), x),
        (attention, HEADS, x),
    ):
        want = run(layer, y)
        packed = convert(variables(layer), Policy((("kernel", "ternary"),), inputs), TWN)
        assert {x.format for x in packed.report.leaves if "kernel" in x.path} == {"ternary"}
        update(layer, packed.tree)
        same(run(layer, y), want)


def test_attention_trains_ternary_by_arguments_alone():
    attention = nnx.MultiHeadAttention(2, 8, rngs=rngs(), decode=False, **ATTENTION)
    x = normal(0, 3, 6, 8)
    g = variables(nnx.grad(lambda m: (m(x) ** 2).sum())(attention))["params"]
    assert all(jnp.abs(g[n]["kernel"]).max() > 0 for n in ("query", "key", "value", "out"))


def test_embed_with_a_small_table():
    layer, ids = bitnet_jax.nnx.BitEmbed(10, 4, rngs=rngs()), jnp.array([[1, 9]])
    want, logits = layer(ids), layer.attend(normal(0, 2, 4))
    same(want, nnx.Embed(10, 4, rngs=rngs())(ids))
    update(layer, convert(variables(layer), Policy((("embedding", "int8"),))).tree)
    assert_allclose(layer(ids), want, atol=0.01)
    assert_allclose(layer.attend(normal(0, 2, 4)), logits, atol=0.05)


# Trees


class Net(nnx.Module):
    """Attention, a list of layers, batch norm and dropout: every kind of state."""

    def __init__(self, rngs):
        self.embed = bitnet_jax.nnx.BitEmbed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False, **ATTENTION)
        self.layers = nnx.List([BitLinear(8, 8, rngs=rngs, scheme=TWN) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        for layer in self.layers:
            x = x + self.dropout(nnx.relu(layer(x)))
        return self.head(self.norm(x))


class LinenNet(nn.Module):
    """The same network in Linen."""

    @nn.compact
    def __call__(self, ids):
        x = BitEmbed(16, 8, name="embed")(ids)
        x = x + Attention(name="attention")(x)
        for i in range(2):
            x = x + nn.relu(BitDense(8, scheme=TWN, name=f"layers_{i}")(x))
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(x)
        return nn.Dense(3, name="head")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = lambda name: BitDenseGeneral((2, 4), scheme=TWN, name=name)(x)
        y = nn.dot_product_attention(heads("query"), heads("key"), heads("value"))
        return BitDenseGeneral(8, axis=(-2, -1), scheme=TWN, name="out")(y)


POLICY = Policy(
    (("embedding", "int8"), ("head", "float32"), ("kernel", "ternary"), (".", "float32")), HEADS
)
IDS = jnp.array([[1, 2, 3, 4], [5, 15, 0, 7]])


def test_one_packed_checkpoint_in_linen_and_nnx(tmp_path):
    model = Net(rngs())
    packed = convert(nnx.state(model, (nnx.Param, nnx.BatchStat)), POLICY, TWN)
    assert not packed.report.unmatched
    checkpoint.save(tmp_path / "nnx", packed.tree)  # an nnx.State, straight from convert
    tree = checkpoint.load(tmp_path / "nnx").tree
    assert set(tree) == {"params", "batch_stats"} and "layers_1" in tree["params"]

    linen = LinenNet()
    checkpoint.save(tmp_path / "linen", tree)
    assert manifest(tmp_path / "linen") == manifest(tmp_path / "nnx")
    other = Net(rngs(1))
    update(other, checkpoint.load(tmp_path / "linen").tree)
    logits = jax.jit(linen.apply)(tree, IDS)
    same(run(other, IDS), logits)
    nnx.update(model, packed.tree)  # and by Flax's own update
    same(run(model, IDS), logits)
    assert logits.std() > 0.1


def manifest(path):
    stored = checkpoint.read_manifest(path)
    return {k: stored[k] for k in ("crc32", "ternary", "version")}


def test_a_linen_trees_values_go_into_nnx():
    tree = LinenNet().init(jax.random.key(3), IDS)
    model = Net(rngs())
    update(model, tree)
    assert_allclose(run(model, IDS), LinenNet().apply(tree, IDS), rtol=1e-5, atol=1e-5)
    update(model.head, {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)})
    assert model.head.kernel[...].min() == 1


def test_saving_a_module_saves_its_state(tmp_path):
    model = Net(rngs())
    checkpoint.save(tmp_path / "a", model)
    jax.tree.map(assert_array_equal, checkpoint.load(tmp_path / "a").tree, variables(model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("head"), "params/head/bias: missing (1 of 2)"),
        (lambda p: p.update(extra={"bias": jnp.ones(1)}), "params/extra/bias: unknown (1 of 1)"),
        (
            lambda p: p["head"].update(bias=jnp.ones(4)),
            "params/head/bias: has shape (4,), the module needs (3,)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_tree_of_another_module_is_refused_whole(change, message):
    model = Net(rngs())
    before = jax.tree.map(jnp.copy, variables(model))
    tree = variables(Net(rngs(1)))
    change(tree["params"])
    with pytest.raises(BitnetError) as error:
        update(model, tree)
    assert str(error.value).startswith(message)
    jax.tree.map(assert_array_equal, variables(model), before)


# Training, transforms


def test_nnx_training_lowers_the_loss():
    model = Net(rngs())
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    target = jnp.array([[0, 1, 2, 0], [2, 1, 0, 1]])

    @nnx.jit
    def step(model, optimizer):
        def loss(m):
            return optax.softmax_cross_entropy_with_integer_labels(m(IDS), target).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    want = run(model, IDS)
    update(model, convert(variables(model), Policy(POLICY.rules[1:], HEADS), TWN).tree)
    same(run(model, IDS), want)


def test_mugrokfast_trains_an_nnx_module():
    """Labels and Muon's axes read NNX's state as they read Linen's tree."""
    attention = nnx.MultiHeadAttention(2, 32, rngs=rngs(), decode=False, **ATTENTION)
    heads, merged = MuonDimensionNumbers(0, (1, 2)), MuonDimensionNumbers((0, 1), 2)
    axes = {"query|key|value": heads, "out": merged}
    found = labels(nnx.state(attention, nnx.Param), axes)
    assert jax.tree.leaves(found) == ["plain", "muon"] * 4
    rule = mugrokfast(1e-2, axes=axes, lamb=1.0, ste=True)
    optimizer, x = nnx.Optimizer(attention, rule, wrt=nnx.Param), normal(0, 4, 8, 32)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(attention, optimizer)) for _ in range(5)]
    assert losses[-1] < 0.7 * losses[0]


def test_split_merge_vmap_scan_and_eval_shape():
    layer, x = BitLinear(8, 8, rngs=rngs(), scheme=TWN), normal(0, 5, 8)
    update(layer, convert(variables(layer), scheme=TWN).tree)
    want = layer(x)
    graph, state = nnx.split(layer)
    same(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x), want)
    same(nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(layer, x), want)
    assert jax.eval_shape(lambda s: nnx.merge(graph, s)(x), state).shape == (5, 8)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    twice, _ = jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, stack)
    same(twice, layer(want))
    total = lambda x: nnx.merge(graph, state)(x).sum()
    same(jax.grad(jax.checkpoint(total))(x), jax.grad(total)(x))
