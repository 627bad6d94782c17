import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitnet_jax
from bitnet_jax.models.decoder import Decoder, DecoderConfig, empty_cache, max_logits, rotary
from bitnet_jax.models.generate import Sampling, draw, generate, stream
from bitnet_jax.optim import qk_clip

SMALL = DecoderConfig(vocab_size=48, width=64, layers=2, heads=4, kv_heads=2, hidden=96)
TWN = bitnet_jax.Scheme("twn", "channel")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 9)))
VARIANTS = {
    "silu": {},
    "relu2 with sub-norms": {"activation": "relu2", "sub_norms": True},
    "untied": {"tied": False},
    "one key head": {"kv_heads": 1},
}


def build(scheme=None, **changes):
    model = Decoder(dataclasses.replace(SMALL, **changes), scheme)
    return model, model.init(jax.random.key(1), TOKENS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("scheme", [None, TWN], ids=["float", "ternary"])
def test_cache_gives_the_logits_of_the_whole_sequence(changes, scheme):
    model, params = build(scheme, **changes)
    whole = model.apply(params, TOKENS)
    cache, parts = empty_cache(model.config, 2, 16), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        logits, cache = model.apply(params, TOKENS[:, start:stop], cache, start)
        parts.append(logits)
    # A ternary layer may round a borderline activation the other way; float sums differ in order.
    tolerance = 2e-5 if scheme is None else 2e-2
    spread = float(whole.std())
    assert float(jnp.abs(jnp.concatenate(parts, 1) - whole).max()) < tolerance * spread


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_no_position_sees_a_later_token(changes):
    model, params = build(TWN, **changes)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 48)
    a, b = model.apply(params, TOKENS), model.apply(params, changed)
    assert (a[:, :5] == b[:, :5]).all()
    assert (a[:, 5:] != b[:, 5:]).any()


def test_float_and_ternary_models_share_one_tree():
    shapes = [jax.tree.map(jnp.shape, build(s)[1]) for s in (None, TWN)]
    assert shapes[0] == shapes[1]


def test_the_default_policy_makes_every_block_matrix_ternary_and_nothing_else():
    _, params = build(tied=False)
    report = bitnet_jax.convert(params).report
    ternary = [x.path for x in report.leaves if x.format == "ternary"]
    assert len(ternary) == 2 * 7 and all("attention" in p or "mlp" in p for p in ternary)
    assert {x.format for x in report.leaves} == {"ternary", "float16"}
    assert report.unmatched == ()


def test_packed_tree_gives_the_logits_of_the_latent_one():
    model, params = build(TWN)
    # Only the matrices: the other leaves stay float32, so nothing but codes and scale may differ.
    packed = bitnet_jax.convert(params, bitnet_jax.Policy((("kernel$", "ternary"),)), TWN).tree
    a, b = model.apply(params, TOKENS), model.apply(packed, TOKENS)
    assert float(jnp.abs(a - b).max()) < 2e-2 * float(a.std())


def test_remat_changes_memory_not_gradients():
    def grads(remat):
        model, params = build(TWN, remat=remat)
        return jax.grad(lambda p: (model.apply(p, TOKENS) ** 2).mean())(params)

    for a, b in zip(jax.tree.leaves(grads(False)), jax.tree.leaves(grads(True))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rotary_keeps_lengths_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    products = [
        float((rotary(q, jnp.array([a]), 1e4) * rotary(k, jnp.array([b]), 1e4)).sum())
        for a, b in ((3, 1), (12, 10))
    ]
    assert products[0] == pytest.approx(products[1], abs=1e-5)
    length = jnp.linalg.norm(rotary(q, jnp.array([7]), 1e4))
    assert float(length) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{"heads": 3}, {"kv_heads": 3}, {"width": 12, "heads": 4}, {"activation": "gelu"}]
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match="heads|activation"):
        dataclasses.replace(SMALL, **changes)


def test_greedy_generation_is_argmax_step_by_step():
    model, params = build()
    out = generate(model, params, TOKENS, 5)
    tokens = TOKENS
    for _ in range(5):
        tokens = jnp.concatenate([tokens, model.apply(params, tokens)[:, -1:].argmax(-1)], axis=1)
    assert (out == tokens).all()


def test_sampling_follows_its_key_and_top_k_one_is_greedy():
    model, params = build()
    text = lambda seed, how: generate(model, params, TOKENS, 6, jax.random.key(seed), how)
    assert (text(0, Sampling(1.0)) == text(0, Sampling(1.0))).all()
    assert (text(0, Sampling(1.0)) != text(1, Sampling(1.0))).any()
    assert (text(0, Sampling(1.0, 1)) == generate(model, params, TOKENS, 6)).all()


def test_generation_runs_from_packed_weights():
    model, params = build(TWN)
    packed = bitnet_jax.convert(params, scheme=TWN).tree
    assert generate(model, packed, TOKENS[:1], 4).shape == (1, 13)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (TOKENS[:, :0], (3,), "empty"),
        (TOKENS, (600,), "max_length"),
        (TOKENS, (3, None, Sampling(0.5)), "key"),
    ],
)
def test_generation_says_what_is_wrong(prompt, arguments, message):
    model, params = build()
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompt, *arguments)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.8, 5, 0.9)], ids=["greedy", "sampled"])
def test_streaming_gives_the_tokens_of_the_whole(how):
    model, params = build(TWN)
    key = jax.random.key(3)
    whole = generate(model, params, TOKENS, 5, key, how)[:, TOKENS.shape[1] :]
    assert (jnp.stack(list(stream(model, params, TOKENS, 5, key, how)), 1) == whole).all()


def test_a_network_without_a_cache_streams_the_same():
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return Decoder(SMALL, name="inner")(tokens)

    model, params = build()
    wrapped = {"params": {"inner": params["params"]}}
    want = list(stream(model, params, TOKENS, 4))
    got = list(stream(Wrapped(), wrapped, TOKENS, 4))
    assert (jnp.stack(got) == jnp.stack(want)).all()


def test_nucleus_keeps_the_fewest_tokens_that_reach_it():
    shares = jnp.array([[0.4, 0.3, 0.2, 0.1]])
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = lambda how: set(jax.vmap(lambda k: draw(jnp.log(shares), k, how)[0])(keys).tolist())
    assert drawn(Sampling(1.0)) == {0, 1, 2, 3}
    assert drawn(Sampling(1.0, top_p=0.69)) == {0, 1}
    assert drawn(Sampling(1.0, top_p=0.71)) == {0, 1, 2}
    assert drawn(Sampling(1.0, top_p=1e-6)) == {0}
    assert drawn(Sampling(1.0, top_k=3, top_p=0.5)) == {0, 1}  # of three, 0.44 and 0.33


@pytest.mark.parametrize("wrong", [(-1.0,), (1.0, -1), (1.0, 0, 0.0), (1.0, 0, 1.5)])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match="temperature|top_k|top_p"):
        Sampling(*wrong)


@pytest.mark.parametrize("scheme", [None, TWN], ids=["float", "ternary"])
def test_qk_clip_bounds_the_decoders_own_logits(scheme):
    model, params = build(scheme)
    for name in ("query", "key"):
        params["params"]["layer_1"]["attention"][name]["kernel"] *= 9.0

    def logits(params):
        return max_logits(model.apply(params, TOKENS, mutable=["intermediates"])[1])

    before, bound = logits(params), 5.0
    assert before["layer_1/attention"].shape == (4,) and before["layer_1/attention"].max() > bound
    clip = qk_clip(bound, scheme=scheme)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip.update(zero, clip.init(params), params, max_logits=before)
    after = logits(jax.tree.map(jnp.add, params, updates))
    for path in before:
        wanted = jnp.minimum(before[path], bound)
        assert jnp.allclose(after[path], wanted, rtol=0.03), path  # 8-bit inputs round differently
    assert "intermediates" not in params


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model, params = build(TWN, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, exact = model.apply(params, TOKENS), build(TWN)[0].apply(params, TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()
    packed = bitnet_jax.convert(params, scheme=TWN).tree
    assert jnp.isfinite(model.apply(packed, TOKENS)).all()
    with pytest.raises(ValueError, match="dtype"):
        dataclasses.replace(SMALL, dtype="int8")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_in_integers(tied):
    model, params = build(TWN, tied=tied)
    rules = (("embed|head", "int8"), ("kernel", "ternary"))
    small = bitnet_jax.convert(params, bitnet_jax.Policy(rules), TWN)
    assert {x.format for x in small.report.leaves} == {"ternary", "int8", "float32"}
    a, b = model.apply(small.tree, TOKENS), model.apply(params, TOKENS)
    assert jnp.abs(a - b).max() < 0.05 * jnp.abs(b).max()
