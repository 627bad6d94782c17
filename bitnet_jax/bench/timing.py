"""What all benchmarks share: turns in one process, medians, results kept as JSON and text."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table


def turns(
    calls: dict[str, Callable],
    repeats: int,
    skip: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn, so that a busy moment of the machine meets all of them.

    Args:
      calls: name to what is timed; it returns when its result is there.
      repeats: turns that count.
      skip: turns before them, which compile.
      clock: in seconds; `time.process_time` on one thread does not count what others are given.
      done: called after every call, for a progress bar.
    """
    seconds = {name: [] for name in calls}
    for i in range(repeats + skip):
        for name, call in calls.items():
            start = clock()
            call()
            if i >= skip:
                seconds[name].append(clock() - start)
            done()
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds.

    >>> spread([0.001, 0.002, 0.009])["ms"]
    2.0
    """
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    middle = statistics.median(seconds)
    return {"ms": 1e3 * middle, "low": 1e3 * tenths[0], "high": 1e3 * tenths[-1]}


def keep(out: Path | None, result: dict, table: Table, width: int = 100) -> None:
    """Write the figures to OUT.json and the table to OUT.txt; nothing for None."""
    if out is None:
        return
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    with out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=width, force_jupyter=False).print(table)
