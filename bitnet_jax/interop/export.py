"""What every export says when it is done."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, where, and what the user should know about it.

    Attributes:
      target: ``"hf"``, ``"gguf"`` or ``"onnx"``.
      path: the file or folder.
      bytes: its size on disk.
      form: one line on the form that was chosen.
      notes: why it is larger than it could be, and what differs from our own model.
    """

    target: str
    path: Path
    bytes: int
    form: str
    notes: tuple[str, ...] = ()
