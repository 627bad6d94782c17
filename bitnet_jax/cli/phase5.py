"""``continue``: Phase 5 trains on from what ``compress`` handed on."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..errors import BitnetError
from ..output import check_output, prepare_output
from .checks import Json


@dataclasses.dataclass(frozen=True)
class Continue:
    """Train a handed-over ternary model on, with the preset of Phase 5, and hand it on again."""

    folder: tyro.conf.Positional[Path]
    """The folder phase5 that compress wrote."""
    data: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Text: a file, a folder, or .jsonl with the key text. A tenth is held out to measure on."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder; the trained model is in DIR/phase5."""
    epochs: int = 1
    """Passes over the text."""
    batch: int = 8
    """Windows of text a step."""
    length: int = 128
    """Tokens a window."""
    learning_rate: float | None = None
    """Peak; the preset's by default."""
    seed: int = 0
    """Fixes the order of the text."""
    json: Json = None
    """Also write the figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress, handoff, phase5

        for name in ("epochs", "batch", "length"):
            if getattr(self, name) < 1:
                raise BitnetError(f"--{name} {getattr(self, name)}: must be 1 or more")
        check_output(self.out)
        with console.status("reading model and text", spinner="line"):
            packed, _, _ = handoff.load(self.folder)
            text = compress.load_text(self.data, packed, self.length)
        prepare_output(self.out)
        settings = phase5.Settings(self.epochs, self.batch, self.learning_rate, self.seed)
        result = phase5.run(self.folder, text.train, text.held_out, self.out, settings, console)
        console.print(phase5.table(result))
        console.print(f"Handed on: {self.out / 'phase5'}    report: {self.out / 'report.json'}")
        return result
