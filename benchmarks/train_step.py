"""A training step of a 27M-parameter decoder: float and ternary, ours and PyTorch's.

    python -m benchmarks.train_step --out benchmarks/results/train_step

12 layers of width 384, SwiGLU of 1,024, 16,384 tied tokens, AdamW, batches of 8 x 128 tokens; the
same shape on both sides. PyTorch's ternary side is a straightforward BitLinear: absmean codes and
8-bit activations computed in float, straight-through, `F.linear`. Steps are taken turn by turn in
one process, so that a busy moment of the machine meets all of them. What is in bfloat16 takes a
single step unless the CPU has units for it: without them a step of torch's autocast takes most of a
minute. All run in one process whose malloc asks for large pages and keeps what is freed. Needs
torch.

`train-step-25m` is our ternary step as it comes, with float32 gradients; beside it the same with
``precision="tensorfloat32"``: grad-weight from gradients in 16 bits (`bitnet_jax.ops.training`).
The head and embedding, a quarter of a float step's products, are float in all of them. Our float
step is XLA's products throughout, as in plain Flax.
"""

import os
import statistics
import sys
from pathlib import Path

import jax
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.timing import keep, turns
from bitnet_jax.bench.step import by_torch, by_us, parameters

FLOAT, TERNARY = "ours, float32", "ours, ternary"
TORCH, BITLINEAR = "torch, float32", "torch, BitLinear"


def table(result: dict) -> Table:
    found = Table(title=f"A training step, {result['parameters'] / 1e6:.1f} M parameters")
    beside = ("speedup_vs_float32", "speedup_vs_torch", "speedup_vs_bitlinear")
    for name in ("step", "median s", "from", "to", "x float32", "x torch", "x BitLinear"):
        found.add_column(name, justify="left" if name == "step" else "right")
    for row in result["rows"]:
        numbers = (f"{row[k]:.3f}" for k in ("seconds", "least", "most"))
        found.add_row(row["step"], *numbers, *(f"{row[k]:.2f}" for k in beside))
    return found


def _bfloat16_units() -> bool:
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def main(out: Path | None = None, repeats: int = 7, autocast: bool = True) -> None:
    """Time all of them and print the table.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      repeats: steps timed, after two that are not.
      autocast: also take one step of torch's autocast where the CPU has no units for it.
    """
    console = Console()
    steps = {
        FLOAT: by_us(ternary=False),
        TERNARY: by_us(ternary=True),
        "ours, ternary, gradients in 16 bits": by_us(ternary=True, precision="tensorfloat32"),
        TORCH: by_torch(),
        BITLINEAR: by_torch(ternary=True),
    }
    halves = {"torch, bfloat16 autocast": by_torch(autocast=True)}
    if units := _bfloat16_units():
        halves["ours, bfloat16"] = by_us(ternary=False, dtype="bfloat16")
        halves["ours, ternary, bfloat16"] = by_us(ternary=True, dtype="bfloat16")
        steps |= halves
    with console.status("timing"):
        seconds = turns(steps, repeats, skip=2)
        if autocast and not units:
            seconds |= turns(halves, 1, skip=0)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    rows = [
        {
            "name": "train-step-25m" if name == TERNARY else name,
            "step": name,
            "seconds": medians[name],
            "least": min(seconds[name]),
            "most": max(seconds[name]),
            "steps": len(seconds[name]),
            "speedup_vs_float32": medians[FLOAT] / medians[name],
            "speedup_vs_torch": medians[TORCH] / medians[name],
            "speedup_vs_bitlinear": medians[BITLINEAR] / medians[name],
        }
        for name in seconds
    ]
    versions = {"torch": torch.__version__, "jax": jax.__version__}
    result = {
        "parameters": parameters(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": versions,
        "tunables": os.environ.get("GLIBC_TUNABLES"),
        "rows": rows,
    }
    console.print(table(result))
    keep(out, result, table(result))


# XLA takes the memory of a step's temporaries anew each time, and glibc gives it back in between:
# 160,000 page faults, 0.4 s of CPU. With large pages 600, with memory kept none.
TUNABLES = {
    "hugetlb": 1,
    "mmap_max": 0,
    "trim_threshold": 2**34,
    "arena_max": 1,
}


def with_memory_kept() -> None:
    """Start again with glibc's malloc told so, which it reads once, at the start."""
    name, value = "GLIBC_TUNABLES", ":".join(f"glibc.malloc.{k}={v}" for k, v in TUNABLES.items())
    if name not in os.environ:
        arguments = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {name: value})


if __name__ == "__main__":
    with_memory_kept()
    tyro.cli(main)
