import dataclasses
import json

import jax
import numpy as np
import pytest

from bitnet_jax import BitnetError, checkpoint, demo, phase4, report
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.models.folder import ModelFolder, load_model
from bitnet_jax.models.generate import generate
from bitnet_jax.train import data

TINY = demo.DemoSettings(
    megabytes=0.5,
    vocab_size=320,
    length=32,
    batch=4,
    tuning_batch=4,
    float_steps=6,
    tuning_steps=2,
    held_out_windows=8,
    config=DecoderConfig(vocab_size=320, width=32, layers=1, heads=2, kv_heads=1, hidden=64),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out, TINY)


def test_the_job_leaves_a_model_and_a_report(job):
    out, result = job
    names = {p.name for p in out.iterdir()}
    assert names == {
        "packed", "float32", "latent", "metrics.jsonl",
        "report.json", "report.txt", "loss.png", "weights.png", "codes.png", "bytes.png",
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(result))
    for picture in ("loss.png", "weights.png", "codes.png", "bytes.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_figures_follow_from_what_lies_on_disk(job):
    out, result = job
    scores = result["scores"]
    names = {"float", "rounded", "converted", "float_continued", "fine_tuned", "packed"}
    assert set(scores) == names
    yardstick = max(scores["float"]["accuracy"], scores["float_continued"]["accuracy"])
    ratio = scores["packed"]["accuracy"] / yardstick
    assert result["relative_accuracy_loss"] == pytest.approx(1 - ratio)
    sizes = [
        sum(f.stat().st_size for f in (out / name).rglob("*") if f.is_file())
        for name in ("float32", "packed")
    ]
    assert result["ratio_on_disk"] == pytest.approx(sizes[0] / sizes[1])
    assert result["packed_equals_memory"] is True
    assert result["tokens"]["fine_tuning"] == 3 * 2 * 4 * 32


def test_the_packed_folder_is_all_one_needs(job):
    out, result = job
    stored = load_model(out / "packed")
    assert stored.scheme == phase4.Settings().scheme
    prompt = np.asarray([stored.tokenizer.encode("def ").ids])
    tokens = generate(stored.model, stored.params, prompt, 4)
    assert tokens.shape == (1, prompt.shape[1] + 4)
    assert result["sample"].startswith("def ")


def test_packed_model_equals_the_latent_one_it_came_from(job):
    out, result = job
    # Norms and embeddings are kept in float16, so the two differ by that rounding alone.
    a, b = result["scores"]["fine_tuned"], result["scores"]["packed"]
    assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)


def test_metrics_name_every_step_of_the_three_trainings(job):
    out, _ = job
    entries = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {}
    for x in entries:
        steps[x["stage"]] = steps.get(x["stage"], 0) + ("loss" in x)
    assert steps == {"train float": 6, "fine-tune ternary": 6, "continue float": 6}


def test_the_report_is_readable_text(job):
    out, result = job
    text = (out / "report.txt").read_text()
    assert "relative" in text and f"{result['ratio_on_disk']:.2f}x smaller" in text
    assert "layer_0/mlp/down/kernel" in text
    assert max(map(len, text.splitlines())) <= 110


def language(scale=1.0):
    config = dataclasses.replace(TINY.config, vocab_size=300)
    tokens = np.zeros((1, 8), np.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)
    tokenizer = data.train_tokenizer(["def f(x): return x\n"] * 9, 300)
    return ModelFolder(config, None, jax.tree.map(lambda x: x * scale, params), tokenizer)


WINDOWS = np.random.default_rng(0).integers(0, 300, (8, 17)).astype(np.int32)


def test_broken_weights_stop_the_job_before_anything_is_written(tmp_path):
    with pytest.raises(BitnetError, match="embed/embedding: holds NaN"):
        phase4.run(language(np.nan), WINDOWS, WINDOWS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_too_short_for_a_batch_is_told(tmp_path):
    with pytest.raises(BitnetError, match="fewer than one batch of 9"):
        phase4.run(language(), WINDOWS, WINDOWS, tmp_path, phase4.Settings(batch=9))


def test_without_comparison_the_source_is_the_yardstick(tmp_path):
    settings = phase4.Settings(epochs=1, batch=4, compare=False)
    result = phase4.run(language(), WINDOWS, WINDOWS, tmp_path, settings)
    assert "float_continued" not in result["scores"]
    assert result["relative_accuracy_loss"] == result["relative_accuracy_loss_to_source"]


def test_a_job_with_a_teacher_in_microbatches_with_patience(tmp_path):
    settings = phase4.Settings(
        epochs=30, batch=2, accumulate=2, patience=1, distill=0.5, compare=False, learning_rate=0.1,
        teacher="source",
    )  # fmt: skip
    result = phase4.run(language(), WINDOWS, WINDOWS[:, ::-1], tmp_path, settings)
    entries = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in entries if "loss" in x]
    # Two steps of four windows an epoch, ended early by the held-out text being another language.
    assert len(steps) < 60 and steps[-1]["epoch"] * 2 == len(steps)
    assert result["tokens"]["fine_tuning"] == len(steps) * 4 * 16
    for x in steps:
        half = (x["cross_entropy"] + x["divergence"]) / 2
        assert x["loss"] == pytest.approx(half, rel=1e-5)
    last = checkpoint.load(tmp_path / "latent" / "last")
    assert last.metadata["step"] == len(steps)
    assert checkpoint.read_manifest(tmp_path / "latent" / "best")["metadata"]["step"] < len(steps)


def test_no_epochs_pack_what_was_converted(tmp_path):
    settings = phase4.Settings(epochs=0, batch=4)
    result = phase4.run(language(), WINDOWS, WINDOWS, tmp_path, settings)
    scores = result["scores"]
    assert set(scores) == {"float", "rounded", "converted", "packed"}
    assert scores["packed"] == scores["converted"]
    assert result["packed_equals_memory"] is True and result["yardstick"] == "float"


def test_the_float_model_teaches_after_it_was_continued(tmp_path):
    stages = []
    for teacher in ("source", "continued"):
        settings = phase4.Settings(epochs=1, batch=4, teacher=teacher, distill=1.0)
        out = tmp_path / teacher
        out.mkdir()
        phase4.run(language(), WINDOWS, WINDOWS, out, settings)
        entries = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
        stages.append([x for x in entries if x["stage"] == "fine-tune ternary" and "loss" in x])
        assert entries[0]["stage"] == "continue float"
    assert stages[0][0]["cross_entropy"] == stages[1][0]["cross_entropy"]
    assert stages[0][0]["divergence"] != stages[1][0]["divergence"]


def test_loading_a_checkpoint_that_is_no_decoder_is_told(tmp_path):
    checkpoint.save(tmp_path / "x", {"kernel": np.ones(3)})
    with pytest.raises(BitnetError, match="no language model"):
        load_model(tmp_path / "x")


def test_components_cover_the_decoder():
    names = {report.component(x.path) for x in convert_report().leaves}
    assert names == {"attention", "mlp", "embed", "norms and biases"}


def convert_report():
    from bitnet_jax import convert

    return convert(language().params).report
