import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bitnet_jax import BitnetError, Scheme, convert
from bitnet_jax.models.decoder import ACTIVATIONS, DecoderConfig
from bitnet_jax.models.folder import ModelFolder, PythonModule, load_model, save_model
from bitnet_jax.subnorm import change, insert_sub_norms, moments
from bitnet_jax.train import data

VOCAB = 300
CONFIG = DecoderConfig(vocab_size=VOCAB, width=32, layers=2, heads=2, kv_heads=1, hidden=48)
TOKENS, HELD_OUT = (
    np.random.default_rng(i).integers(0, VOCAB, (6, 17)).astype(np.int32) for i in range(2)
)
SITES = [(f"layer_{i}", part) for i in range(2) for part in ("attention", "mlp")]


def decoder(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = config.build(None).init(jax.random.key(0), TOKENS)
    tokenizer = data.train_tokenizer(["def f(x): return x\n"] * 9, VOCAB)
    # Untrained activations are small; these are not, so that what a norm does is seen.
    return ModelFolder(config, None, jax.tree.map(lambda x: 3 * x, params), tokenizer)


@pytest.fixture(scope="module")
def source():
    return decoder()


@pytest.fixture(scope="module")
def changed(source):
    return insert_sub_norms(source, TOKENS)


def scale(folder, site):
    return folder.params["params"][site[0]][site[1]]["sub_norm"]["scale"]


def mixed(folder, site):
    """What a norm is given, in float64."""
    _, extra = folder.model.apply(folder.params, TOKENS[:, :-1], mutable=[ACTIVATIONS])
    return np.asarray(extra[ACTIVATIONS][site[0]][site[1]]["mixed"][0], np.float64)


def error(y, g):
    """How far g y / r is from y, summed over tokens."""
    return ((g * y / np.sqrt((y**2).mean(-1, keepdims=True) + CONFIG.norm_eps) - y) ** 2).sum()


def test_moments_are_the_formula():
    y = np.random.default_rng(0).standard_normal((3, 5, 7)) * 4
    r = np.sqrt((y**2).mean(-1) + 0.1)
    wanted = ((y**2).sum(-1) / r).sum(), ((y**2).sum(-1) / r**2).sum()
    np.testing.assert_allclose(moments(jnp.asarray(y, jnp.float32), 0.1), wanted, rtol=1e-6)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_each_scale_changes_its_input_least_in_the_model_as_changed_so_far(changed, site):
    y, found = mixed(changed, site), scale(changed, site)
    g = float(found[0])
    assert (found == g).all() and found.dtype == jnp.float32
    r = np.sqrt((y**2).mean(-1) + CONFIG.norm_eps)
    total = (y**2).sum(-1)
    assert g == pytest.approx((total / r).sum() / (total / r**2).sum(), rel=1e-5)
    assert error(y, g) < min(error(y, 0.99 * g), error(y, 1.01 * g), error(y, 1.0))


def test_norms_go_in_from_below(source, changed):
    """The first is that of the source; one above has seen what those below it did."""
    np.testing.assert_array_equal(mixed(source, SITES[0]), mixed(changed, SITES[0]))
    for site in SITES[1:]:
        y, unchanged = mixed(changed, site), mixed(source, site)
        assert abs(y - unchanged).max() > 1e-4 * abs(unchanged).max()


def test_the_source_stays_and_its_arrays_are_shared(source, changed):
    assert not source.config.sub_norms and "sub_norm" not in str(jax.tree.structure(source.params))
    assert changed.config == dataclasses.replace(source.config, sub_norms=True)
    ours = dict(jax.tree_util.tree_leaves_with_path(changed.params))
    for path, x in jax.tree_util.tree_leaves_with_path(source.params):
        assert ours.pop(path) is x
    assert len(ours) == len(SITES)
    fresh = changed.model.init(jax.random.key(0), TOKENS)
    assert jax.tree.map(jnp.shape, changed.params) == jax.tree.map(jnp.shape, fresh)


def test_where_all_tokens_are_equally_long_nothing_changes(source):
    """One token again and again: r is the same everywhere, and g is r."""
    same = np.full((2, 9), 7, np.int32)
    after = insert_sub_norms(source, same)
    a, b = (m.model.apply(m.params, same) for m in (source, after))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
    assert change(source, after, same)["top1"] == 1.0
    assert change(source, after, HELD_OUT)["kl"] > 1e-4  # other text is another matter


def test_the_model_is_nearer_to_its_source_than_with_scales_of_one(source, changed):
    ones = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if "sub_norm" in str(path) else x, changed.params
    )
    near, far = (
        change(source, dataclasses.replace(changed, params=p), HELD_OUT)
        for p in (changed.params, ones)
    )
    assert 0 < near["kl"] < far["kl"] and near["top1"] > far["top1"]
    assert near["loss_before"] == far["loss_before"]


def test_the_batch_does_not_matter(source, changed):
    other = insert_sub_norms(source, TOKENS, batch=5)
    for site in SITES:
        np.testing.assert_allclose(scale(other, site), scale(changed, site), rtol=1e-5)


def test_a_network_that_is_silent_there_keeps_a_scale_of_one(source):
    silent = jax.tree.map(jnp.zeros_like, source.params)
    after = insert_sub_norms(dataclasses.replace(source, params=silent), TOKENS)
    assert all((scale(after, site) == 1).all() for site in SITES)


def test_the_result_is_a_model_like_any_other(changed, tmp_path):
    save_model(tmp_path / "m", changed)
    again = load_model(tmp_path / "m")
    assert again.config == changed.config
    jax.tree.map(np.testing.assert_array_equal, again.params, changed.params)
    scheme = Scheme("twn", "channel")
    packed = convert(changed.params, scheme=scheme).tree
    assert np.isfinite(changed.config.build(scheme).apply(packed, TOKENS)).all()


def test_what_changed_is_said(source):
    text = io.StringIO()
    insert_sub_norms(source, TOKENS, console=Console(file=text, width=200))
    assert text.getvalue().startswith("sub-norms: loss ") and "KL" in text.getvalue()


def test_what_cannot_have_sub_norms_is_told(source, changed):
    wrong = {
        "has them already": (changed, TOKENS),
        "ternary already": (dataclasses.replace(source, scheme=Scheme()), TOKENS),
        "only a Decoder": (dataclasses.replace(source, config=PythonModule("a.py:Net")), TOKENS),
        "no text": (source, TOKENS[:0]),
        "one window": (source, TOKENS[:, :1]),
    }
    for line, given in wrong.items():
        with pytest.raises(BitnetError, match=f"^sub-norms: .*{line}"):
            insert_sub_norms(*given)
