import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from bitnet_jax import BitDense, BitnetError, Policy, Scheme, Ternary, checkpoint
from bitnet_jax.convert import prequantize
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.optim import adamw
from bitnet_jax.train import data
from bitnet_jax.train.evaluate import evaluate
from bitnet_jax.train.loop import fit
from bitnet_jax.train.loss import likeliest, next_token
from bitnet_jax.train.step import as_pytree, train_step

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_likeliest_token_is_the_first_of_equals(dtype):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.integers(0, 4, (300, 9)), dtype)
    logits = logits.at[0].set(-jnp.inf).at[1, 3].set(jnp.inf)
    for token in range(9):
        tokens = jnp.full(300, token)
        expected = logits.argmax(-1) == token
        assert 0 < expected.sum() < 300
        np.testing.assert_array_equal(likeliest(logits, tokens), expected)
    assert not likeliest(jnp.full((1, 2), jnp.nan), jnp.array([0])).any()


class Tiny(nn.Module):
    """The next token from this one: enough to train, and compiled in no time."""

    scheme: Scheme | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32, dtype=self.dtype, name="embed")(tokens)
        if self.scheme is not None:
            x = x + BitDense(32, dtype=self.dtype, scheme=self.scheme, name="mix")(x)
        return nn.Dense(16, dtype=self.dtype, name="head")(x)


def tiny(scheme=None, dtype=jnp.float32):
    model = Tiny(scheme, dtype)
    return model, model.init(jax.random.key(1), counting()[:1, :-1])


def close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0), a, b)


def one_step(model, params, rows, **options):
    """Parameters and metrics after one step of plain gradient descent, which shows the gradient."""
    loss = as_pytree(options.pop("loss", next_token))
    step = train_step(model, optax.sgd(1.0), **options)
    copy = jax.tree.map(jnp.array, params)
    after, _, metrics = step(copy, optax.sgd(1.0).init(params), loss, rows)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(metrics))
    return after, {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("scheme", [None, Scheme("twn", "channel")])
def test_accumulated_gradients_are_those_of_the_whole_batch(scheme):
    model, params = tiny(scheme)
    rows = np.random.default_rng(0).integers(0, 16, (24, 9)).astype(np.int32)
    whole, metrics = one_step(model, params, rows)
    for k in (2, 4, 24):
        parts, found = one_step(model, params, rows, accumulate=k)
        close(parts, whole, 1e-6)
        assert found == pytest.approx(metrics, rel=1e-5)
    # The gradient of a part is another one.
    assert abs(one_step(model, params, rows[:12])[1]["loss"] - metrics["loss"]) > 1e-3


def test_gradients_are_averaged_in_float32():
    # In float16 the sum of 64 gradients of 2048 overflows, and each small one is lost beside it.
    loss = lambda model, params, rows: ((params["w"] * rows).sum().astype(jnp.float32), {})
    params = {"w": jnp.zeros((), jnp.float16)}
    rows = jnp.array([2048.0] * 63 + [64.0], jnp.float16)
    after, _ = one_step(nn.Module(), params, rows, loss=loss, accumulate=64)
    assert after["w"].dtype == jnp.float16
    assert -float(after["w"]) == np.float16(rows.astype(jnp.float32).mean()) == 2017.0


def test_the_loop_takes_one_step_for_k_batches():
    model, params = tiny()
    rows = counting(26)
    settings = {"epochs": 2, "seed": 3, "held_out": rows}
    whole = fit(model, params, optax.adam(1e-2), rows, batch=12, **settings)
    parts = fit(model, params, optax.adam(1e-2), rows, batch=4, accumulate=3, **settings)
    assert parts.steps == whole.steps == 4
    close(parts.params, whole.params, 1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_quantised_once_a_step_change_nothing(accumulate):
    scheme, calls = Scheme("twn", "channel"), []
    model, params = tiny(scheme)

    def once(latent):
        calls.append(1)
        weights = prequantize(latent, Policy(), scheme)
        assert isinstance(weights["params"]["mix"]["kernel"], Ternary)
        return weights

    plain, _ = one_step(model, params, counting(), accumulate=accumulate)
    given, _ = one_step(model, params, counting(), accumulate=accumulate, prequantize=once)
    close(given, plain, 1e-7)
    assert len(calls) == 1
    # Had the layer quantised again, weights of zeros would not be missed.
    zeros = lambda latent: jax.tree.map(jnp.zeros_like, prequantize(latent, Policy(), scheme))
    other, _ = one_step(model, params, counting(), accumulate=accumulate, prequantize=zeros)
    table = lambda tree: tree["params"]["embed"]["embedding"]
    assert abs(table(other) - table(plain)).max() > 1e-5


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bfloat16_model_learns_in_float32(accumulate):
    model, params = tiny(Scheme(), jnp.bfloat16)
    rows = counting()
    assert model.apply(params, rows[:, :-1]).dtype == jnp.bfloat16
    done = fit(
        model, params, adamw(3e-2), rows, epochs=12, batch=2, accumulate=accumulate, held_out=rows
    )
    assert {x.dtype for x in jax.tree.leaves(done.params)} == {jnp.dtype("float32")}
    assert done.history[-1]["held_out_accuracy"] == 1.0


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    model, params = tiny(None, jnp.bfloat16)
    rows = counting()
    logits = np.asarray(model.apply(params, rows[:, :-1]), np.float64)
    shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(shifted, rows[:, 1:, None], -1).mean()
    # Computed in bfloat16 it would be right to 0.4 % only.
    assert float(next_token(model, params, rows)[0]) == pytest.approx(loss, rel=1e-6)
    assert evaluate(model, params, rows)["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_last_and_the_best_parameters_are_kept(tmp_path):
    model, params = tiny()
    rows, other = counting(), counting()[:, ::-1]  # training on one makes the other worse
    done = fit(
        model, params, optax.adam(1e-2), rows, epochs=3, batch=8, held_out=other, keep=tmp_path
    )
    last, best = (checkpoint.load(tmp_path / name) for name in ("last", "best"))
    jax.tree.map(np.testing.assert_array_equal, last.tree, done.params)
    losses = {x["step"]: x["held_out_loss"] for x in done.history if "held_out_loss" in x}
    lowest = min(losses, key=losses.get)
    assert (last.metadata["step"], best.metadata["step"]) == (9, lowest) and lowest < 9
    assert evaluate(model, best.tree, other)["loss"] == pytest.approx(losses[lowest], rel=1e-6)


def test_without_held_out_text_there_is_no_best(tmp_path):
    model, params = tiny()
    fit(model, params, optax.adam(1e-2), counting(), epochs=1, batch=8, keep=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_training_stops_when_patience_is_out():
    model, params = tiny()
    settings = {"epochs": 20, "batch": 8, "held_out": counting()[:, ::-1]}
    done = fit(model, params, optax.adam(1e-1), counting(), patience=2, **settings)
    losses = [x["held_out_loss"] for x in done.history if "held_out_loss" in x]
    best = int(np.argmin(losses))
    assert done.steps == 3 * len(losses) and len(losses) == best + 3 < 20
    assert f"at step {done.steps} of 60" in done.stopped
    assert f"under {losses[best]:.4f}, of step {3 * (best + 1)}, for 2 epochs" in done.stopped
    whole = fit(model, params, optax.adam(1e-1), counting(), **settings)
    assert whole.stopped is None and whole.steps == 60
    assert [x["loss"] for x in whole.history if "loss" in x][: done.steps] == [
        x["loss"] for x in done.history if "loss" in x
    ]


def test_every_sink_gets_every_entry():
    model, params = tiny()
    first, second = [], []
    done = fit(
        model, params, optax.adam(1e-2), counting(), epochs=2, batch=8, held_out=counting(),
        sinks=[first.append, second.append],
    )  # fmt: skip
    assert first == second == done.history and len(first) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate 0"),
        ({"accumulate": 4}, "fewer than one batch of 32"),
        ({"patience": 0, "held_out": counting()}, "patience 0"),
        ({"patience": 2}, "give held_out"),
    ],
)
def test_impossible_settings_are_told(options, message):
    model, params = tiny()
    with pytest.raises(BitnetError, match=message):
        fit(model, params, optax.adam(1e-2), counting(), epochs=1, batch=8, **options)


def test_a_diverging_loss_ends_with_advice():
    model, params = model_and_params()
    with pytest.raises(BitnetError, match=r"loss became .* at step 3 of 9; lower the learning"):
        fit(model, params, optax.sgd(1e30), counting(), epochs=3, batch=8)


def test_parameters_lost_in_the_last_step_are_told_before_they_are_kept(tmp_path):
    # The loss of a step is that of the parameters before it.
    model, params = tiny()
    options = {"epochs": 1, "batch": 24, "held_out": counting(), "keep": tmp_path / "kept"}
    with pytest.raises(BitnetError, match="held-out loss became nan at step 1 of 1"):
        fit(model, params, optax.sgd(1e38), counting(), **options)
    assert not (tmp_path / "kept").exists()


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
    for start in range(6):
        later = list(data.epochs(rows, 4, 2, 0, start))
        assert len(later) == 6 - start and (np.array(later) == two[start:]).all()
    assert not list(data.epochs(rows, 4, 2, 0, 6))
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
