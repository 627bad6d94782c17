"""QK-clip: what it promises about logits, and about ternary codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import BitnetError, Scheme, dequantize, quantize_weights
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.optim import mugrokfast, qk_clip

from .battery import normal

CHANNEL = Scheme("absmean", "channel")


def attention(heads, key_heads, size=8, width=16, bias=False, seed=0):
    kernel = lambda s, n: {"kernel": normal(s, width, n * size)}
    params = {"query": kernel(seed, heads), "key": kernel(seed + 1, key_heads)}
    if bias:
        params["query"]["bias"] = normal(seed + 2, heads * size)
        params["key"]["bias"] = normal(seed + 3, key_heads * size)
    return params


def largest_logits(params, x, heads, scheme=None):
    """max |q.k| / sqrt(size) of each query head, with float or ternary weights."""

    def project(layer):
        w = layer["kernel"]
        if scheme is not None:
            w = dequantize(quantize_weights(w, scheme))
        y = x @ w + layer.get("bias", 0.0)
        return y.reshape(len(x), -1, size)

    size = params["query"]["kernel"].shape[1] // heads
    query, key = project(params["query"]), project(params["key"])
    key = jnp.repeat(key, heads // key.shape[1], axis=1)
    return jnp.abs(jnp.einsum("ihd,jhd->hij", query, key)).max((1, 2)) / size**0.5


def clipped(params, logits, threshold, scheme=None):
    clip = qk_clip(threshold, scheme=scheme)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip.update(zero, clip.init(params), params, max_logits=logits)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("scheme", [None, CHANNEL, Scheme("twn", "channel"), Scheme("absmean", 4)])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_no_logit_exceeds_the_threshold_and_smaller_ones_stay(heads, key_heads, bias, scheme):
    params, x = attention(heads, key_heads, bias=bias), normal(9, 32, 16)
    before = largest_logits(params, x, heads, scheme)
    threshold = float(np.sort(before)[1:3].mean())  # the two smallest stay below
    after = largest_logits(
        clipped({"layer": params}, {"layer": before}, threshold, scheme)["layer"], x, heads, scheme
    )
    assert_allclose(after, jnp.minimum(before, threshold), rtol=1e-4)
    assert (before > threshold).sum() == 2


@pytest.mark.parametrize("scheme", [CHANNEL, Scheme("twn", "channel"), Scheme("threshold", 4)])
def test_codes_stay_and_scales_are_halved(scheme):
    params = {"layer": attention(4, 4)}
    logits = jnp.array([400.0, 50.0, 100.0, 400.0])  # factors of 1/2 for heads 0 and 3
    new = clipped(params, {"layer": logits}, 100.0, scheme)["layer"]
    for name in ("query", "key"):
        a, b = (quantize_weights(p[name]["kernel"], scheme) for p in (params["layer"], new))
        assert_array_equal(a.codes, b.codes)
        factors = np.repeat([0.5, 1.0, 1.0, 0.5], 8)
        assert_array_equal(b.scale, a.scale * factors)


def test_with_one_scale_a_tensor_it_is_refused_and_rightly_so():
    with pytest.raises(BitnetError, match='one scale a tensor.*scale="channel"'):
        qk_clip(scheme=Scheme())
    params = {"layer": attention(4, 4)}
    new = clipped(params, {"layer": jnp.array([400.0, 1.0, 1.0, 1.0])}, 100.0)["layer"]
    a, b = (quantize_weights(p["query"]["kernel"], Scheme()).codes for p in (params["layer"], new))
    changed = (a != b).reshape(16, 4, 8).mean((0, 2))
    assert changed[0] > 0.1 and changed[1:].max() > 0


def test_a_neighbour_in_the_group_keeps_its_logits():
    # Heads 0 and 1 share a key: it is halved for head 0, and head 1's query takes it back.
    params = {"layer": attention(2, 1)}
    new = clipped(params, {"layer": jnp.array([400.0, 1.0])}, 100.0)["layer"]
    ratio = lambda name: (new[name]["kernel"] / params["layer"][name]["kernel"]).mean(0)
    assert_allclose(ratio("key"), 0.5, rtol=1e-5)
    assert_allclose(ratio("query"), np.repeat([0.5, 2.0], 8), rtol=1e-5)


def test_logits_of_a_stack_and_kernels_with_a_head_axis():
    layers = [attention(4, 2, seed=s) for s in (0, 5)]
    logits = jnp.array([[400.0, 1.0, 1.0, 900.0], [1.0, 200.0, 300.0, 1.0]])
    one = [clipped({"a": p}, {"a": s}, 100.0)["a"] for p, s in zip(layers, logits)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    stacked = clipped({"a": stack}, {"a": logits}, 100.0)["a"]
    heads = jax.tree.map(lambda x: x.reshape(2, 16, -1, 8), stack)
    separate = clipped({"a": heads}, {"a": logits}, 100.0)["a"]
    for name in ("query", "key"):
        want = jnp.stack([p[name]["kernel"] for p in one])
        assert_allclose(stacked[name]["kernel"], want, rtol=1e-6)
        assert_allclose(separate[name]["kernel"].reshape(want.shape), want, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 100.0, 0.0])
def test_a_head_without_a_usable_logit_is_left_alone(value):
    params = {"layer": attention(2, 2)}
    new = clipped(params, {"layer": jnp.array([value, value])}, 100.0)
    jax.tree.map(assert_array_equal, new, params)


def test_last_in_a_chain_it_acts_on_the_stepped_parameters_and_on_nothing_else():
    config = DecoderConfig(vocab_size=32, width=32, layers=2, heads=4, kv_heads=2, hidden=32)
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    grads = jax.tree.map(lambda p: normal(3, *p.shape), params)
    plain = mugrokfast(1e-2)
    chain = optax.chain(plain, qk_clip(1.0, scheme=CHANNEL))
    logits = {"layer_1/attention": jnp.array([16.0, 0.5, 1.0, 4.0])}
    step = jax.jit(
        lambda logits: chain.update(grads, chain.init(params), params, max_logits=logits)
    )
    updates, _ = step(logits)
    without, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    got, want = (optax.apply_updates(params, u)["params"] for u in (updates, without))
    factors = {"query": [0.25, 4.0, 2.0, 0.5], "key": [0.25, 0.5]}
    for name, factor in factors.items():
        kernel = want["layer_1"]["attention"][name]["kernel"]
        want["layer_1"]["attention"][name]["kernel"] = kernel * np.repeat(factor, 8)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    nested = {"params": {"layer_1": {"attention": logits["layer_1/attention"]}}}
    again, _ = step(nested)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, updates)


@pytest.mark.parametrize(
    "logits, message",
    [
        (None, "update needs params and max_logits"),
        ({"mlp": jnp.ones(2)}, "max_logits names 'mlp', but there is no mlp/query/kernel"),
        ({"layer": jnp.ones(3)}, "layer: 3 heads do not fit query"),
    ],
)
def test_mistakes_are_told_in_one_line(logits, message):
    with pytest.raises(BitnetError, match=message) as e:
        clipped({"layer": attention(4, 2)}, logits, 100.0)
    assert "\n" not in str(e.value)
