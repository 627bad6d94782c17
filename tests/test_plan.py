"""Planning for a size: exact bytes, the least damage, refusals."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import BitnetError, Policy, Scheme, convert, dequantize, quantize_weights
from bitnet_jax.convert import path_name
from bitnet_jax.embed import attend, take
from bitnet_jax.interop.torch import from_torch
from bitnet_jax.leaf import is_quantized
from bitnet_jax.packed import pack_weight
from bitnet_jax.plan import FORMATS, Option, _solve, component, plan, rounded, table
from bitnet_jax.policy import scheme_of

TWN = Scheme("twn", "channel")


def bert() -> dict:
    """A state dict as a BERT-like encoder has it, of an architecture nobody told us."""
    random = np.random.default_rng(0)
    new = lambda *shape: random.normal(0, 0.05, shape).astype(np.float32)
    state = {
        "embeddings.word_embeddings.weight": new(300, 48),
        "embeddings.position_embeddings.weight": new(64, 48),
        "embeddings.position_ids": np.arange(64)[None],
        "embeddings.LayerNorm.weight": new(48),
        "embeddings.LayerNorm.bias": new(48),
        "pooler.dense.weight": new(48, 48),
        "pooler.dense.bias": new(48),
    }
    for i in range(3):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            state[f"{layer}.attention.self.{part}.weight"] = new(48, 48)
            state[f"{layer}.attention.self.{part}.bias"] = new(48)
        state[f"{layer}.intermediate.dense.weight"] = new(192, 48)
        state[f"{layer}.output.dense.weight"] = new(48, 192)
        state[f"{layer}.output.LayerNorm.weight"] = new(48)
    return state


@pytest.fixture(scope="module")
def tree():
    return from_torch(bert()).tree


def test_a_component_is_the_same_place_in_every_layer():
    assert component("encoder/layer_12/output/dense/kernel") == "encoder/layer_*/output/dense"
    assert component("blocks/3/mlp/0/kernel") == "blocks/*/mlp/*"


@pytest.mark.parametrize("target", [2.1, 5, 8.2, 11])
def test_planned_bytes_are_the_converted_ones(tree, target):
    found = plan(tree, target, TWN)
    report = convert(tree, found.policy, TWN).report
    assert report.bytes_after == found.bytes_after
    assert found.ratio >= target
    planned = {path: row.chosen.format for row in found.rows for path in row.paths}
    formats = {x.path: x.format for x in report.leaves}
    assert {path: formats[path] for path in planned} == planned
    matrices = [x for x in report.leaves if len(x.shape) > 1 and "buffers" not in x.path]
    assert {x.path for x in matrices} == set(planned)
    assert len(found.rows) == len({component(x.path) for x in matrices})


def test_integers_stay_as_they_are(tree):
    found = plan(tree, 8.2, TWN)
    ids = convert(tree, found.policy, TWN).tree["buffers"]["embeddings"]["position_ids"]
    assert ids.dtype == jnp.int32 and int(ids[0, 63]) == 63


def test_more_asked_is_never_less_damage(tree):
    damages = [plan(tree, target, TWN).damage for target in (1.5, 3, 4, 6, 8, 10, 12)]
    assert damages == sorted(damages) and damages[0] < damages[-1]


def test_refusal_names_the_best_that_can_be_reached(tree):
    with pytest.raises(BitnetError, match="cannot be reached: the best is") as e:
        plan(tree, 100, TWN, overhead=1000)
    best = re.search(r"best is ([\d.]+)x", str(e.value))
    assert best and plan(tree, float(best[1]), TWN, overhead=1000).ratio >= float(best[1])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("target", [0, -1, float("nan")])
def test_a_target_is_above_zero(tree, target):
    with pytest.raises(BitnetError, match="above 0"):
        plan(tree, target, TWN)


def test_the_overhead_counts(tree):
    assert plan(tree, 6, TWN, overhead=20_000).bytes_after < plan(tree, 6, TWN).bytes_after


@pytest.mark.parametrize("seed", range(20))
def test_least_damage_as_by_trying_everything(seed):
    random = np.random.default_rng(seed)
    options = [
        tuple(
            Option(str(i), int(random.integers(1, 50)), float(random.random()))
            for i in range(random.integers(1, 5))
        )
        for _ in range(5)
    ]
    budget = int(random.integers(5, 150))
    fits = [c for c in itertools.product(*options) if sum(o.bytes for o in c) <= budget]
    picked = _solve(options, budget)
    if not fits:
        assert picked is None
        return
    assert picked is not None
    chosen = [part[i] for part, i in zip(options, picked)]
    assert sum(o.bytes for o in chosen) <= budget
    least = min(sum(o.damage for o in c) for c in fits)
    assert sum(o.damage for o in chosen) == pytest.approx(least)


def test_many_components_stay_feasible_and_quick():
    random = np.random.default_rng(0)
    options = [
        tuple(
            Option(str(i), int(random.integers(1, 10**6)), float(random.random())) for i in range(4)
        )
        for _ in range(40)
    ]
    least = sum(min(o.bytes for o in part) for part in options)
    assert _solve(options, least) is not None
    assert _solve(options, least - 1) is None


def test_measured_damage_decides(tree):
    harmful = "embeddings/word_embeddings"
    damage = lambda part, format: 10.0 if part == harmful and format != "float16" else 0.0
    found = plan(tree, 3, TWN, damage=damage)
    assert {r.component: r.chosen.format for r in found.rows}[harmful] == "float16"


def test_predicted_damage_is_noise_over_signal(tree):
    kernel = tree["params"]["pooler"]["dense"]["kernel"]
    row = next(r for r in plan(tree, 8.2, TWN).rows if r.component == "pooler/dense")
    for option in row.options:
        if option.format == "float16":
            assert option.damage == 0
            continue
        values = dequantize(quantize_weights(kernel, scheme_of(option.format, "kernel", TWN)))
        noise = np.sum((np.float64(kernel) - np.float64(values)) ** 2) / np.sum(
            np.float64(kernel) ** 2
        )
        assert option.damage == pytest.approx(noise, rel=1e-5)
    assert sorted(o.format for o in row.options) == sorted(FORMATS)


def test_what_is_fixed_is_not_chosen_for(tree):
    found = plan(tree, 4, TWN, fixed=((r"^pooler/", "float32"),))
    assert "pooler/dense" not in [r.component for r in found.rows]
    leaf = convert(tree, found.policy, TWN).tree["params"]["pooler"]["dense"]["kernel"]
    assert leaf.dtype == jnp.float32


def test_kernels_of_several_axes_are_chosen_for_if_told():
    params = {"heads": {"kernel": jax.random.normal(jax.random.key(0), (16, 4, 8))}}
    assert plan(params, 1.9, TWN).rows == ()
    found = plan(params, 6, TWN, inputs=((r"heads/kernel", 1),))
    leaf = convert(params, found.policy, TWN).tree["heads"]["kernel"]
    assert is_quantized(leaf) and leaf.shape == (16, 4, 8)


def test_the_table_says_what_becomes_of_everything(tree):
    from rich.console import Console

    found, console = plan(tree, 8.2, TWN, overhead=5), Console(width=100, record=True)
    console.print(table(found))
    text = console.export_text()
    assert all(row.component in text for row in found.rows)
    assert f"{found.ratio:.2f}x smaller, asked 8.2x" in text
    assert max(map(len, text.splitlines())) <= 100
    assert found.as_dict()["ratio"] == found.ratio


@pytest.mark.parametrize("rule", ["twn", "absmean", "sherry"])
def test_a_ternary_table_has_a_scale_a_row(rule):
    x = jax.random.normal(jax.random.key(0), (10, 6)) * jnp.arange(1, 11)[:, None]
    policy, scheme = Policy((("embedding", "ternary"),)), Scheme(rule, "channel")
    leaf = convert({"embedding": x}, policy, scheme).tree["embedding"]
    assert leaf.scale.shape == (10, 1)
    values = rounded("embedding", x, policy, scheme)
    ids = jnp.array([[3, 0], [9, 3]])
    np.testing.assert_array_equal(take(leaf, ids), values[ids])
    query = jax.random.normal(jax.random.key(1), (2, 6))
    np.testing.assert_allclose(attend(query, leaf), query @ values.T, rtol=1e-5, atol=1e-5)
    own = scheme_of("ternary", "embed/embedding", scheme)
    assert pack_weight(quantize_weights(x, own)).codes.shape == leaf.codes.shape


def test_names_are_of_parameters(tree):
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert any(n.startswith("buffers/") for n in names)
    assert not any(r.component.startswith("buffers") for r in plan(tree, 4, TWN).rows)
