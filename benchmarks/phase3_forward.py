"""Forward pass of the production Phase 3 model: ours beside the PyTorch reference arithmetic.

    python -m benchmarks.phase3_forward --out benchmarks/results/phase3_forward

The same weights and tokens on every side, turn by turn in one process, so that a busy moment of
the machine meets all of them. Needs torch, which only benchmarks and .pt files do.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import phase3_torch, production
from benchmarks.timing import keep, turns
from bitnet_jax import Scheme, compress, convert

TORCH, FLOAT = "torch, float32, eager", "ours, float32"
TERNARY, PLANNED = "ours, every matrix ternary, int4 tables", "ours, planned for 8.2x"


def competitors(base: Path, ids: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """Name to a call that gives the logits of these tokens."""
    peer, theirs = phase3_torch.load_pair(base), torch.from_numpy(ids)

    def by_torch() -> np.ndarray:
        with torch.inference_mode():
            return peer(theirs)["logits"].numpy()

    source, scheme = compress.load_source(base, tokenizer="bytes"), Scheme("twn", "channel")
    every = compress.make_policy("int4", source)
    planned = compress.plan_for(source, scheme, every, 8.2)
    run = jax.jit(lambda model, params: model.apply(params, ids)["logits"], static_argnums=0)
    ours = lambda scheme, params: lambda: np.asarray(run(source.config.build(scheme), params))
    packed = lambda policy: ours(scheme, convert(source.params, policy, scheme).tree)
    return {
        TORCH: by_torch,
        FLOAT: ours(None, jax.device_put(source.params)),
        TERNARY: packed(every),
        PLANNED: packed(planned),
    }


def table(result: dict) -> Table:
    found = Table(title=f"Forward pass, {result['batch']} x {result['length']} tokens")
    for name in ("network", "median s", "from", "to", "beside torch"):
        found.add_column(name, justify="left" if name == "network" else "right")
    for row in result["rows"]:
        numbers = (f"{row[k]:.3f}" for k in ("seconds", "least", "most"))
        found.add_row(row["name"], *numbers, f"{row['speedup_vs_torch']:.2f}x")
    return found


def main(
    out: Path | None = None, batch: int = 8, length: int = 256, repeats: int = 7, seed: int = 0
) -> None:
    """Time all of them and print the table.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      batch: sequences.
      length: tokens of each.
      repeats: passes timed, after one that compiles.
      seed: of weights and tokens.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder, console.status("making and loading the model"):
        base = Path(folder) / "production"
        production.write_pair(base, seed=seed)
        ids = np.random.default_rng(seed).integers(0, 50257, (batch, length))
        calls = competitors(base, ids)
    logits = {name: call() for name, call in calls.items()}
    wanted = logits[TORCH]
    error = {n: float(np.abs(x - wanted).max() / wanted.std()) for n, x in logits.items()}
    with console.status("timing"):
        seconds = turns(calls, repeats)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    rows = [
        {
            "name": name,
            "seconds": medians[name],
            "least": min(seconds[name]),
            "most": max(seconds[name]),
            "speedup_vs_torch": medians[TORCH] / medians[name],
            "largest_difference_of_logits_over_spread": error[name],
        }
        for name in calls
    ]
    result = {
        "batch": batch,
        "length": length,
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "load": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "jax": jax.__version__},
        "rows": rows,
    }
    console.print(table(result))
    console.print(f"float32 logits differ by {error[FLOAT]:.1e} of their spread", highlight=False)
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(main)
