"""The training loop: batches in, parameters and history out."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from .. import checkpoint
from .. import recipe as recipes
from ..errors import BitnetError
from ..progress import bar
from ..recipe import Part
from .data import epochs as epochs_of
from .data import steps_per_epoch
from .evaluate import evaluate
from .fingerprint import fingerprint
from .loss import Loss, next_token
from .sinks import jsonl
from .state import Keeper, State, begin
from .step import as_pytree, train_step

Tree = Any


@dataclasses.dataclass(frozen=True)
class Fit:
    """What training gives back.

    Attributes:
      params: the trained variables, after the last step taken.
      history: one dict a step (``stage``, ``step``, ``epoch``, ``loss``, ``accuracy``,
        ``tokens_per_second``), and one an epoch with ``held_out_loss``, ``held_out_accuracy``.
      seconds: time spent training, compilation included, over all sittings.
      steps: steps taken.
      stopped: why training ended before its last epoch, or None.
    """

    params: Tree
    history: list[dict]
    seconds: float
    steps: int = 0
    stopped: str | None = None


def fit(
    model: nn.Module,
    params: Tree,
    optimizer: optax.GradientTransformation,
    data: np.ndarray,
    *,
    epochs: int,
    batch: int,
    accumulate: int = 1,
    seed: int = 0,
    loss: Loss = next_token,
    prequantize: Callable[[Tree], Tree] | None = None,
    recipe: Sequence[Part] = (),
    watch: Callable[[Tree, Tree], dict] | None = None,
    judge: Callable[..., dict[str, float]] = evaluate,
    held_out: np.ndarray | None = None,
    patience: int | None = None,
    stage: str = "train",
    log: Path | None = None,
    sinks: Sequence[Callable[[dict], None]] = (),
    keep: Path | None = None,
    resume: Path | None = None,
    save_every: float = 60.0,
    console: Console | None = None,
) -> Fit:
    """Train for a number of epochs; with ``resume``, in as many sittings as it takes.

    Args:
      model: a Linen module that ``loss`` can apply.
      params: its variables; not changed, the result holds new ones.
      optimizer: an optax transformation.
      data: windows (n, length + 1) of tokens.
      epochs: passes over the data.
      batch: windows in memory at once.
      accumulate: batches whose gradients are averaged for one step, see `train_step`.
      seed: fixes the order of the windows.
      loss: (model, params, batch) -> (scalar, metrics); one with arrays in it is a pytree, as
        `bitnet_jax.train.distill.distillation`.
      prequantize: quantises the weights once a step, see `train_step`.
      recipe: parts that stand between the parameters and the network, see `bitnet_jax.recipe`. The
        result's parameters are the trained ones; ``finish`` them to measure or pack them.
      watch: (params before, params after a step) -> metrics, see `bitnet_jax.train.watch`.
      judge: (model, params, held_out, batch) -> scores, ``loss`` and ``accuracy`` among them.
      held_out: windows to evaluate on after every epoch.
      patience: epochs without a lower held-out loss after which training stops; None for never.
      stage: name of this training in the log and on the progress bar.
      log: a JSONL file to append every history entry to; each step stands in it once, however
        often training is resumed.
      sinks: called with every history entry, see `bitnet_jax.train.sinks`. After a kill they see
        the steps since the last save again.
      keep: a folder that gets the variables after every epoch in ``last`` and those of the lowest
        held-out loss in ``best``, both checkpoints.
      resume: a folder that gets the whole state in ``state``. Called again with the same arguments,
        training goes on where it was saved and ends with the bytes it would have had unstopped;
        a finished one returns at once.
      save_every: least seconds between two saves of the state, which change nothing but how much
        is computed again after a kill; 0 to save after each step.
      console: where to draw the progress bar; None for silence.

    Returns:
      `Fit`.

    Raises:
      BitnetError: if the data makes no whole step, the loss or the held-out loss becomes NaN or
        infinite, an argument is out of range, a file cannot be written, or ``resume`` holds a
        training that was given something else.
    """
    _check(stage, accumulate, patience, held_out)
    per_epoch = steps_per_epoch(data, batch * accumulate)
    plan = _Plan(stage, epochs, batch, accumulate, seed, patience, per_epoch)
    step = train_step(model, optimizer, accumulate, prequantize, recipe, watch)
    loss, params = as_pytree(loss), recipes.begin(recipe, params)
    run, save = begin(params, optimizer, plan.total, log), Keeper(resume, save_every)
    run = save.open(run, lambda: _mark(plan, step, run, loss, data, held_out), log)
    record = _recorder(plan, run, ([] if log is None else [jsonl(log)]) + list(sinks))
    began = time.perf_counter() - run.seconds
    with bar(console, stage, plan.total, run.step) as show:
        for rows in plan.batches(data, run):
            metrics = _advance(run, plan, step, loss, rows)
            record(metrics)
            show(metrics["loss"], metrics["tokens_per_second"])
            if run.step % per_epoch == 0:
                if held_out is not None:
                    done = recipes.finish(recipe, run.params)
                    record(_judge(run, plan, judge(model, done, held_out, batch)))
                _keep(keep, run, stage)
            run.seconds = time.perf_counter() - began
            save(run, now=run.finished)
            if run.finished:
                break
    return Fit(run.params, run.history, run.seconds, run.step, run.stopped)


def _check(stage: str, accumulate: int, patience: int | None, held_out: Any) -> None:
    if accumulate < 1:
        raise BitnetError(f"{stage}: accumulate {accumulate}: give 1 batch a step or more")
    if patience is not None and patience < 1:
        raise BitnetError(f"{stage}: patience {patience}: give 1 epoch or more, or None")
    if patience is not None and held_out is None:
        raise BitnetError(f"{stage}: patience needs held-out text to judge by; give held_out")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The numbers of a training."""

    stage: str
    epochs: int
    batch: int
    accumulate: int
    seed: int
    patience: int | None
    per_epoch: int

    @property
    def total(self) -> int:
        return self.per_epoch * self.epochs

    def batches(self, data: np.ndarray, run: State) -> Iterator[np.ndarray]:
        """What is left to train on; nothing after training stopped early."""
        rows, epochs = self.batch * self.accumulate, 0 if run.finished else self.epochs
        return epochs_of(data, rows, epochs, self.seed, run.step)

    def check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise BitnetError(
                f"{self.stage}: the {what} became {value} at step {step} of {self.total}; "
                "lower the learning rate"
            )


def _mark(
    plan: _Plan, step: Any, run: State, loss: Loss, data: np.ndarray, held_out: np.ndarray | None
) -> dict:
    """The fingerprint of a training that has not begun."""
    rows = data[: plan.batch * plan.accumulate]
    at = jnp.asarray(0, jnp.int32)
    program = step.lower(run.params, run.opt_state, loss, rows, at).as_text()
    trees = {"parameters": run.params, "loss": loss}
    return fingerprint(dataclasses.asdict(plan), data, held_out, trees, program)


def _recorder(plan: _Plan, run: State, sinks: Sequence[Callable[[dict], None]]) -> Callable:
    """A function that adds numbers to the history, under the run's step, and tells every sink."""

    def record(numbers: dict) -> None:
        epoch = (run.step - 1) // plan.per_epoch + 1
        entry = {"stage": plan.stage, "step": run.step, "epoch": epoch, **numbers}
        run.history.append(entry)
        for sink in sinks:
            sink(entry)

    return record


def _advance(run: State, plan: _Plan, step: Callable, loss: Loss, rows: np.ndarray) -> dict:
    """Take one step; its numbers."""
    before = time.perf_counter()
    at = jnp.asarray(run.step, jnp.int32)
    run.params, run.opt_state, metrics = step(run.params, run.opt_state, loss, rows, at)
    # The one place that waits for the device.
    metrics = {k: float(v) for k, v in metrics.items()}
    speed = len(rows) * (rows.shape[1] - 1) / (time.perf_counter() - before)
    run.step += 1
    plan.check_finite("loss", metrics["loss"], run.step)
    return {**metrics, "tokens_per_second": round(speed)}


def _judge(run: State, plan: _Plan, scores: dict[str, float]) -> dict:
    """Note whether these held-out scores are the best so far, and stop a run out of patience."""
    loss = scores["loss"]
    plan.check_finite("held-out loss", loss, run.step)
    if run.best is None or loss < run.best:
        run.best, run.best_step, run.stale = loss, run.step, 0
    else:
        run.stale += 1
    if run.stale == plan.patience:
        run.stopped = (
            f"at step {run.step} of {plan.total}: the held-out loss has not been under "
            f"{run.best:.4f}, of step {run.best_step}, for {run.stale} epochs"
        )
    return {"held_out_loss": loss, "held_out_accuracy": scores["accuracy"]}


def _keep(folder: Path | None, run: State, stage: str) -> None:
    """Save the variables as the last and, if they are, as the best."""
    metadata = {"stage": stage, "step": run.step}
    if folder is None:
        return
    if run.best_step == run.step:
        checkpoint.save(folder / "best", run.params, metadata, overwrite=True)
    checkpoint.save(folder / "last", run.params, metadata, overwrite=True)
