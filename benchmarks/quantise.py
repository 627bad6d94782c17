"""Latent weights to packed codes beside memcpy of the same bytes, in one run, turn by turn.

    python -m benchmarks.quantise --out benchmarks/results/quantise
    python -m benchmarks.quantise --threads 2 --out benchmarks/results/quantise_2threads

One thread is measured in CPU time, two in wall time, each with memcpy on as many threads. "XLA" is
what there is without a compiler. The floor is the time in which numpy finds the largest of the same
bytes, the fastest reading of them that is known here, once for the scale and once for the codes.
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bitnet_jax.bench.timing import keep, spread, turns


def settle(threads: int) -> None:
    """Keep to the last cores, and tell XLA so. Before jax is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = flags + " --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"


def on_threads(threads: int, f: Callable, *arrays: np.ndarray) -> Callable:
    """f of equal parts of the arrays, on so many threads."""
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(*(np.array_split(a, threads) for a in arrays)))
    return lambda: list(pool.map(lambda part: f(*part), parts))


def calls_for(shape: tuple[int, int], threads: int) -> dict[str, Callable]:
    import jax

    from bitnet_jax import Scheme
    from bitnet_jax.packed import pack_weight
    from bitnet_jax.quantize import quantize_weights
    from bitnet_jax.quantpack import quantize_packed

    w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    room, x = np.empty_like(w), jax.device_put(w)
    calls = {
        "memcpy": on_threads(threads, np.copyto, room, w),
        "read once": on_threads(threads, np.max, w.view(np.int32)),
    }
    schemes = (("absmean", "tensor"), ("absmean", "channel"), ("absmean", 64),
               ("twn", "tensor"), ("twn", "channel"), ("twn", 64))  # fmt: skip
    for rule, scale in schemes:
        scheme = Scheme(rule, scale)
        ours = jax.jit(lambda w, s=scheme: quantize_packed(w, s))
        plain = jax.jit(lambda w, s=scheme: pack_weight(quantize_weights(w, s)))
        calls[f"{rule} {scale}"] = lambda f=ours: jax.block_until_ready(f(x))
        calls[f"{rule} {scale}, XLA"] = lambda f=plain: jax.block_until_ready(f(x))
    return calls


def table(result: dict) -> Table:
    found = Table(title=f"{result['megabytes']} MB of float32, {result['about']}")
    for name in ("", "ms", "10 % - 90 %", "GB/s", "x memcpy"):
        found.add_column(name, justify="right" if name else "left")
    for row in result["rows"]:
        spread = f"{row['low']:.1f} - {row['high']:.1f}"
        numbers = (f"{row['ms']:.1f}", spread, f"{row['gb_s']:.2f}", f"{row['of_memcpy']:.2f}")
        found.add_row(row["name"], *numbers)
    return found


def main(
    out: Path | None = None,
    threads: int = 1,
    repeats: int = 7,
    shape: tuple[int, int] = (4096, 8192),
) -> None:
    """Time all of them and print the table.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      threads: of every call; 1 is measured in CPU time.
      repeats: that count, after one that compiles.
      shape: of the leaf, inputs and outputs.
    """
    settle(threads)
    import jax

    from bitnet_jax.ops import quantise

    calls = calls_for(shape, threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = turns(calls, repeats, clock=clock)
    size, memcpy = 4 * shape[0] * shape[1], statistics.median(seconds["memcpy"])
    rows = []
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        speeds = {"gb_s": size / middle / 1e9, "of_memcpy": memcpy / middle}
        rows.append({"name": name, **spread(taken), **speeds})
    about = f"{threads} thread(s), {'CPU' if threads == 1 else 'wall'} time"
    about += f", load {os.getloadavg()[0]:.1f}, jax {jax.__version__}"
    about += "" if quantise.available() else ", no C++ op"
    result = {"about": about, "megabytes": size >> 20, "rows": rows}
    Console().print(table(result))
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(main)
