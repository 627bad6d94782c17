"""Where the numbers of a training go: a JSONL file, TensorBoard, Weights & Biases.

A sink is any function of one history entry, a dict with ``stage``, ``step``, ``epoch`` and numbers.
"""

import atexit
import dataclasses
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

from ..errors import BitnetError


@dataclasses.dataclass(frozen=True)
class Sink:
    """A function of one history entry, and how to close what it writes to.

    >>> seen = []
    >>> Sink(seen.append)({"stage": "train", "step": 1, "loss": 0.5})
    >>> seen
    [{'stage': 'train', 'step': 1, 'loss': 0.5}]
    """

    write: Callable[[dict], Any]
    close: Callable[[], Any] = lambda: None

    def __call__(self, entry: dict) -> None:
        self.write(entry)


def jsonl(path: str | os.PathLike) -> Sink:
    """One line of JSON an entry, appended to a file.

    Args:
      path: the file; made if it does not exist, opened anew for each entry, so that a killed run
        leaves every line it wrote.

    Raises:
      BitnetError: on writing, if that fails.
    """

    def write(entry: dict) -> None:
        try:
            with open(path, "a") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            raise BitnetError(f"{path}: cannot be written ({e.strerror})") from e

    return Sink(write)


def tensorboard(folder: str | os.PathLike) -> Sink:
    """Curves for TensorBoard, ``stage/loss`` and so on over the steps.

    Args:
      folder: the log directory.

    Returns:
      A sink; what it holds back (ten seconds) is written when it is closed or the program ends.

    Raises:
      BitnetError: if tensorboardX is not installed.
    """
    writer = _module("tensorboardX", "tensorboard").SummaryWriter(str(folder), flush_secs=10)
    atexit.register(writer.close)

    def write(entry: dict) -> None:
        for name, value in _numbers(entry).items():
            writer.add_scalar(f"{entry['stage']}/{name}", value, entry["step"])

    def close() -> None:
        atexit.unregister(writer.close)
        writer.close()

    return Sink(write, close)


def wandb(project: str, **settings: Any) -> Sink:
    """Curves for Weights & Biases, ``stage/loss`` and so on over ``stage/step``.

    Args:
      project: its name there.
      settings: for ``wandb.init``; ``mode="offline"`` writes to the disk alone, to be sent later
        with ``wandb sync``.

    Returns:
      A sink; closing it finishes the run, as does the end of the program.

    Raises:
      BitnetError: if wandb is not installed.
    """
    run = _module("wandb", "wandb").init(project=project, **settings)
    stages = set()

    def write(entry: dict) -> None:
        stage = entry["stage"]
        # An axis of its own for each stage: wandb drops entries whose step is not above the last.
        if stage not in stages:
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            stages.add(stage)
        numbers = {"step": entry["step"], **_numbers(entry)}
        run.log({f"{stage}/{name}": value for name, value in numbers.items()})

    return Sink(write, run.finish)


def _numbers(entry: dict) -> dict[str, float]:
    """What is worth a curve."""
    skip = ("stage", "step", "epoch")
    return {k: v for k, v in entry.items() if k not in skip and isinstance(v, int | float)}


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise BitnetError(f"{name} is not installed; run: pip install 'bitnet-jax[{extra}]'") from e
