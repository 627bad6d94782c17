"""Tracing and compiling a training step: what ternary layers add to a float model's.

    python -m benchmarks.compile_time --out benchmarks/results/compile_time

24 layers of width 256, a batch of 2 x 64 tokens, AdamW; each is traced, lowered and compiled from
nothing several times, turn by turn, with no cache of compiled programs.
"""

import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.timing import keep
from bitnet_jax import Scheme
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.train.loss import next_token
from bitnet_jax.train.step import as_pytree, train_step

FLOAT, TERNARY = "float32", "ternary"
STAGES = ("trace", "lower", "compile")


def once(scheme: Scheme | None, layers: int, precision) -> dict[str, float]:
    """Seconds of each stage, with nothing remembered from an earlier call."""
    jax.clear_caches()
    config = DecoderConfig(vocab_size=1024, layers=layers, precision=precision)
    model, optimizer = config.build(scheme), optax.adamw(1e-3)
    tokens = jnp.zeros((2, 65), jnp.int32)
    state = jax.eval_shape(
        lambda key: (p := model.init(key, tokens[:, :-1]), optimizer.init(p)), jax.random.key(0)
    )
    step, loss = train_step(model, optimizer), as_pytree(next_token)
    moments = [time.perf_counter()]
    made = step.trace(*state, loss, tokens, 0)
    for go in ("lower", "compile"):
        moments.append(time.perf_counter())
        made = getattr(made, go)()
    moments.append(time.perf_counter())
    return {name: b - a for name, a, b in zip(STAGES, moments, moments[1:])}


def table(result: dict) -> Table:
    found = Table(title=f"Tracing and compiling a step, {result['layers']} layers, seconds")
    for name in ("model", *STAGES, "all", "beside float32"):
        found.add_column(name, justify="left" if name == "model" else "right")
    for row in result["rows"]:
        numbers = (f"{row[k]:.2f}" for k in (*STAGES, "seconds"))
        found.add_row(row["name"], *numbers, f"{row['beside_float32']:.2f}x")
    return found


def main(out: Path | None = None, repeats: int = 3, layers: int = 24) -> None:
    """Time all of them and print the table.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      repeats: times each is compiled, after once that is not counted.
      layers: of the decoders.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    models = {
        FLOAT: (None, "float32"),
        TERNARY: (Scheme(), "float32"),
        f"{TERNARY}, tensorfloat32": (Scheme(), "tensorfloat32"),
    }
    found, console = {name: [] for name in models}, Console()
    with console.status("compiling"):
        for scheme, precision in models.values():
            once(scheme, 1, precision)  # imports, and the C++ op, which is compiled once
        for _ in range(repeats):
            for name, (scheme, precision) in models.items():
                found[name].append(once(scheme, layers, precision))
    rows = []
    for name, times in found.items():
        medians = {stage: statistics.median(t[stage] for t in times) for stage in STAGES}
        whole = statistics.median(sum(t.values()) for t in times)
        rows.append({"name": name, **medians, "seconds": whole})
    for row in rows:
        row["beside_float32"] = row["seconds"] / rows[0]["seconds"]
    result = {"layers": layers, "load": os.getloadavg()[0], "jax": jax.__version__, "rows": rows}
    console.print(table(result))
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(main)
