"""Models written in PyTorch: imported, converted, fine-tuned, packed. No torch needed here."""

import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import bitnet_jax
from bitnet_jax import (
    BitConv,
    BitDense,
    BitDenseGeneral,
    BitLinear,
    BitnetError,
    Policy,
    Scheme,
    convert,
)
from bitnet_jax.interop.names import path_of
from bitnet_jax.interop.tensors import from_state_dict, read
from bitnet_jax.interop.torch import from_torch
from bitnet_jax.optim import adamw

GOLDEN = Path(__file__).parent / "golden" / "torch"
TWN = Scheme("twn", "channel")
# torch's Sequential has numbers for names.
MLP_NAMES = ((r"^net\.0\.", "up."), (r"^net\.1\.", "norm."), (r"^net\.3\.", "down."))
LM_NAMES = ((r"mlp\.0\.", "up."), (r"mlp\.2\.", "down."))
INPUTS = (("(query|key|value)/kernel", 1), ("attn/out/kernel", 2), ("conv", 3))


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as data:
        return jnp.asarray(data["x"]), data["y"]


def close(got, want):
    """Within 1e-5 of the largest output."""
    assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# The three networks in Flax, float for scheme=None


class Mlp(nn.Module):
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x):
        x = BitDense(48, scheme=self.scheme, name="up")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(x))
        x = nn.relu(BitDense(32, scheme=self.scheme, name="down")(x))
        return nn.Dense(5, name="out")(x)


class Attention(nn.Module):
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x):
        heads = lambda name: BitDenseGeneral((4, 8), scheme=self.scheme, name=name)(x)
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.dot_product_attention(heads("query"), heads("key"), heads("value"), mask=mask)
        return BitDenseGeneral(32, axis=(-2, -1), scheme=self.scheme, name="out")(y)


class Block(nn.Module):
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        x = x + Attention(self.scheme, name="attn")(y)
        y = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        y = nn.gelu(BitDense(64, scheme=self.scheme, name="up")(y), approximate=False)
        return x + BitDense(32, scheme=self.scheme, name="down")(y)


class Transformer(nn.Module):
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, tokens):
        embed = bitnet_jax.BitEmbed(61, 32, name="embed")
        x = embed(tokens) + self.param("pos", nn.initializers.normal(), (16, 32))[: tokens.shape[1]]
        for i in range(2):
            x = Block(self.scheme, name=f"layers_{i}")(x)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


class Conv(nn.Module):
    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, x):
        x = jnp.moveaxis(x, 1, -1)  # torch's pictures have their channels first
        conv = functools.partial(BitConv, scheme=self.scheme)
        x = conv(8, (3, 3), strides=2, padding=[(1, 1), (1, 1)], name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x))
        pads = [(1, 1), (2, 2)]
        x = conv(16, (3, 5), padding=pads, feature_group_count=2, use_bias=False, name="conv2")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2)).reshape(len(x), -1)
        x = nn.relu(BitDense(32, scheme=self.scheme, name="hidden")(x))
        return nn.Dense(4, name="out")(x)


MODELS = {
    "mlp": (Mlp, {"rename": MLP_NAMES}),
    "transformer": (Transformer, {"rename": LM_NAMES}),
    "conv": (Conv, {"flatten": {"hidden": (16, 4, 4)}}),
}
models = pytest.mark.parametrize("name", MODELS)


def imported(name, source=None, **more):
    make, options = MODELS[name]
    like = jax.eval_shape(make().init, jax.random.key(0), golden(name)[0])
    source = GOLDEN / f"{name}.safetensors" if source is None else source
    return from_torch(source, like, **(options | more))


@models
def test_outputs_are_torchs(name):
    x, y = golden(name)
    result = imported(name)
    close(jax.jit(MODELS[name][0]().apply)(result.tree, x), y)
    assert not result.report.left_over


@models
def test_converted_fine_tuned_packed(name):
    """The whole way: the ternary network learns to say what the float one said, and packs."""
    x, y = golden(name)
    target = jnp.argmax(y, -1)
    model, variables = MODELS[name][0](TWN), imported(name).tree
    statistics = {k: v for k, v in variables.items() if k != "params"}
    optimizer = adamw(3e-3)

    def loss(params):
        logits = model.apply({"params": params, **statistics}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = variables["params"], optimizer.init(variables["params"]), []
    for _ in range(40):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]

    policy = Policy(
        ((r"(up|down|hidden|query|key|value|attn/out|conv\d)/kernel", "ternary"),), INPUTS
    )
    packed = convert({"params": params, **statistics}, policy, TWN)
    ternary = [x.path for x in packed.report.leaves if x.format == "ternary"]
    assert len(ternary) == {"mlp": 2, "transformer": 12, "conv": 3}[name]
    apply = jax.jit(model.apply)
    latent = apply({"params": params, **statistics}, x)
    assert_array_equal(apply(packed.tree, x), latent)


def test_attention_goes_into_nnx():
    """torch's attention in nnx.MultiHeadAttention, float and packed, from the same file."""
    arguments = {
        f"{part}_{k}": v
        for part in ("qkv", "out")
        for k, v in {
            "dot_general": bitnet_jax.with_scheme(TWN),
            "promote_dtype": bitnet_jax.nnx.promote_dtype,
        }.items()
    }

    def attention(**arguments):
        return nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0), decode=False, **arguments)

    state = {
        k.removeprefix("layers.1.attn."): v
        for k, v in load_file(GOLDEN / "transformer.safetensors").items()
        if k.startswith("layers.1.attn.")
    }
    tree = from_torch(state, bitnet_jax.nnx.variables(attention())).tree
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 32), np.float32))
    mask = nn.make_causal_mask(x[..., 0])
    plain, ternary = attention(), attention(**arguments)
    for model in (plain, ternary):
        bitnet_jax.nnx.update(model, tree)
    close(plain(x, mask=mask), np.asarray(Attention().apply(tree, x)))
    run = nnx.jit(lambda model, x: model(x, mask=mask))
    want = run(ternary, x)
    packed = convert(tree, Policy((("kernel", "ternary"),), INPUTS), TWN)
    bitnet_jax.nnx.update(ternary, packed.tree)
    assert_array_equal(run(ternary, x), want)


# Other forms of the same weights


def rewrite(name, change):
    return change(load_file(GOLDEN / f"{name}.safetensors"))


def test_prefixes_and_half_precision():
    x, y = golden("mlp")
    state = rewrite("mlp", lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()})
    result = imported("mlp", state)
    close(Mlp().apply(result.tree, x), y)
    assert result.report.renamed["module._orig_mod.out.bias"] == "out.bias"

    half = imported("mlp", GOLDEN / "mlp_bf16.safetensors")
    assert {v.dtype for v in jax.tree.leaves(half.tree)} == {jnp.dtype("float32")}
    assert_allclose(Mlp().apply(half.tree, x), y, rtol=0, atol=0.02 * np.abs(y).max())
    kept = imported("mlp", GOLDEN / "mlp_bf16.safetensors", dtype=None).tree
    assert {v.dtype for v in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    small = rewrite("mlp", lambda s: {k: v.astype(np.float16) for k, v in s.items()})
    assert_allclose(Mlp().apply(imported("mlp", small).tree, x), y, rtol=0, atol=0.01)


def test_a_part_that_is_called_like_a_wrapper():
    state = {"model.up.weight": np.ones((3, 2)), "model.up.bias": np.ones(3)}
    like = {"params": {"model": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}}
    assert jax.tree.structure(from_torch(state, like).tree) == jax.tree.structure(like)
    assert "up" in from_torch(state).tree["params"]


def test_tied_tensors_are_kept_once():
    result = imported("transformer")
    assert result.report.tied == {"head.weight": "embed.weight"}
    free = from_torch(GOLDEN / "transformer.safetensors", rename=LM_NAMES, heads=4)
    assert "head" not in free.tree["params"]
    assert "tied, kept once: head.weight = embed.weight" in free.report.lines()

    class Untied(nn.Module):  # one that wants both gets both
        @nn.compact
        def __call__(self, x):
            return nn.Dense(61, use_bias=False, name="head")(nn.Embed(61, 32, name="embed")(x))

    like = jax.eval_shape(Untied().init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    both = from_torch(GOLDEN / "transformer.safetensors", like)
    assert not both.report.tied and "pos" in both.report.left_over
    params = both.tree["params"]
    assert_array_equal(params["head"]["kernel"], params["embed"]["embedding"].T)


def test_an_equal_copy_is_left_over():
    def copy(state):
        return state | {"head.weight": state["embed.weight"].copy()}

    assert imported("transformer", rewrite("transformer", copy)).report.left_over == (
        "head.weight",
    )


@models
def test_without_a_template_names_and_shapes_tell(name):
    options = dict(MODELS[name][1])
    if name == "transformer":
        options["heads"] = 4
    free = from_torch(GOLDEN / f"{name}.safetensors", **options)
    want = imported(name).tree
    assert jax.tree.structure(free.tree) == jax.tree.structure(want)
    jax.tree.map(assert_array_equal, free.tree, want)


def test_lists_in_nnx_and_numbers_in_torch_are_one_path():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([BitLinear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)])

    state = {
        f"layers.{i}.{k}": np.full(shape, i + 1.0)
        for i in range(2)
        for k, shape in (("weight", (4, 4)), ("bias", (4,)))
    }
    net = Net()
    tree = from_torch(state, bitnet_jax.nnx.variables(net)).tree
    bitnet_jax.nnx.update(net, tree)
    assert net.layers[1].kernel[...].max() == 2
    assert path_of("a.0.b.1.2.c") == ("a_0", "b_1_2", "c")


def test_attention_with_its_own_key_size():
    def weights(name, *shape):
        return np.random.default_rng(len(name)).standard_normal(shape)

    state = {
        "q_proj_weight": weights("q", 8, 8), "k_proj_weight": weights("kk", 8, 5),
        "v_proj_weight": weights("vvv", 8, 6), "in_proj_bias": np.arange(24.0),
        "out_proj.weight": weights("out", 8, 8), "out_proj.bias": np.ones(8),
        "bias_k": np.ones((1, 1, 8)),
    }  # fmt: skip
    tree = from_torch(state, heads=2).tree["params"]
    assert tree["key"]["kernel"].shape == (5, 2, 4) and tree["out"]["kernel"].shape == (2, 4, 8)
    assert_array_equal(tree["value"]["bias"].ravel(), np.arange(16.0, 24))
    assert_allclose(tree["query"]["kernel"].reshape(8, 8), state["q_proj_weight"].T)
    assert "bias_k" in tree


def test_integers_stay_integers():
    tree = from_torch({"steps": np.arange(3), "up.weight": np.ones((2, 2), np.float64)}).tree
    assert tree["buffers"]["steps"].dtype == jnp.int32
    assert tree["params"]["up"]["kernel"].dtype == jnp.float32


# Shards


def shards(folder, change=lambda index: None):
    folder.mkdir()
    state = load_file(GOLDEN / "mlp.safetensors")
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i}.safetensors"
        save_file({n: state[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one(tmp_path):
    x, y = golden("mlp")
    folder = shards(tmp_path / "m")
    for source in (folder, folder / "model.safetensors.index.json"):
        close(Mlp().apply(imported("mlp", source).tree, x), y)


# What is wrong is said in one line


def refused(source, match, **options):
    with pytest.raises(BitnetError, match=match) as error:
        from_torch(source, **options)
    assert "\n" not in str(error.value)


def test_broken_shards(tmp_path):
    def outside(index):
        index["weight_map"]["out.bias"] = "../secret.safetensors"

    def absent(index):
        index["weight_map"]["extra"] = "model-0.safetensors"

    refused(shards(tmp_path / "a", outside), "'../secret.safetensors' is not beside it")
    refused(shards(tmp_path / "b", absent), "extra is in no shard")
    refused(shards(tmp_path / "c", lambda i: i.clear()), "no weight_map")
    folder = shards(tmp_path / "d")
    (folder / "model-1.safetensors").unlink()
    refused(folder, "shard model-1.safetensors is missing")
    shutil.copy(shards(tmp_path / "e") / "model-0.safetensors", folder / "model-1.safetensors")
    refused(folder, "in two shards")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\0", b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little") + b"{}", b"text" * 9],
    ids=["empty", "short", "huge", "huge header", "text"],
)
def test_files_that_are_no_safetensors(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.safetensors", "not safetensors, or damaged")


def test_a_truncated_file(tmp_path):
    whole = (GOLDEN / "mlp.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-9])
    refused(tmp_path / "x.safetensors", "not safetensors, or damaged")


def test_folders_and_names(tmp_path):
    refused(tmp_path / "no.safetensors", "no such file")
    refused(tmp_path, "holds no weights")
    (tmp_path / "x.onnx").write_bytes(b"1")
    refused(tmp_path / "x.onnx", "not weights by its name")
    for n in "ab":
        save_file({"w": np.ones(2)}, tmp_path / f"{n}.safetensors")
    refused(tmp_path, "several weight files")
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "holds no tensor")
    refused({}, "holds no tensor")


def test_weights_that_do_not_fit():
    like = jax.eval_shape(Mlp().init, jax.random.key(0), golden("mlp")[0])

    def change(**changes):
        state = load_file(GOLDEN / "mlp.safetensors") | changes
        return {k: v for k, v in state.items() if v is not None}

    given = {"like": like, "rename": MLP_NAMES}
    refused(
        change(**{"out.weight": None}), r"out/kernel is missing \(no out.weight\).*rename=", **given
    )
    wrong = change(**{"out.weight": np.ones((6, 32), np.float32)})
    refused(wrong, r"out.weight has shape \(6, 32\), out/kernel needs \(32, 5\)", **given)
    nan = change(**{"out.bias": np.full(5, np.nan, np.float32)})
    refused(nan, "out.bias holds NaN", **given)
    infinite = change(**{"out.bias": np.full(5, np.inf, np.float16)})
    refused(infinite, "out.bias holds infinite values", **given)
    refused(GOLDEN / "mlp.safetensors", "and 5 more", like=like)  # names not mapped
    refused(change(), r"rename '\('", rename=(("(", ""),))
    refused(change(), "both become", rename=((r"net\.\d", "same"),))
    refused(change(), "reads? a picture", flatten={"out": (3, 4, 4)})
    refused(change(), "matches no weight", flatten={"nothing": (3, 4, 4)})
    state = {f"{p}.weight": np.ones((6, 6)) for p in ("query", "key", "value", "out")}
    refused(state, "6 features, which 4 heads do not divide", heads=4)


def test_the_reader_alone():
    found = read(GOLDEN / "transformer.safetensors")
    assert found.tied == {"head.weight": "embed.weight"} and "head.weight" not in found.arrays
    nested = {"epoch": 3, "model": {"state_dict": {"w": np.ones(2), "note": "x"}}, "config": {}}
    found = from_state_dict(nested)
    assert list(found.arrays) == ["w"] and set(found.ignored) == {"epoch", "config", "note"}
