import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitnet_jax
from bitnet_jax import BitDense, BitDenseGeneral, BitnetError, Policy, Scheme, ternarise
from bitnet_jax.calibrate import calibrate, latent_start
from bitnet_jax.models.decoder import Decoder, DecoderConfig, stages
from bitnet_jax.quantize import dequantize, quantize_weights, round_activations
from bitnet_jax.reconstruct import corrected, damped, reconstruct

TWN = Scheme("twn", "channel")


def inputs(rows=128, size=16, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((size, size)) + 2 * np.eye(size)
    return jnp.asarray(rng.standard_normal((rows, size)) @ mixing, jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(BitDense(24, scheme=TWN, name="up")(x))
        return BitDense(8, scheme=TWN, name="down")(x)


def same(a, b):
    assert (a.codes == b.codes).mean() > 0.99
    np.testing.assert_allclose(a.scale, b.scale, rtol=2e-2)


def test_two_layers_by_hand():
    """The second matrix sees 8-bit outputs of the converted first and is corrected for them."""
    x = inputs()
    params = Net().init(jax.random.key(0), x)
    tree = calibrate(params, Net().apply, [x[:64], x[64:]])["params"]
    up, down = params["params"]["up"], params["params"]["down"]
    rounded = round_activations(x)
    gram = rounded.T @ rounded
    first = reconstruct(corrected(up["kernel"], gram, rounded.T @ x), damped(gram))
    same(tree["up"]["kernel"], first)
    true = nn.relu(x @ up["kernel"] + up["bias"])
    changed = round_activations(nn.relu(rounded @ dequantize(first) + up["bias"]))
    gram = changed.T @ changed
    second = reconstruct(corrected(down["kernel"], gram, changed.T @ true), damped(gram))
    same(tree["down"]["kernel"], second)
    assert tree["up"]["bias"].dtype == jnp.float16


@pytest.mark.parametrize("scheme", [Scheme("absmean"), TWN, Scheme("twn", 8)], ids=str)
def test_outputs_change_less_than_by_the_rule(scheme):
    config = DecoderConfig(vocab_size=64, width=32, layers=2, heads=2, kv_heads=1, hidden=48)
    tokens = jax.random.randint(jax.random.key(1), (24, 16), 0, 64)
    params = Decoder(config).init(jax.random.key(0), tokens)
    wanted = Decoder(config).apply(params, tokens)
    ternary = Decoder(config, scheme)
    error = lambda tree: float(jnp.mean((ternary.apply(tree, tokens) - wanted) ** 2))
    data = calibrate(params, stages(config, scheme), [tokens[:12], tokens[12:]], scheme=scheme)
    assert error(data) < 0.5 * error(ternarise(params, scheme=scheme))


def test_stages_are_the_network_in_parts():
    config = DecoderConfig(vocab_size=64, width=32, layers=2, heads=2, kv_heads=1, hidden=48)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    params = Decoder(config).init(jax.random.key(0), tokens)
    parts = calibrate(params, stages(config, TWN), [tokens])
    whole = calibrate(params, Decoder(config, TWN).apply, [tokens])
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=bitnet_jax.is_quantized)
    for a, b in zip(leaves(parts), leaves(whole), strict=True):
        if bitnet_jax.is_quantized(a):
            same(a, b)


class Stack(nn.Module):
    """Layers stacked by scan, recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(lambda m, x, _: (nn.relu(m(x)), None), prevent_cse=False)
        body = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return body(BitDense(16, use_bias=False, scheme=TWN, name="layers"), x, None)[0]


def test_matrices_stacked_by_scan():
    x = inputs()
    params = Stack().init(jax.random.key(0), x)
    policy = Policy((("kernel", "ternary-stack"),))
    leaf = calibrate(params, Stack().apply, [x], policy, TWN)["params"]["layers"]["kernel"]
    assert leaf.codes.shape == (3, 16, 16)
    assert leaf.scale.shape == (3, 1, 16)
    rounded = round_activations(x)
    gram = rounded.T @ rounded
    kernel = params["params"]["layers"]["kernel"]
    first = reconstruct(corrected(kernel[0], gram, rounded.T @ x), damped(gram))
    assert (leaf.codes[0] == first.codes).mean() > 0.99
    assert not bool((leaf.codes[2] == quantize_weights(kernel[2], TWN).codes).all())


class Shared(nn.Module):
    """One matrix used twice, under vmap, with several axes: its inputs are all of them."""

    @nn.compact
    def __call__(self, x):
        layer = BitDenseGeneral((4, 4), use_bias=False, scheme=TWN, name="dense")
        y = layer(x).reshape(x.shape)
        return layer(y)


def test_a_shared_matrix_sees_the_inputs_of_every_call():
    x = inputs()
    params = Shared().init(jax.random.key(0), x)
    policy = Policy((("kernel", "ternary"),), inputs=(("kernel", 1),))
    batched = lambda tree, x: jax.vmap(lambda row: Shared().apply(tree, row))(x)
    leaf = calibrate(params, batched, [x], policy, TWN)["params"]["dense"]["kernel"]
    assert leaf.shape == (16, 4, 4)
    w = params["params"]["dense"]["kernel"].reshape(16, 16)
    start = dequantize(quantize_weights(w, TWN))
    true = jnp.concatenate([x, x @ w])
    changed = jnp.concatenate(
        [round_activations(x), round_activations(round_activations(x) @ start)]
    )
    gram = changed.T @ changed
    wanted = reconstruct(corrected(w, gram, changed.T @ true), damped(gram))
    assert (leaf.codes == wanted.codes).mean() > 0.98


class Unused(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = BitDense(8, scheme=TWN, name="seen")(x)
        BitDense(8, scheme=TWN, name="hidden")(jax.lax.stop_gradient(x))
        return y


def test_what_no_input_reaches_goes_by_the_rule():
    x = inputs()
    params = Unused().init(jax.random.key(0), x)
    params["params"]["idle"] = {"kernel": jnp.eye(4)}
    tree = calibrate(params, Unused().apply, [x])["params"]
    rule = ternarise(params, scheme=TWN)["params"]
    for name in ("hidden", "idle"):
        assert bool((tree[name]["kernel"].codes == rule[name]["kernel"].codes).all())
    assert not bool((tree["seen"]["kernel"].codes == rule["seen"]["kernel"].codes).all())


def test_mistakes_are_told():
    x = inputs()
    params = Net().init(jax.random.key(0), x)
    with pytest.raises(BitnetError, match="no batches"):
        calibrate(params, Net().apply, [])
    broken = jax.tree.map(lambda w: w.at[0].set(jnp.nan), params)
    with pytest.raises(BitnetError, match="NaN"):
        calibrate(broken, Net().apply, [x])


@pytest.mark.parametrize("scheme", [
    TWN, Scheme("twn", 8), Scheme("twn", "tensor"), Scheme("absmean"), Scheme("absmean", "channel"),
    Scheme("absmean", 8), Scheme("threshold", "channel"),
], ids=str)  # fmt: skip
def test_the_start_of_training_quantises_to_what_was_converted(scheme):
    x = inputs()
    params = Net().init(jax.random.key(0), x)
    tree = calibrate(params, Net().apply, [x], scheme=scheme)
    start = latent_start(params, tree, scheme, keep=0.0)
    for name in ("up", "down"):
        again = quantize_weights(start["params"][name]["kernel"], scheme)
        leaf = tree["params"][name]["kernel"]
        assert bool((again.codes == leaf.codes).all())
        np.testing.assert_allclose(again.scale, leaf.scale, rtol=1e-5)
    assert start["params"]["up"]["bias"] is params["params"]["up"]["bias"]
    kept = latent_start(params, tree, scheme, keep=1.0)["params"]["up"]["kernel"]
    np.testing.assert_allclose(kept, params["params"]["up"]["kernel"], atol=1e-6)
