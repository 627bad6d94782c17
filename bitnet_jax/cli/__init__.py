"""The command ``bitnet-jax``."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console

from ..errors import BitnetError
from ..output import write_json
from .bench import Bench
from .checks import Doctor, Inspect, Sandbox
from .export import Export
from .jobs import Compress, Demo
from .phase5 import Continue
from .use import Eval, Generate

_COMMANDS = {
    "demo": Demo,
    "compress": Compress,
    "continue": Continue,
    "eval": Eval,
    "generate": Generate,
    "export": Export,
    "inspect": Inspect,
    "doctor": Doctor,
    "bench": Bench,
    "sandbox": Sandbox,
}


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
        _COMMANDS,
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
    if result.get("failed"):
        _complain(result["failed"])
        return 1
    return 0


def _complain(message: str) -> None:
    print(f"bitnet-jax: {message}", file=sys.stderr)
