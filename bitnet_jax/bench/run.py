"""The rows of ``bitnet-jax bench``: what is timed beside what, and what the machine could do."""

import dataclasses
import importlib.util
import os
import platform
from collections.abc import Callable
from importlib.metadata import version

import jax
from rich.console import Console

from ..ops.native import status
from ..progress import counter
from . import floor, peers, step
from .timing import spread, turns

OURS = "bitnet-jax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that is timed, as whoever asks would do it.

    Attributes:
      name: as in the JSON.
      calls: name to call: `OURS`, and peers; those that begin with "XLA float32" are compared with.
      products: how many of what the row is about a call does.
      work: bytes that one must read, or operations it must do.
      limits: name to (call, its own work): the machine at its best with nothing else to do.
      unit: of 1e9 work a second.
    """

    name: str
    calls: dict[str, Callable]
    products: int
    work: float
    limits: dict[str, tuple[Callable, float]]
    unit: str


def product_row(rows: int, k: int, n: int, torch: bool, copies: int) -> Row:
    """Activations (rows, k) by a matrix (k, n): float in, float out, quantising included.

    One row is measured from memory: every call multiplies by several matrices, together larger
    than caches are. With many rows the arithmetic counts, not where the weights come from.
    """
    weights = peers.Weights.make(rows, k, n, copies)
    calls = {OURS: peers.ours(weights), **peers.xla(weights)}
    if torch:
        calls |= peers.torch(weights)
    if rows == 1:
        name, work, limits, unit = f"matvec-{k}x{n}-cold", k * n / 4, floor.reading(), "GB/s"
    else:
        name, work, limits = f"matmul-{rows}x{k}x{n}", 2 * rows * k * n, floor.products()
        unit = "Gop/s"
    return Row(name, calls, copies, work, limits, unit)


def step_row(torch: bool) -> Row:
    """A training step of a 25M-parameter decoder, ternary and float."""
    calls = {OURS: step.by_us(True), "XLA float32": step.by_us(False)}
    calls["XLA bfloat16"] = step.by_us(False, "bfloat16")
    if torch:
        calls["torch float32"] = step.by_torch()
        calls["torch bfloat16 autocast"] = step.by_torch(autocast=True)
        calls["torch BitLinear"] = step.by_torch(ternary=True)
    return Row("train-step-25m", calls, 1, step.operations(), floor.products(), "Gop/s")


def run(console: Console | None = None, quick: bool = False) -> dict:
    """Time every row, beside XLA's float32 and bfloat16, and torch's where it is installed.

    Args:
      console: where a progress bar is drawn; None for silence.
      quick: fewer turns, and no torch in the training step: a look rather than a measurement.

    Returns:
      ``rows``: each with ``name``, ``ms`` (the median; ``low`` and ``high`` are the 10th and 90th
      percentile), ``speedup_vs_float32`` (XLA's, the faster of its two layouts), ``floor`` (``ms``,
      ``what``, ``rate``, ``unit``: measured in the same turns), ``floor_share`` (floor over ours)
      and ``peers`` (name to ``ms``, ``low``, ``high``, ``speedup_vs_float32``); and what ran them:
      ``versions``, ``device``, ``threads``, ``load``, ``native``.
    """
    torch, load = importlib.util.find_spec("torch") is not None, os.getloadavg()[0]
    makers = (
        (lambda: product_row(1, 4096, 4096, torch, 8), 3 if quick else 15),
        (lambda: product_row(128, 2560, 6912, torch, 1), 3 if quick else 9),
        (lambda: step_row(torch and not quick), 2 if quick else 4),
    )
    rows = []
    for make, repeats in makers:
        row = make()
        timed = row.calls | {name: call for name, (call, _) in row.limits.items()}
        with counter(console, row.name, (repeats + 1) * len(timed)) as done:
            rows.append(judged(row, turns(timed, repeats, done=done)))
    names = ("jax", "jaxlib", "flax") + (("torch",) if torch else ())
    return {
        "versions": {name: version(name) for name in names},
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "threads": floor.threads(),
        "load": load,
        "native": status(),
        "rows": rows,
    }


def judged(row: Row, seconds: dict[str, list[float]]) -> dict:
    """The figures of one row, for one product or step each.

    >>> row = Row("a", {}, 2, 1e6, {"read": (print, 4e6)}, "GB/s")
    >>> taken = {OURS: [0.002] * 2, "XLA float32": [0.02] * 2, "read": [0.002] * 2}
    >>> found = judged(row, taken)
    >>> found["ms"], found["speedup_vs_float32"], found["floor"]["ms"], found["floor"]["rate"]
    (1.0, 10.0, 0.5, 2.0)
    """
    found = {
        name: spread([s / row.products for s in taken])
        for name, taken in seconds.items()
        if name not in row.limits
    }
    float32 = min(x["ms"] for name, x in found.items() if name.startswith("XLA float32"))
    for x in found.values():
        x["speedup_vs_float32"] = float32 / x["ms"]
    ours = found.pop(OURS)
    rates = {name: work / spread(seconds[name])["ms"] for name, (_, work) in row.limits.items()}
    what, rate = max(rates.items(), key=lambda x: x[1])
    floor_ms = row.work / rate
    return {
        "name": row.name,
        **ours,
        "floor": {"ms": floor_ms, "what": what, "rate": rate / 1e6, "unit": row.unit},
        "floor_share": floor_ms / ours["ms"],
        "peers": found,
    }
