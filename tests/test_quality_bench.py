"""The bench's bookkeeping; what it measures is in experiments/quality/results."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from bitnet_jax import phase4
from bitnet_jax.cli.jobs import Compress
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.optim import adamw
from bitnet_jax.train.data import windows
from bitnet_jax.train.loop import fit
from bitnet_jax.train.text import byte_tokenizer
from experiments.quality import bench, tune_pretrained

ROWS = {
    "demo/float, continued/0": {"accuracy": 0.5, "loss": 1.0, "seconds": 9.0},
    "demo/float, continued/1": {"accuracy": 0.4, "loss": 1.1, "seconds": 9.0},
    "demo/plain/0": {"accuracy": 0.45, "loss": 1.2, "seconds": 9.0},
    "demo/plain/1": {"accuracy": 0.38, "loss": 1.2, "seconds": 9.0},
}


def test_gaps_are_seed_by_seed():
    assert bench.gaps_of(ROWS, "demo", "plain") == pytest.approx([0.1, 0.05])


def test_results_grow_and_stay(tmp_path):
    results = bench.Results(tmp_path / "new" / "rows.json")
    for key, row in ROWS.items():
        assert key not in results
        results.add(key, row)
    assert bench.Results(results.path).rows == ROWS == json.loads(results.path.read_text())
    assert bench.table(results.rows, "demo").row_count == 2
    bench.plot(results.rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_every_recipe_is_settings_of_the_main_job():
    for changes in (*bench.RECIPES.values(), *bench.CONVERSIONS.values()):
        phase4.Settings(**changes)
    assert bench.RECIPES["default"] == {}


def test_the_kept_results_are_complete():
    rows = bench.Results(bench.HERE / "results" / "bench.json").rows
    for name in ("plain", "default", *bench.CONVERSIONS, bench.FLOAT):
        assert set(bench.seeds_of(rows, "demo", name)) == {"0", "1", "2"}
    assert len(bench.seeds_of(rows, "digits", "by data")) == 5


def test_the_script_for_a_gpu_runs_on_a_tiny_model(tmp_path, monkeypatch):
    config = DecoderConfig(vocab_size=256, width=32, layers=1, heads=2, kv_heads=1, hidden=32)
    words = "hello world, this is some text. " * 200
    (tmp_path / "text.txt").write_text(words)
    text = windows(np.frombuffer(words.encode(), np.uint8).astype(np.int32), 32)
    params = config.build(None).init(jax.random.key(0), text[:1, :-1])
    params = fit(config.build(None), params, adamw(1e-2), text, epochs=1, batch=8).params
    source = ModelFolder(config, None, params, byte_tokenizer())
    monkeypatch.setattr(tune_pretrained.smollm2, "load", lambda: source)
    job = tune_pretrained.Main(tmp_path / "out", tmp_path / "text.txt", epochs=1, length=32)
    assert job(Console(quiet=True))["packed_equals_memory"] is True


def test_the_command_has_the_same_defaults():
    """Or None, which leaves a setting to the family of the model (`compress.defaults`)."""
    left = {"learning_rate", "distill", "teacher"}
    for field in dataclasses.fields(phase4.Settings):
        if field.name not in ("scheme", "policy") and hasattr(Compress, field.name):
            wanted = None if field.name in left else field.default
            assert getattr(Compress, field.name) == wanted, field.name
