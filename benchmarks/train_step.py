"""A training step of a 27M-parameter decoder: float and ternary, ours and PyTorch's.

    python -m benchmarks.train_step --out benchmarks/results/train_step

12 layers of width 384, SwiGLU of 1,024, 16,384 tied tokens, AdamW, batches of 8 x 128 tokens; the
same shape on both sides. PyTorch's ternary side is a straightforward BitLinear: absmean codes and
8-bit activations computed in float, straight-through, `F.linear`. Steps are taken turn by turn in
one process, so that a busy moment of the machine meets all of them. What is in bfloat16 takes a
single step unless the CPU has units for it: without them a step of torch's autocast takes most of a
minute. All run in one process whose malloc asks for large pages. Needs torch.

`train-step-25m` is our ternary step with ``precision="tensorfloat32"``: grad-weight from gradients
in 16 bits, everything else as in float32 (`bitnet_jax.ops.training`). The head and embedding, a
quarter of a float step's products, are float in all of them. Our float step runs through the same
loop and the same head; its layers are XLA's `dot_general`, as in plain Flax.
"""

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import keep, turns
from bitnet_jax import Scheme
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.train.loop import committed
from bitnet_jax.train.loss import next_token
from bitnet_jax.train.step import as_pytree, train_step

LAYERS, WIDTH, HIDDEN, HEADS, VOCAB = 12, 384, 1024, 6, 16384
FLOAT, TERNARY = "ours, float32", "ours, ternary, gradients in 16 bits"
TORCH, BITLINEAR = "torch, float32", "torch, BitLinear"


class BitLinear(nn.Linear):
    """w and x rounded, the gradient of what was not: the layer most PyTorch projects have."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp(min=1e-5)
        w = (self.weight / scale).round().clamp(-1, 1) * scale
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * (127 / largest)).round().clamp(-128, 127) * (largest / 127)
        return F.linear(x + (q - x).detach(), self.weight + (w - self.weight).detach())


class Block(nn.Module):
    def __init__(self, linear: type[nn.Linear]):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
        square = lambda: linear(WIDTH, WIDTH, bias=False)
        self.q, self.k, self.v, self.o = square(), square(), square(), square()
        self.gate, self.up = (linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        split = lambda a: a.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TorchDecoder(nn.Module):
    """The same shape as ours but for rotary positions, which cost next to nothing."""

    def __init__(self, linear: type[nn.Linear]):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(Block(linear) for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH, 1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embed(tokens))), self.embed.weight)


def by_torch(linear: type[nn.Linear], batch: np.ndarray, autocast: bool = False) -> Callable:
    """A call that takes one step."""
    torch.manual_seed(0)
    model, rows = TorchDecoder(linear), torch.from_numpy(batch).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def by_us(
    scheme: Scheme | None, batch: np.ndarray, dtype: Any = "float32", precision: Any = "float32"
) -> Callable:
    """A call that takes one step."""
    config = DecoderConfig(
        vocab_size=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, hidden=HIDDEN,
        dtype=dtype, precision=precision,
    )  # fmt: skip
    model, optimizer = config.build(scheme), optax.adamw(1e-3)
    params = model.init(jax.random.key(0), batch[:1, :-1])
    state = [committed((params, optimizer.init(params)))]
    take, loss = train_step(model, optimizer), as_pytree(next_token)

    def step() -> float:
        params, opt_state, metrics = take(*state[0], loss, batch, 0)
        state[0] = params, opt_state
        return float(metrics["loss"])

    return step


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
    batch = np.random.default_rng(0).integers(0, VOCAB, (8, 129)).astype(np.int32)
    steps = {
        FLOAT: by_us(None, batch),
        TERNARY: by_us(Scheme(), batch, precision="tensorfloat32"),
        "ours, ternary": by_us(Scheme(), batch),
        TORCH: by_torch(nn.Linear, batch),
        BITLINEAR: by_torch(BitLinear, batch),
    }
    halves = {"torch, bfloat16 autocast": by_torch(nn.Linear, batch, autocast=True)}
    if units := _bfloat16_units():
        halves["ours, bfloat16"] = by_us(None, batch, "bfloat16")
        halves["ours, ternary, bfloat16"] = by_us(Scheme(), batch, "bfloat16")
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
    parameters = sum(x.numel() for x in TorchDecoder(nn.Linear).parameters())
    versions = {"torch": torch.__version__, "jax": jax.__version__}
    result = {
        "parameters": parameters,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": versions,
        "tunables": os.environ.get("GLIBC_TUNABLES"),
        "rows": rows,
    }
    console.print(table(result))
    keep(out, result, table(result))


def with_large_pages() -> None:
    """Start again with glibc asking for large pages, which it reads once, at the start.

    XLA takes the memory of a step's temporaries anew each time: 160,000 page faults, 0.4 s of CPU.
    """
    name, value = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
    if name not in os.environ:
        arguments = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {name: value})


if __name__ == "__main__":
    with_large_pages()
    tyro.cli(main)
