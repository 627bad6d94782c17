"""``sandbox``, ``inspect``, ``doctor``: the seed's checks, a checkpoint's, this machine's."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Run the Phase 4 seed's six checks on the seed's own models, beside the seed's figures."""

    json: Json = None
    """Also write the checks and their figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import sandbox, sandbox_table

        result = sandbox.run()
        console.print(sandbox_table.table(result))
        passed = f"{result['passed']} of {result['total']} checks passed"
        console.print(passed)
        return result if result["passed"] == result["total"] else result | {"failed": passed}


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Say what is in a packed checkpoint, and verify every checksum in it.

    A Hugging Face folder or a .gguf file is read as we read it, of an .onnx file the tensors.
    """

    dir: tyro.conf.Positional[Path]
    """Folder of the checkpoint, or the file."""
    json: Json = None
    """Also write what was found to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import inspection

        result = inspection.inspect(self.dir)
        for part in inspection.render(result):
            console.print(part)
        return result


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say which ops multiply packed weights on this machine, why, and how fast they are."""

    json: Json = None
    """Also write what was found to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import doctor

        with console.status("compiling and timing, some seconds the first time", spinner="line"):
            result = doctor.examine()
        for part in doctor.render(result):
            console.print(part, highlight=False)
        return result
