"""Files of ``torch.save``, read by torch's own tensors-only unpickler and nothing else."""

import importlib
import re
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BitnetError

# Before 2.6 a crafted file could run code under weights_only=True (CVE-2025-32434).
_OLDEST = (2, 6)
_DAMAGED = "truncated, damaged or not a torch checkpoint; get the file again"


def load(path: Path) -> Any:
    """The object a ``torch.save`` file holds: tensors and plain containers, never code.

    Both containers are read, the zip one and the one before torch 1.6. torch is imported here and
    nowhere else, because only these files need it.

    Args:
      path: the file.

    Returns:
      What was saved, its tensors on the CPU.

    Raises:
      BitnetError: if torch is missing or too old, or the file is damaged or holds anything but
        tensors. Nothing in the file is executed.

    >>> load(Path("model.pt"))
    Traceback (most recent call last):
    bitnet_jax.errors.BitnetError: model.pt: no such file
    """
    if not path.is_file():
        raise BitnetError(f"{path}: no such file")
    torch = _torch(path)
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            # Deprecations inside torch, which the owner of a file can do nothing about.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as e:
        raise BitnetError(f"{path}: does not fit into memory") from e
    except Exception as e:  # torch raises whatever its parser stumbles over, KeyError included
        raise BitnetError(f"{path}: {_reason(str(e))}") from e


def _torch(path: Path) -> ModuleType:
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        raise BitnetError(
            f"{path}: needs torch to be read; `pip install torch`, or save it as .safetensors"
        ) from e
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _OLDEST:
        raise BitnetError(
            f"{path}: torch {torch.__version__} cannot read this safely; `pip install -U torch`"
        )
    return torch


def _check_zip(path: Path) -> None:
    """torch stores its entries uncompressed; a compressed one could unpack to any size."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as f:
            packed = [x.filename for x in f.infolist() if x.compress_type != zipfile.ZIP_STORED]
    except OSError:
        raise
    except Exception as e:  # as many kinds as there are ways to damage a zip
        raise BitnetError(
            f"{path}: truncated, damaged or not a torch checkpoint; get it again"
        ) from e
    if packed:
        raise BitnetError(f"{path}: a compressed zip, not a torch checkpoint; unzip it first")


def _reason(message: str) -> str:
    """What is wrong with the file, from the message torch gave."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found:
        return (
            f"refused, nothing was run: it holds {found[1]} and not only tensors; where you trust "
            "it, load it with torch and save model.state_dict()"
        )
    if "Unsupported" in message:  # an instruction no file of tensors has
        return "refused, nothing was run: a pickle of something else than tensors, or damaged"
    if "TorchScript" in message:
        return "a TorchScript program; load it with torch.jit.load and save its state_dict()"
    return _DAMAGED
