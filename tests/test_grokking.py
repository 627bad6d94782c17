"""The grokking benchmark: its data, its model, a run of it cut short."""

import importlib.util
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from bitnet_jax import Scheme
from bitnet_jax.optim import labels

PATH = Path(__file__).parent.parent / "benchmarks" / "grokking.py"
SPEC = importlib.util.spec_from_file_location("grokking", PATH)
grokking = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(grokking)


def test_the_halves_are_all_products_once():
    (train, answers), (held_out, others) = grokking.products(0)
    every = np.concatenate([train, held_out])[:, [0, 2]]
    assert len({tuple(xy) for xy in every.tolist()}) == 97**2 and len(train) == 4705
    assert (np.concatenate([answers, others]) == every.prod(1) % 97).all()


def test_the_hidden_kernels_are_muons_and_only_they():
    params = jax.eval_shape(grokking.Block().init, jax.random.key(0), np.zeros((1, 4), np.int32))
    found = labels(params)["params"]
    hidden = {n for n, x in found.items() if "muon" in jax.tree.leaves(x)}
    assert hidden == {"query", "key", "value", "out", "up", "down"}
    assert found["head"] == {"kernel": "decay"} and found["embed"] == {"embedding": "decay"}


@pytest.mark.parametrize("scheme", [None, Scheme()])
def test_a_race_learns_and_tells_when_it_gave_up(scheme):
    make = grokking.entrants(scheme is not None)["Muon"]
    got = grokking.race(grokking.Block(scheme), make(), seed=0, cap=50)
    start, end = got.history
    assert got.steps is None and [start["step"], end["step"]] == [25, 50]
    assert end["train_loss"] < start["train_loss"] < 1.2 * np.log(97)


def test_the_table_has_the_median_and_every_seed():
    runs = [{"steps": s, "history": []} for s in (100, None, 300)]
    row = {"model": "float", "optimizer": "Muon", "runs": runs}
    console = Console(width=100, file=io.StringIO())
    console.print(grokking.table([row], [0, 1, 2], 500))
    line = next(x for x in console.file.getvalue().splitlines() if "Muon" in x)
    assert [c.strip() for c in line.split("│")[3:-1]] == ["300", "100", "over 500", "300"]
