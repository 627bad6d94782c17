"""Output folders and files of the commands."""

import json
from pathlib import Path

from .errors import BitnetError

# Where a job keeps the state of its trainings until it is finished.
RESUME = "resume"


def check_output(path: Path, resume: bool = False) -> None:
    """Say now what would stop a job after hours of work.

    Raises:
      BitnetError: if an output folder exists already, or there is no job in it to resume.
    """
    if resume and not (path / RESUME).is_dir():
        raise BitnetError(f"{path}: holds no job that was interrupted; leave out --resume")
    if not resume and path.exists():
        hint = ", or --resume the job in it" if (path / RESUME).is_dir() else " or remove it"
        raise BitnetError(f"{path}: exists already; give another folder with --out{hint}")


def prepare_output(path: Path, resume: bool = False) -> Path:
    """Make a new output folder, or take that of an interrupted job.

    Raises:
      BitnetError: if it exists, or not, as `check_output` says, or cannot be made.
    """
    check_output(path, resume)
    try:
        path.mkdir(parents=True, exist_ok=resume)
    except OSError as e:
        raise BitnetError(f"{path}: cannot be made ({e.strerror}); give another --out") from e
    return path


def write_json(path: Path, data: dict) -> None:
    """Write plain data as JSON.

    Raises:
      BitnetError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(data, indent=2) + "\n")
    except OSError as e:
        raise BitnetError(f"{path}: cannot be written ({e.strerror})") from e
