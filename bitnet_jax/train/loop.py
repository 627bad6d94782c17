"""The training loop: batches in, parameters and history out."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import checkpoint
from ..errors import BitnetError
from .data import epochs as epochs_of
from .data import steps_per_epoch
from .evaluate import evaluate
from .loss import next_token

Tree = Any
Loss = Callable[[nn.Module, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What training gives back.

    Attributes:
      params: the trained variables.
      history: one dict a step (``stage``, ``step``, ``epoch``, ``loss``, ``accuracy``,
        ``tokens_per_second``), and one an epoch with ``held_out_loss``, ``held_out_accuracy``.
      seconds: time spent in steps, compilation included.
    """

    params: Tree
    history: list[dict]
    seconds: float


def train_step(model: nn.Module, optimizer: optax.GradientTransformation, loss: Loss) -> Callable:
    """A jitted step: (params, opt_state, batch) -> (params, opt_state, metrics).

    The two trees are donated; pass them on, do not keep them.
    """

    def step(params, opt_state, batch):
        (value, metrics), grads = jax.value_and_grad(lambda p: loss(model, p, batch), has_aux=True)(
            params
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": value, **metrics}

    return jax.jit(step, donate_argnums=(0, 1))


def fit(
    model: nn.Module,
    params: Tree,
    optimizer: optax.GradientTransformation,
    data: np.ndarray,
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    loss: Loss = next_token,
    held_out: np.ndarray | None = None,
    stage: str = "train",
    log: Path | None = None,
    keep: Path | None = None,
    console: Console | None = None,
) -> Fit:
    """Train for a number of epochs.

    Args:
      model: a Linen module that ``loss`` can apply.
      params: its variables; not changed, the result holds new ones.
      optimizer: an optax transformation.
      data: windows (n, length + 1) of tokens.
      epochs: passes over the data.
      batch: windows a step.
      seed: fixes the order of the windows.
      loss: (model, params, batch) -> (scalar, metrics).
      held_out: windows to evaluate on after every epoch.
      stage: name of this training in the log and on the progress bar.
      log: a JSONL file to append every history entry to.
      keep: a folder to save the variables in after every epoch (replaced each time).
      console: where to draw the progress bar; None for silence.

    Returns:
      `Fit`.

    Raises:
      BitnetError: if the data makes no whole batch, or the loss becomes NaN or infinite.
    """
    total = steps_per_epoch(data, batch) * epochs
    step = train_step(model, optimizer, loss)
    params = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), params)
    opt_state, history, start = optimizer.init(params), [], time.perf_counter()
    per_epoch, tokens = total // max(epochs, 1), batch * (data.shape[1] - 1)

    def record(entry: dict) -> None:
        history.append({"stage": stage, **entry})
        if log is not None:
            with open(log, "a") as f:
                f.write(json.dumps(history[-1]) + "\n")

    with _bar(console, stage, total) as show:
        for i, rows in enumerate(epochs_of(data, batch, epochs, seed), start=1):
            before = time.perf_counter()
            params, opt_state, metrics = step(params, opt_state, rows)
            metrics = {k: float(v) for k, v in metrics.items()}
            speed = tokens / (time.perf_counter() - before)
            if not math.isfinite(metrics["loss"]):
                raise BitnetError(
                    f"{stage}: the loss became {metrics['loss']} at step {i} of {total}; "
                    "lower the learning rate"
                )
            epoch = (i - 1) // per_epoch + 1
            record({"step": i, "epoch": epoch, **metrics, "tokens_per_second": round(speed)})
            show(metrics["loss"], speed)
            if i % per_epoch == 0:
                if held_out is not None:
                    scores = evaluate(model, params, held_out, batch)
                    names = ("loss", "accuracy")
                    record(
                        {"step": i, "epoch": epoch} | {f"held_out_{k}": scores[k] for k in names}
                    )
                if keep is not None:
                    checkpoint.save(keep, params, {"stage": stage, "step": i}, overwrite=True)
    return Fit(params, history, time.perf_counter() - start)


class _bar:
    """A progress bar with loss, throughput and time left; draws nothing without a console."""

    def __init__(self, console: Console | None, stage: str, total: int):
        self.progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
        )
        self.task = self.progress.add_task(stage, total=total, loss=math.nan, speed=0.0)

    def __enter__(self) -> Callable[[float, float], None]:
        self.progress.start()
        return lambda loss, speed: self.progress.update(
            self.task, advance=1, loss=loss, speed=speed
        )

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
