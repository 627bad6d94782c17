"""Progress bars, of a training and of anything that is counted."""

import contextlib
import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(
    console: Console | None, stage: str, total: int, done: int = 0
) -> Iterator[Callable[[float, float], None]]:
    """A progress bar with loss, throughput and time left; draws nothing without a console.

    Args:
      console: where to draw; None for silence.
      stage: what stands in front.
      total: steps in all.
      done: steps already taken, in an earlier sitting.

    Returns:
      A function of (loss, tokens a second) to call after every step.

    >>> with bar(None, "train", 2) as show:
    ...     show(0.5, 1e4)
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(stage, total=total, completed=done, loss=math.nan, speed=0.0)
        yield lambda loss, speed: progress.update(task, advance=1, loss=loss, speed=speed)


@contextlib.contextmanager
def counter(console: Console | None, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of things done one after another; draws nothing without a console.

    Args:
      console: where to draw; None for silence.
      what: stands in front.
      total: how many there are.

    Returns:
      A function to call after each.

    >>> with counter(None, "calibrate", 1) as done:
    ...     done()
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.update(task, advance=1)
