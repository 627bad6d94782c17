"""``eval``: what a model knows."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from ..errors import BitnetError
from .checks import Json

Module = Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")]
Tokenizer = Annotated[str | None, tyro.conf.arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Loss, accuracy and perplexity of a model on text, and its agreement with another model."""

    model: tyro.conf.Positional[Path]
    """A model folder, ours or Hugging Face's, a .gguf file, or PyTorch weights with --module."""
    data: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Text: a file or a folder. Measured is the tenth that compress holds out."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None
    """Another model with the same tokens to agree with, the float one say."""
    module: Module = None
    """The network the weights are for, as for compress."""
    tokenizer: Tokenizer = None
    """A tokenizer.json, or bytes; by default the one beside the weights."""
    batch: int = 16
    """Windows measured at once."""
    length: int = 128
    """Tokens a window."""
    json: Json = None
    """Also write the figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress
        from ..objective import evaluator
        from ..train.agreement import agreement

        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise BitnetError(f"--{name} {getattr(self, name)}: must be 1 or more")
        with console.status("measuring", spinner="line"):
            source = compress.load_source(self.model, self.module, self.tokenizer)
            text = compress.load_text(self.data, source, self.length).held_out
            evaluate = evaluator(source)
            result: dict = {"model": str(self.model)}
            result |= evaluate(source.model, source.params, text, self.batch)
            if self.against is not None:
                other = compress.load_source(self.against, self.module, self.tokenizer)
                compress.check_tokens(self.against, other, text)
                result["against"] = {"model": str(self.against)} | {
                    **evaluate(other.model, other.params, text, self.batch),
                    **agreement(
                        source.model, source.params, other.model, other.params, text, self.batch
                    ),
                }
        console.print(_table(result))
        return result


def _table(result: dict) -> Table:
    table = Table(title=f"{result['tokens']:,} held-out tokens", title_justify="left")
    table.add_column("model")
    names = ["loss (nats)", "perplexity", "accuracy"]
    rows = [result] + ([result["against"]] if "against" in result else [])
    for name in names + (["same token", "KL (nats)"] if len(rows) > 1 else []):
        table.add_column(name, justify="right")
    other = result.get("against", {})
    for row in rows:
        cells = [f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{100 * row['accuracy']:.2f} %"]
        if row is result and other:
            cells += [f"{100 * other['top1']:.2f} %", f"{other['kl']:.4f}"]
        table.add_row(row["model"], *cells)
    return table
