import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import (
    BitnetError,
    PackedTernary,
    Policy,
    Scheme,
    Ternary,
    convert,
    dequantise,
    is_quantized,
    pack,
    quantize_weights,
    ternarise,
    unpack,
)
from bitnet_jax.convert import report

from .battery import normal


def toy():
    return {
        "embed": {"embedding": normal(0, 10, 8)},
        "layer_0": {
            "attention": {"query": {"kernel": normal(1, 8, 8), "bias": normal(2, 8)}},
            "mlp": {"up": {"kernel": normal(3, 8, 6)}},
            "ln_1": {"scale": normal(4, 8)},
            "post_norm": {"kernel": normal(5, 8, 8)},
        },
        "lm_head": {"kernel": normal(6, 8, 10)},
    }


TERNARY = ["layer_0/attention/query/kernel", "layer_0/mlp/up/kernel"]


def formats(result):
    return {x.path: x.format for x in result.report.leaves}


def leaf_of(result, path):
    return next(x for x in result.report.leaves if x.path == path)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"params": t}], ids=["bare", "params"])
def test_default_policy(wrap):
    result = convert(wrap(toy()))
    assert [p for p, f in formats(result).items() if f == "ternary"] == TERNARY
    assert {f for p, f in formats(result).items() if p not in TERNARY} == {"float16"}
    assert result.report.unmatched == ()
    assert jax.tree.structure(
        jax.tree.map(lambda x: 0, result.tree, is_leaf=is_quantized)
    ) == jax.tree.structure(wrap(toy()))


@pytest.mark.parametrize(
    "path, format",
    [
        ("token_embed/embedding", "float16"),
        ("embeddings/kernel", "float16"),
        ("wte/embedding", "float16"),
        ("wpe", "float16"),
        ("head/kernel", "float16"),
        ("lm_head/kernel", "float16"),
        ("heads/kernel", "ternary"),
        ("final_norm/scale", "float16"),
        ("RMSNorm_0/scale", "float16"),
        ("ln_f/bias", "float16"),
        ("kernel", "ternary"),
        ("a/my_kernel", None),
        ("memory/slots", None),
    ],
)
def test_default_formats(path, format):
    assert Policy().format_of(path) == format


def test_report_counts_bytes_and_codes():
    params = toy()
    result = convert(params)
    codes = np.asarray(unpack(result.tree)["layer_0"]["mlp"]["up"]["kernel"].codes)
    up = leaf_of(result, "layer_0/mlp/up/kernel")
    assert (up.shape, up.bytes_before, up.bytes_after, up.note) == ((8, 6), 192, 2 * 6 + 4, "")
    assert [up.minus, up.zeros, up.plus] == [int((codes == v).sum()) for v in (-1, 0, 1)]
    query = leaf_of(result, "layer_0/attention/query/kernel")
    assert query.bytes_after == 2 * 8 + 4
    others = sum(x.size for x in jax.tree.leaves(params)) - 64 - 48
    assert result.report.bytes_before == 4 * (others + 64 + 48)
    assert result.report.bytes_after == 2 * others + 16 + 20
    assert result.report.codes == (
        up.minus + query.minus,
        up.zeros + query.zeros,
        up.plus + query.plus,
    )
    assert sum(result.report.codes) == 64 + 48


def test_report_is_plain_data():
    result = convert(toy() | {"other": jnp.ones((2, 2))})
    data = json.loads(json.dumps(result.report.as_dict()))
    assert data["bytes_after"] == result.report.bytes_after
    assert data["codes"] == dict(zip(("minus", "zeros", "plus"), result.report.codes))
    assert data["unmatched"] == ["other"]
    assert [x["path"] for x in data["leaves"]] == [x.path for x in result.report.leaves]


def test_report_of_an_unpacked_tree():
    params = toy()
    weights = ternarise(params)
    whole, small = report(params, weights), convert(params).report
    assert whole.codes == small.codes
    assert whole.bytes_after - small.bytes_after == (64 - 16) + (48 - 12)


def test_unmatched_matrices_are_listed_with_a_note():
    tree = {
        "slots": normal(0, 3, 4),
        "gate": normal(1, 4),
        "conv": {"kernel": normal(2, 3, 4, 4)},
        "up": {"kernel": normal(3, 4, 4)},
    }
    result = convert(tree)
    assert result.report.unmatched == ("conv/kernel", "slots")
    assert leaf_of(result, "conv/kernel").note.startswith("has 3 axes; say in Policy(inputs=")
    assert leaf_of(result, "slots").note == leaf_of(result, "gate").note == "no rule matches"
    for name in ("slots", "gate", "conv"):
        same(result.tree[name], tree[name])


def test_stacks_are_asked_for_by_name():
    tree = {"up": {"kernel": normal(0, 3, 5, 4)}, "thin": {"kernel": normal(1, 4)}}
    policy = Policy((("kernel$", "ternary-stack"),))
    result = convert(tree, policy, Scheme("twn", 2))
    assert result.tree["up"]["kernel"].shape == (3, 5, 4)
    same(
        unpack(result.tree)["up"]["kernel"],
        jax.jit(quantize_weights, static_argnums=1)(tree["up"]["kernel"], Scheme("twn", 2)),
    )
    assert leaf_of(result, "thin/kernel").note == "has 1 axes; 'ternary-stack' takes 2 or more"
    assert result.report.unmatched == ()


def test_first_rule_that_matches_wins():
    rules = (("up/kernel", "bfloat16"), ("kernel", "ternary"), ("up", "float16"))
    result = convert({"up": {"kernel": jnp.eye(4)}, "down": {"kernel": jnp.eye(4)}}, Policy(rules))
    assert formats(result) == {"up/kernel": "bfloat16", "down/kernel": "ternary"}


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16"])
def test_kept_formats(format):
    result = convert({"a": normal(0, 3, 3)}, Policy(((".", format),)))
    assert result.tree["a"].dtype == jnp.dtype(format)
    assert_array_equal(result.tree["a"], normal(0, 3, 3).astype(format))


@pytest.mark.parametrize(
    "rule, message", [(("a", "int2"), "format 'int2'"), (("(", "ternary"), r"pattern '\('")]
)
def test_bad_policies(rule, message):
    with pytest.raises(ValueError, match=message):
        Policy((rule,))


@pytest.mark.parametrize("f", [convert, ternarise])
@pytest.mark.parametrize(
    "value, what", [(jnp.nan, "NaN"), (jnp.inf, "infinite"), (-jnp.inf, "infinite")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_that_are_not_finite_are_named(f, value, what, dtype):
    params = toy()
    kernel = params["layer_0"]["mlp"]["up"]["kernel"].astype(dtype)
    params["layer_0"]["mlp"]["up"]["kernel"] = kernel.at[1, 2].set(value)
    with pytest.raises(BitnetError) as error:
        f({"params": params})
    assert str(error.value).startswith(f"layer_0/mlp/up/kernel: holds {what}")
    assert "\n" not in str(error.value)


def test_values_that_outgrow_float16_keep_their_dtype():
    result = convert({"a": {"bias": jnp.array([1e6, 1.0])}, "b": {"bias": jnp.array([65504.0])}})
    assert result.tree["a"]["bias"].dtype == jnp.float32
    assert leaf_of(result, "a/bias").note == "outgrows float16"
    assert result.tree["b"]["bias"].dtype == jnp.float16
    assert np.isfinite(result.tree["b"]["bias"]).all()


def test_integers_are_left_alone():
    tree = {"head": {"kernel": jnp.arange(4).reshape(2, 2)}, "kernel": jnp.ones((2, 2), bool)}
    result = convert(tree)
    same(result.tree, tree)
    assert {x.note for x in result.report.leaves} == {""}


def test_empty_tree_and_empty_leaf():
    assert convert({}).report.leaves == ()
    assert convert({"head": jnp.zeros((0, 3))}).tree["head"].dtype == jnp.float16


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("twn", 3)], ids=str)
def test_pack_unpack_and_dequantise(scheme):
    weights = ternarise({"params": toy()}, scheme=scheme)
    small = pack(weights)
    kernel = weights["params"]["layer_0"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, Ternary)
    assert isinstance(small["params"]["layer_0"]["mlp"]["up"]["kernel"], PackedTernary)
    same(unpack(small), weights)
    same(pack(small), small)
    same(convert({"params": toy()}, scheme=scheme).tree, small)
    values = dequantise(small)
    same(dequantise(weights), values)
    got = values["params"]["layer_0"]["mlp"]["up"]["kernel"]
    rows = np.arange(8) // (kernel.group or 8)
    assert got.dtype == jnp.float32
    assert_array_equal(got, np.asarray(kernel.codes) * np.asarray(kernel.scale)[rows])


def test_scheme_reaches_the_leaves():
    params = {"kernel": normal(0, 8, 4)}
    leaf = convert(params, scheme=Scheme("threshold", "channel", 0.5)).tree["kernel"]
    assert leaf.scale.shape == (1, 4)
    assert_allclose(leaf.scale[0], jnp.abs(params["kernel"]).mean(0), rtol=1e-6)
