"""``bench``: this machine's figures."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..errors import BitnetError
from .checks import Json


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time our products and training step beside XLA's and PyTorch's, and the machine's limits.

    Some minutes; --quick is shorter. Peers: XLA in float32 and bfloat16; PyTorch's linear layer and
    a straightforward BitLinear, where torch is installed.
    """

    quick: bool = False
    """A look: fewer turns, and no PyTorch in the training step."""
    threads: int | None = None
    """Keep to so many cores (Linux); by default all of them."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Also draw the figures."""
    json: Json = None
    """Also write the figures to this file."""

    def __call__(self, console: Console) -> dict:
        if self.plot is not None and not Path(os.path.abspath(self.plot)).parent.is_dir():
            raise BitnetError(f"--plot {self.plot}: its folder must exist")
        if self.threads is not None:
            _keep_to(self.threads)
        from ..bench import run, show

        result = run.run(console, self.quick)
        for part in show.render(result):
            console.print(part, highlight=False)
        if self.plot is not None:
            show.plot(result, self.plot)
            console.print(f"Plot: {self.plot}")
        return result


def _keep_to(threads: int) -> None:
    """Fewer cores, for XLA and torch too: they count them when they start, which is later."""
    if not hasattr(os, "sched_setaffinity"):
        raise BitnetError("--threads: this system cannot keep a process to some cores")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise BitnetError(f"--threads {threads}: give 1 to {len(cores)}")
    os.sched_setaffinity(0, cores[-threads:])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
