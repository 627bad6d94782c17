import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import BitnetError, Policy, Scheme, checkpoint
from bitnet_jax.convert import prequantize
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.optim import adamw, mugrokfast
from bitnet_jax.train.distill import distillation
from bitnet_jax.train.loop import fit

VOCAB = 16
ROWS = np.random.default_rng(0).integers(0, VOCAB, (40, 9)).astype(np.int32)
HELD_OUT = np.random.default_rng(1).integers(0, VOCAB, (8, 9)).astype(np.int32)


class Killed(Exception):
    pass


def killer(step):
    """A sink that ends the run in the middle of a step, after the log has its line."""

    def sink(entry):
        if entry["step"] == step:
            raise Killed

    return sink


def model_and_params():
    model = nn.Embed(VOCAB, VOCAB)
    return model, model.init(jax.random.key(0), ROWS[:1])


def training(folder, optimizer=None, loss=None, **options):
    """Ten steps an epoch of a table of logits: fast, and all that `fit` keeps is in use."""
    model, params = model_and_params()
    common = {"epochs": 2, "batch": 2, "accumulate": 2, "held_out": HELD_OUT, "save_every": 0.0}
    options = common | {"log": folder / "log.jsonl", "keep": folder} | options
    options |= {} if loss is None else {"loss": loss}
    rows = options.pop("rows", ROWS)
    optimizer = optimizer or adamw(optax.cosine_decay_schedule(0.3, 30))
    return fit(model, options.pop("params", params), optimizer, rows, **options)


def without_speed(entries):
    return [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in entries]


def log_of(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def sums(folder):
    return {name: checkpoint.read_manifest(folder / name)["crc32"] for name in ("state", "last")}


def same_end(a, b, first, second):
    assert sums(a) == sums(b)
    assert without_speed(log_of(a)) == without_speed(log_of(b)) == without_speed(first.history)
    assert second.history == log_of(b)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


@pytest.mark.parametrize("kind", ["adamw", "mugrokfast", "odd"])
def test_a_training_stopped_anywhere_ends_with_the_same_bytes(kind, tmp_path):
    make = {
        "adamw": lambda: adamw(optax.cosine_decay_schedule(0.3, 30)),
        "mugrokfast": lambda: mugrokfast(0.1, lamb=1.0),
        # A state with a random key, one with a weak type, one without a leaf.
        "odd": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), weak(), optax.sgd(0.1)),
    }[kind]
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    (b / "log.jsonl").write_text("")
    whole = training(a, make(), resume=a)
    for step in (1, 9, 10, 17, 20):
        with pytest.raises(Killed):
            training(b, make(), resume=b, sinks=[killer(step)])
    same_end(a, b, whole, training(b, make(), resume=b))


def weak():
    """Scales by a weakly typed number: times bfloat16 it gives bfloat16, a strong one float32."""

    def update(updates, state, params=None):
        half = jax.tree.map(lambda g: g.astype(jnp.bfloat16) * state, updates)
        scaled = jax.tree.map(lambda h, g: h.astype(g.dtype), half, updates)
        return scaled, jnp.where(state > 0.5, 0.7, 0.8)

    return optax.GradientTransformation(lambda params: jnp.asarray(0.8), update)


def test_patience_and_the_best_are_remembered(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    options = {"patience": 3, "epochs": 12}  # random rows: held-out loss rises soon
    whole = training(a, resume=a, **options)
    assert whole.stopped and 20 < whole.steps < 120
    for step in (15, whole.steps - 5, whole.steps):
        with pytest.raises(Killed):
            training(b, resume=b, sinks=[killer(step)], **options)
    again = training(b, resume=b, **options)
    same_end(a, b, whole, again)
    assert again.stopped == whole.stopped
    best = [checkpoint.read_manifest(x / "best") for x in (a, b)]
    assert best[0]["crc32"] == best[1]["crc32"] and best[0]["metadata"] == best[1]["metadata"]


@pytest.mark.parametrize("patience", [None, 1])
def test_a_finished_training_returns_at_once_and_leaves_what_follows_in_the_log(tmp_path, patience):
    first = training(tmp_path, resume=tmp_path, patience=patience)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"stage": "another"}\n')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    never = lambda entry: pytest.fail("a step was taken")
    second = training(tmp_path, resume=tmp_path, patience=patience, sinks=[never])
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert (second.history, second.steps, second.stopped, second.seconds) == (
        first.history, first.steps, first.stopped, first.seconds
    )  # fmt: skip
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_the_log_keeps_what_was_there_and_loses_half_a_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"stage": "before"}\n')
    with pytest.raises(Killed):
        training(tmp_path, resume=tmp_path, sinks=[killer(13)])
    with open(log, "a") as f:
        f.write('{"stage": "train", "st')
    done = training(tmp_path, resume=tmp_path)
    assert log_of(tmp_path) == [{"stage": "before"}, *done.history]
    assert [x["step"] for x in done.history if "loss" in x] == list(range(1, 21))


def test_a_run_killed_before_its_first_save_leaves_no_step_twice(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path, resume=tmp_path, sinks=[killer(1)])
    assert len(log_of(tmp_path)) == 1
    assert log_of(tmp_path) != training(tmp_path, resume=tmp_path).history == log_of(tmp_path)
    assert len(log_of(tmp_path)) == 22


def test_a_lost_log_is_written_again(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path, resume=tmp_path, sinks=[killer(13)])
    (tmp_path / "log.jsonl").unlink()
    assert training(tmp_path, resume=tmp_path).history == log_of(tmp_path)


def test_a_kill_between_the_two_renames_of_a_save_is_survived(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path, resume=tmp_path, sinks=[killer(13)])
    (tmp_path / "state").rename(tmp_path / ".state.replaced-123")
    (tmp_path / ".state.saving-123").mkdir()
    seen = []
    training(tmp_path, resume=tmp_path, sinks=[seen.append])
    assert seen[0]["step"] == 13
    assert {p.name for p in tmp_path.iterdir()} == {"state", "last", "best", "log.jsonl"}


def teacher(seed):
    """By NumPy: the same bits whenever it is drawn, and however JAX compiles then."""
    table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB), np.float32)
    return {"params": {"embedding": jnp.asarray(table)}}


TAUGHT = lambda seed, mixing=0.5: distillation(model_and_params()[0], teacher(seed), mixing=mixing)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 4}, "epochs was 2, is 4"),
        ({"seed": 1, "patience": 2}, "seed was 0, is 1, patience was None, is 2"),
        ({"accumulate": 1}, "accumulate was 2, is 1"),
        ({"rows": ROWS[::-1]}, "(data changed)"),
        ({"held_out": None}, "(held-out data changed)"),
        ({"params": teacher(3)}, "(initial parameters changed)"),
        ({"optimizer": adamw(0.2)}, "(model, loss or optimizer changed)"),
        ({"loss": TAUGHT(0, 0.25)}, "(model, loss or optimizer changed)"),
        ({"loss": TAUGHT(1)}, "(arrays in the loss changed)"),
    ],
)
def test_another_training_is_refused_in_one_line_that_says_why(tmp_path, change, told):
    options = {"loss": TAUGHT(0), "save_every": 1e9}
    with pytest.raises(Killed):
        training(tmp_path, resume=tmp_path, sinks=[killer(2)], **options)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(BitnetError) as e:
        training(tmp_path, resume=tmp_path, **(options | change))
    assert told in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    training(tmp_path, resume=tmp_path, **options)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    checkpoint.save(tmp_path / "state", {"kernel": np.ones(3)})
    with pytest.raises(BitnetError, match="holds no state of a training"):
        training(tmp_path, resume=tmp_path)


def test_saves_are_as_rare_as_asked(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    spy = lambda path, *args, **kwargs: (saved.append(path.name), save(path, *args, **kwargs))
    monkeypatch.setattr(checkpoint, "save", spy)
    model, params = model_and_params()
    options = {"epochs": 2, "batch": 10, "resume": tmp_path}
    fit(model, params, adamw(0.1), ROWS, save_every=1e9, **options)
    assert saved == ["state", "state"]  # before the first step and after the last
    saved.clear()
    fit(model, params, adamw(0.1), ROWS, save_every=0, **(options | {"resume": tmp_path / "b"}))
    assert saved == ["state"] * 9


# A real training in a process of its own: ternary layers, weights quantised once a step, a teacher.
CONFIG = DecoderConfig(vocab_size=VOCAB, width=32, layers=1, heads=2, kv_heads=1, hidden=32)
SCHEME = Scheme("twn", "channel")


def real_training(folder, pause):
    folder = Path(folder)
    model = Decoder(CONFIG, SCHEME)
    params = model.init(jax.random.key(0), ROWS[:1, :-1])
    fit(
        model, params, mugrokfast(optax.cosine_decay_schedule(0.02, 70), lamb=0.5), ROWS,
        epochs=7, batch=2, accumulate=2, held_out=HELD_OUT,
        loss=distillation(Decoder(CONFIG), params),
        prequantize=functools.partial(prequantize, policy=Policy(), scheme=SCHEME),
        log=folder / "log.jsonl", keep=folder, resume=folder, save_every=0.2,
        sinks=[lambda entry: time.sleep(float(pause))],
    )  # fmt: skip


def start(folder, cache, pause):
    code = "import sys; from tests.test_resume import real_training as f; f(*sys.argv[1:])"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", code, str(folder), str(pause)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def lines(folder):
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill(process, folder, after, during_save, wait):
    """SIGKILL once the log has ``after`` lines: in the middle of a save, or of whatever it does."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and lines(folder) < after:
        time.sleep(0.002)
    saving = lambda: any(".saving-" in p.name for p in folder.iterdir())
    while during_save and process.poll() is None and time.monotonic() < deadline and not saving():
        time.sleep(0.0005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err


def test_killed_five_times_a_training_ends_with_the_bytes_of_one_never_killed(tmp_path):
    a, b, cache = (tmp_path / name for name in "abc")
    a.mkdir(), b.mkdir()
    process = start(a, cache, 0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    draw = random.Random(0)
    # 70 steps and 7 evaluations. The first lines of a sitting are those of the one before.
    for i in range(5):
        after = max(draw.randrange(12 * i + 1, 12 * i + 11), lines(b) + 1)
        kill(start(b, cache, 0.02), b, after, i % 2 == 1, draw.uniform(0, 0.03))
        assert lines(b) >= after
    process = start(b, cache, 0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sums(a) == sums(b) and len(sums(a)["state"]) > 20
    assert without_speed(log_of(a)) == without_speed(log_of(b)) and len(log_of(b)) == 77
    best = [checkpoint.read_manifest(x / "best")["crc32"] for x in (a, b)]
    assert best[0] == best[1]
    assert {p.name for p in b.iterdir()} == {"state", "last", "best", "log.jsonl"}
