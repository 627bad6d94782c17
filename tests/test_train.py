import json

import jax
import numpy as np
import optax
import pytest
import tokenizers

from bitnet_jax import BitnetError, Scheme, checkpoint
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.train import data
from bitnet_jax.train.evaluate import evaluate
from bitnet_jax.train.loop import fit

CONFIG = DecoderConfig(vocab_size=16, width=32, layers=1, heads=2, kv_heads=1, hidden=64)


def counting(windows=24, length=8):
    """Sequences that count upwards modulo 16: learnable, and wrong when the targets are shifted."""
    first = np.arange(windows) % 16
    return ((first[:, None] + np.arange(length + 1)) % 16).astype(np.int32)


def model_and_params(scheme=None):
    model = Decoder(CONFIG, scheme)
    return model, model.init(jax.random.key(0), counting()[:1, :-1])


@pytest.mark.parametrize("scheme", [None, Scheme(), Scheme("twn", "channel")])
def test_the_loop_learns_to_count(scheme, tmp_path):
    model, params = model_and_params(scheme)
    rows, log = counting(), tmp_path / "log.jsonl"
    before = jax.tree.map(np.array, params)
    done = fit(model, params, optax.adam(1e-2), rows, epochs=30, batch=8, held_out=rows, log=log)
    assert evaluate(model, done.params, rows)["accuracy"] > 0.95
    jax.tree.map(np.testing.assert_array_equal, params, before)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert entries == done.history
    steps = [x for x in entries if "loss" in x]
    assert len(steps) == 90 and steps[-1]["epoch"] == 30
    assert sum("held_out_accuracy" in x for x in entries) == 30


def test_the_same_seed_gives_the_same_bytes():
    model, params = model_and_params(Scheme())
    runs = [fit(model, params, optax.adam(1e-2), counting(), epochs=2, batch=8) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, runs[0].params, runs[1].params)


def test_checkpoints_hold_the_parameters_of_the_last_epoch(tmp_path):
    model, params = model_and_params()
    done = fit(
        model, params, optax.adam(1e-2), counting(), epochs=2, batch=8, keep=tmp_path / "last"
    )
    stored = checkpoint.load(tmp_path / "last")
    jax.tree.map(np.testing.assert_array_equal, stored.tree, done.params)
    assert stored.metadata["step"] == 6


def test_a_diverging_loss_ends_with_advice():
    model, params = model_and_params()
    with pytest.raises(BitnetError, match="lower the learning rate"):
        fit(model, params, optax.sgd(1e30), counting(), epochs=3, batch=8)


@pytest.mark.parametrize("batch", [5, 24, 64])
def test_evaluation_does_not_depend_on_the_batch(batch):
    model, params = model_and_params()
    rows = counting(23)
    a, b = evaluate(model, params, rows, 1), evaluate(model, params, rows, batch)
    assert a["accuracy"] == b["accuracy"] and a["tokens"] == b["tokens"] == 23 * 8
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    logits = np.asarray(model.apply(params, rows[:, :-1]), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_softmax, rows[:, 1:, None], -1).mean()
    assert a["loss"] == pytest.approx(loss, rel=1e-5)


def test_windows_cover_the_text_once_and_overlap_by_the_target():
    tokens = np.arange(103)
    rows = data.windows(tokens, 10)
    assert rows.shape == (10, 11)
    np.testing.assert_array_equal(rows[:, :-1].ravel(), tokens[:100])
    np.testing.assert_array_equal(rows[:, 1:].ravel(), tokens[1:101])


def test_an_epoch_shows_every_window_once_in_a_new_order():
    rows = counting(12)
    seen = [np.concatenate(list(data.epochs(rows, 4, 1, seed))) for seed in (0, 1)]
    for x in seen:
        np.testing.assert_array_equal(np.sort(x, 0), np.sort(rows, 0))
    assert (seen[0] != seen[1]).any()
    two = np.stack(list(data.epochs(rows, 4, 2, 0)))
    assert (two[:3] != two[3:]).any()


@pytest.mark.parametrize("size", [0, 1, 9])
def test_too_little_text_is_told(size):
    with pytest.raises(BitnetError, match="too few"):
        data.windows(np.zeros(size, np.int32), 9)


def test_fewer_windows_than_a_batch_is_told():
    with pytest.raises(BitnetError, match="fewer than one batch"):
        next(data.epochs(counting(3), 4, 1, 0))


def test_the_corpus_is_real_text_and_its_parts_share_no_file():
    corpus = data.standard_library(1.0)
    assert sum(map(len, corpus.train)) > 500_000
    assert not set(corpus.train) & set(corpus.held_out)
    assert any("def " in x for x in corpus.held_out)


def test_the_tokenizer_gives_any_text_back():
    tokenizer = data.train_tokenizer(["def f(x):\n    return x\n" * 20], 300)
    text = "def g(ü):\n\treturn '日本' # \x00 done"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = data.encode(tokenizer, ["def", ""])
    assert (ids == tokenizer.token_to_id(data.END)).sum() == 2
    again = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    assert again.encode(text).ids == tokenizer.encode(text).ids
