"""The embedded default: train a small float model on this machine's text, then Phase 4 on it."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import optax
from rich.console import Console

from . import phase4
from .models.decoder import Decoder, DecoderConfig
from .models.folder import ModelFolder
from .optim import mugrokfast
from .output import write_json
from .train import data
from .train.loop import fit


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo, chosen so that all of it takes under five minutes on two CPU cores.

    Attributes:
      megabytes: how much of the standard library's source to read.
      vocab_size: tokens of the byte-level BPE.
      length: tokens a window.
      batch, tuning_batch: windows a step, of the float training and of fine-tuning.
      float_steps: steps of the float model's training, one pass over as much text.
      tuning_steps: steps of one epoch of fine-tuning.
      held_out_windows: windows the scores are measured on.
      learning_rate: peak of the float training.
      config: shape of the model; its vocabulary is taken from ``vocab_size``.
    """

    megabytes: float = 6.0
    vocab_size: int = 512
    length: int = 128
    batch: int = 16
    tuning_batch: int = 8
    float_steps: int = 200
    tuning_steps: int = 140
    held_out_windows: int = 320
    learning_rate: float = 8e-3
    config: DecoderConfig = DecoderConfig(vocab_size=512, layers=2, hidden=512)


def float_model(
    settings: DemoSettings, train: np.ndarray, tokenizer, out: Path, console: Console | None
) -> tuple[ModelFolder, list[dict]]:
    """Train the full-precision model that the main job starts from; its weights and its history."""
    config = dataclasses.replace(settings.config, vocab_size=tokenizer.get_vocab_size())
    model = Decoder(config)
    params = model.init(jax.random.key(0), train[:1, :-1])
    steps = len(train) // settings.batch
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, steps // 10, steps, settings.learning_rate / 10
    )
    fitted = fit(
        model,
        params,
        mugrokfast(rate, weight_decay=0.1),
        train,
        epochs=1,
        batch=settings.batch,
        stage="train float",
        log=out / "metrics.jsonl",
        console=console,
    )
    return ModelFolder(config, None, fitted.params, tokenizer), fitted.history


def run(
    out: Path,
    settings: DemoSettings = DemoSettings(),
    job: phase4.Settings = phase4.Settings(),
    console: Console | None = None,
) -> dict:
    """Text, tokenizer, float model, main job.

    Args:
      out: an existing empty folder for everything that is written.
      settings: sizes of the demo.
      job: settings of the main job.
      console: where progress is shown.

    Returns:
      The report of `phase4.run`, with ``parameters``, ``corpus`` and ``seconds.total`` added.
    """
    screen = console or Console(quiet=True)
    say = screen.print
    started = time.perf_counter()
    with screen.status("reading the text, training its tokenizer", spinner="line"):
        corpus = data.standard_library(settings.megabytes)
        tokenizer = data.train_tokenizer(corpus.train, settings.vocab_size)
        train, held_out = (
            data.windows(data.encode(tokenizer, part), settings.length, corpus.name)
            for part in (corpus.train, corpus.held_out)
        )
    held_out = held_out[:: max(len(held_out) // settings.held_out_windows, 1)]
    held_out = held_out[: settings.held_out_windows]
    # One draw of the windows: the float model trains on the first part, the main job on the rest,
    # as a later phase would on text of its own.
    train = train[np.random.default_rng(0).permutation(len(train))]
    cut = settings.float_steps * settings.batch
    rest = settings.tuning_steps * settings.tuning_batch
    say(
        f"[bold]text[/] {corpus.name}: {len(corpus.train)} files to train on, "
        f"{len(corpus.held_out)} held out"
    )
    source, history = float_model(settings, train[:cut], tokenizer, out, console)
    size = sum(x.size for x in jax.tree.leaves(source.params))
    say(f"[bold]float model[/] {size:,} parameters")
    # Far from converged, the float model goes on best at twice the usual rate.
    job = dataclasses.replace(job, batch=settings.tuning_batch, float_learning_rate=2e-3)
    result = phase4.run(
        source, train[cut : cut + rest], held_out, out, job, "def ", console, history
    )
    result |= {"corpus": corpus.name}
    result["seconds"]["total"] = round(time.perf_counter() - started, 1)
    write_json(out / "report.json", result)
    return result
