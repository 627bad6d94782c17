"""The command ``bitnet-jax``."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from .errors import BitnetError

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small language model on this machine's Python source, then make it ternary.

    Measures the float model, converts it, fine-tunes it through the straight-through estimator,
    packs it, reloads it, verifies it and writes a report. No download; under five minutes on two
    CPU cores.
    """

    out: Path | None = None
    """New folder for the packed model and the report; by default bitnet-demo, or the first of
    bitnet-demo-2, -3, ... that is free."""
    epochs: int = 3
    """Epochs of fine-tuning."""
    json: Json = None
    """Also write the report's figures to this file."""

    def __call__(self, console: Console) -> dict:
        from . import demo, phase4, report

        if self.epochs < 1:
            raise BitnetError(f"--epochs {self.epochs}: fine-tuning needs at least 1")
        out = phase4.prepare_output(self.out or _free_folder("bitnet-demo"))
        job = phase4.Settings(epochs=self.epochs)
        result = demo.run(out, job=job, console=console)
        console.print()
        console.print(report.text(result, console.width), markup=False, highlight=False, end="")
        console.print(f"\nPacked model: {out / 'packed'}    report: {out / 'report.txt'} and .png")
        return result


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Run the Phase 4 seed's six checks on the seed's own models, beside the seed's figures."""

    json: Json = None
    """Also write the checks and their figures to this file."""

    def __call__(self, console: Console) -> dict:
        from . import sandbox, sandbox_table

        result = sandbox.run()
        console.print(sandbox_table.table(result))
        console.print(f"{result['passed']} of {result['total']} checks passed")
        return result


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Say what is in a packed checkpoint, and verify every checksum in it."""

    dir: tyro.conf.Positional[Path]
    """Folder of the checkpoint."""
    json: Json = None
    """Also write what was found to this file."""

    def __call__(self, console: Console) -> dict:
        from . import inspection

        result = inspection.inspect(self.dir)
        for part in inspection.render(result):
            console.print(part)
        return result


def _free_folder(name: str) -> Path:
    n = 1
    while (path := Path(name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return path


def _check_json(path: Path | None) -> None:
    """Fail before the work, not after it, if the JSON file cannot be written."""
    if path is None:
        return
    folder = Path(os.path.abspath(path)).parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BitnetError(f"--json {path}: not a file that can be written; its folder must exist")


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 for a mistake or a check that failed."""
    command: Callable[[Console], dict] = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "sandbox": Sandbox, "inspect": Inspect},
        prog="bitnet-jax",
        description="1.58-bit (ternary) networks in JAX: train, convert, pack and run them.",
        args=args,
    )
    console = Console()
    # jax and absl report how they found their devices; nobody asked.
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        _check_json(command.json)
        result = command(console)
        if command.json is not None:
            from .phase4 import write_json

            write_json(command.json, result)
    except BitnetError as e:
        _complain(str(e))
        return 1
    except OSError as e:
        _complain(f"{e.filename or 'a file'}: {e.strerror or e}; free disk space or check access")
        return 1
    except KeyboardInterrupt:
        _complain("stopped; whatever was saved so far is complete")
        return 130
    return 0 if result.get("passed", 0) == result.get("total", 0) else 1


def _complain(message: str) -> None:
    print(f"bitnet-jax: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
