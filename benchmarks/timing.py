"""What the benchmarks share: turns in one process, and results kept as JSON and text."""

import json
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
) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn, so that a busy moment of the machine meets all of them.

    Args:
      calls: name to what is timed; it returns when its result is there.
      repeats: turns that count.
      skip: turns before them, which compile.
      clock: in seconds; `time.process_time` on one thread does not count what others are given.
    """
    seconds = {name: [] for name in calls}
    for i in range(repeats + skip):
        for name, call in calls.items():
            start = clock()
            call()
            if i >= skip:
                seconds[name].append(clock() - start)
    return seconds


def keep(out: Path | None, result: dict, table: Table, width: int = 100) -> None:
    """Write the figures to OUT.json and the table to OUT.txt; nothing for None."""
    if out is None:
        return
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    with out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=width).print(table)
