"""What this machine multiplies packed weights with, why, and how fast that is."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from .ops import OPS, attention, choose, choose_dense, training
from .ops.choose import matrix_units
from .ops.native import status, variants

_ROWS = (1, 2, 8, 128)
_SIZE = 2048
_REASONS = {
    "native": "C++ reads the packed codes as they lie",
    "decode": "no C++ op here; plain JAX on packed codes, good for a few rows",
    "mosaic": "int8 tensor cores read the packed codes as they lie",
    "xla": "unpacks to int8, then XLA's own product",
    "xla-float8": "unpacks to float8, then XLA's product with bfloat16: no int8 units here",
}


def examine(repeats: int = 7) -> dict:
    """Ops this machine has, which is picked for how many rows, and their time beside float32's.

    Args:
      repeats: calls timed of each, after one that compiles.

    Returns:
      ``versions``, ``platform``, ``devices``, ``cpu``, ``native``, ``training`` and ``attention``
      (a sentence each), ``choices``: a list of ``rows``, ``op``, ``why``, ``ms`` (the median),
      ``float32_ms`` of XLA's product of the same 2048 x 2048 matrix in float32, and
      ``speedup_vs_float32``. Weights are in cache where it holds them; benchmarks/products.py
      measures them from memory.
    """
    backend = jax.default_backend()
    found = {
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "platform": backend,
        "devices": [f"{d.device_kind} ({d.platform})" for d in jax.devices()],
        "cpu": platform.processor() or platform.machine(),
        "native": status(),
        "variants": list(variants()),
        "training": _training(backend),
        "attention": _attention(backend),
        "choices": [],
    }
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(0, 171, (_SIZE // 4, _SIZE)) & 0xAA, jnp.uint8)
    weight = jnp.asarray(random.standard_normal((_SIZE, _SIZE)), jnp.float32)
    for rows in _ROWS:
        name = choose("cuda" if backend == "gpu" else backend, rows)
        x = jnp.asarray(random.integers(-127, 128, (rows, _SIZE)), jnp.int8)
        ours = jax.jit(lambda x, codes, op=OPS[name]: op(x, codes, _SIZE))
        floats, y = jax.jit(jnp.dot), x.astype(jnp.float32)
        calls = (lambda: ours(x, codes), lambda: floats(y, weight))  # noqa: B023
        ms, float_ms = _medians(calls, repeats)
        found["choices"].append(
            {
                "rows": rows,
                "op": name,
                "why": _REASONS[name],
                "ms": ms,
                "float32_ms": float_ms,
                "speedup_vs_float32": float_ms / ms,
            }
        )
    return found


def _training(backend: str) -> str:
    """Which form a training step's products have here, and why."""
    forward = choose_dense(backend, 1024, 1024, 1024)
    backward = choose_dense(backend, 1024, 1024, 1024, "float32")
    if forward == "native":
        return f"training: in C++, this CPU has no matrix units for int8 ({training.status()})"
    if backward == "native":
        return f"training: XLA's int8 forward, by matrix units; backward C++ ({training.status()})"
    if backend == "cpu" and not matrix_units():
        return f"training: XLA's int8, for want of an op in C++ ({training.status()})"
    return "training: XLA's int8, which this machine has matrix units for"


def _attention(backend: str) -> str:
    """Which form attention in float32 has here, and why."""
    if backend != "cpu":
        return "attention: XLA's"
    if attention.variants():
        return f"attention: in C++, heads on all threads ({attention.status()})"
    return f"attention: XLA's, on one thread, for want of an op in C++ ({attention.status()})"


def _medians(calls: tuple[Callable, ...], repeats: int) -> list[float]:
    """Milliseconds of each, turn by turn, so that a busy moment meets all of them."""
    times = [[] for _ in calls]
    for i in range(repeats + 1):
        for call, seconds in zip(calls, times):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) for seconds in times]


def render(found: dict) -> list:
    """The findings for a person."""
    told = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    table = Table(title=f"Packed ternary products, {_SIZE} x {_SIZE}", title_justify="left")
    for name in ("rows", "op", "ms", "float32 ms", "faster"):
        table.add_column(name, justify="left" if name == "op" else "right")
    table.add_column("why")
    for x in found["choices"]:
        numbers = (f"{x['ms']:.3f}", f"{x['float32_ms']:.3f}", f"{x['speedup_vs_float32']:.1f}x")
        table.add_row(str(x["rows"]), x["op"], *numbers, x["why"])
    sentences = [found[name] for name in ("native", "training", "attention")]
    return [f"{told} on {', '.join(found['devices'])}", *sentences, table]
