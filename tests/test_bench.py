"""`bitnet-jax bench`, with everything small: what is timed is right, and what is told is there."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bitnet_jax import Scheme, cli, dequantize, quantize_activations, quantize_weights
from bitnet_jax.bench import floor, peers, run, show, step

SMALL = {"LAYERS": 1, "WIDTH": 32, "HIDDEN": 48, "HEADS": 2, "VOCAB": 64, "BATCH": 2, "LENGTH": 8}


@pytest.fixture
def small(monkeypatch):
    for name, size in SMALL.items():
        monkeypatch.setattr(step, name, size)
    monkeypatch.setattr(floor, "_SIZE", 64)
    monkeypatch.setattr(floor, "_BYTES", 1 << 16)
    real = run.product_row
    monkeypatch.setattr(
        run, "product_row", lambda rows, k, n, torch, copies: real(rows, 64, 96, torch, copies)
    )


def check(found):
    names = ["matvec-64x96-cold", "matmul-128x64x96", "train-step-25m"]
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        fastest = min(x["ms"] for n, x in row["peers"].items() if n.startswith("XLA float32"))
        assert row["speedup_vs_float32"] == pytest.approx(fastest / row["ms"])
        assert row["floor_share"] == pytest.approx(row["floor"]["ms"] / row["ms"])
        for x in (row, *row["peers"].values()):
            assert 0 < x["low"] <= x["ms"] <= x["high"]


def test_the_command(small, tmp_path, capsys):
    told, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert cli.main(["bench", "--quick", "--json", str(told), "--plot", str(picture)]) == 0
    found, out = json.loads(told.read_text()), capsys.readouterr().out
    check(found)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for row in found["rows"]:
        floor = row["floor"]["what"].split()[0]  # the rest may stand on the next line
        assert row["name"] in out and f"{row['ms']:.3f}" in out and floor in out
    assert list(show.lines(found["rows"][0])).index(run.OURS) >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--plot", "/nowhere/x.png"), "its folder must exist"), (("--threads", "0"), "--threads 0")],
)
def test_mistakes_cost_no_time(flags, message, capsys):
    assert cli.main(["bench", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 5])
def test_all_of_them_multiply_the_same_matrix(rows):
    weights = peers.Weights.make(rows, 64, 96, 2)
    w, x = weights.floats[0], weights.x
    codes, scale = quantize_activations(x)
    ternary = np.asarray(codes * scale) @ np.asarray(dequantize(quantize_weights(w, Scheme())))
    calls = {run.OURS: peers.ours(weights), **peers.xla(weights)}
    for name, call in calls.items():
        outs, expected = call(), ternary if name == run.OURS else x @ w
        assert len(outs) == 2
        far = 0.05 if "bfloat16" in name else 1e-5
        for out in outs:
            assert_allclose(out, expected, atol=far * np.abs(expected).max())


def test_torch_multiplies_the_same(small):
    pytest.importorskip("torch")
    weights = peers.Weights.make(3, 64, 96, 1)
    ours, theirs = peers.ours(weights)()[0], peers.torch(weights)
    assert_allclose(theirs["torch BitLinear"]()[0], ours, atol=1e-4)
    assert_allclose(theirs["torch float32"]()[0], weights.x @ weights.floats[0], atol=1e-4)
    for how in ({}, {"ternary": True}, {"autocast": True}):
        take = step.by_torch(**how)
        losses = [take() for _ in range(20)]
        assert losses[-1] < losses[0]


def test_a_step_of_ours_learns(small):
    for ternary in (False, True):
        take = step.by_us(ternary)
        losses = [take() for _ in range(20)]
        assert losses[-1] < losses[0]
