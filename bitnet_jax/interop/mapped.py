"""Safetensors opened but not read: each tensor comes from disk when it is asked for."""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ..errors import BitnetError

# The safetensors library's own bound on a header.
_LARGEST_HEADER = 100_000_000
# No config and no index of a model is nearly as large.
_LARGEST_JSON = 50_000_000
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, offset in bytes, shape and numpy dtype (None: not ours)."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Mapped:
    """The tensors of a folder by name; none of their bytes is read before `Mapped.read`.

    Attributes:
      source: what to call them in messages.
      entries: name to where it lies.
    """

    source: Path
    entries: Mapping[str, Entry]

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the file's memory map: pages are read when touched.

        Raises:
          BitnetError: for a dtype numpy and ml_dtypes have not (8- and 4-bit floats).
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise BitnetError(f"{entry.file}: {name} is of a dtype that is not read here")
        if not entry.nbytes:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
        return raw.view(entry.dtype).reshape(entry.shape)


def open_folder(folder: Path) -> Mapped:
    """Open ``model.safetensors`` or the shards of ``model.safetensors.index.json``.

    Any one ``*.safetensors``, or any one index, will do. Headers are checked by the safetensors
    library (their size, that offsets lie in the file, do not overlap and leave no hole) and here
    (that no name stands twice, that shards lie in the folder and agree with the index).

    Raises:
      BitnetError: if there are none or several, or something is missing, damaged or hostile.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) > 1):
        names = ", ".join(f.name for f in (indices or files)[:4])
        raise BitnetError(f"{folder}: holds several sets of weights ({names}); keep one of them")
    if not indices and not files:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        told = "only weights of PyTorch's own format; convert them to" if others else "no"
        raise BitnetError(f"{folder}: holds {told} safetensors")
    if not indices:
        return Mapped(files[0], header(files[0]))
    entries: dict[str, Entry] = {}
    weight_map = read_index(indices[0])
    for name in sorted(set(weight_map.values())):
        shard = header(indices[0].parent / name)
        if twice := sorted(entries.keys() & shard.keys()):
            raise BitnetError(f"{indices[0]}: {twice[0]} is in two shards; it is inconsistent")
        entries |= shard
    if absent := sorted(weight_map.keys() - entries.keys()):
        raise BitnetError(f"{indices[0]}: {absent[0]} is in no shard; the folder is incomplete")
    return Mapped(indices[0], entries)


def read_index(index: Path) -> dict[str, str]:
    """Tensor name to shard name; every shard is a file beside the index.

    Raises:
      BitnetError: if it is no index, a shard is missing, or its name leads elsewhere.
    """
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise BitnetError(f"{index}: not an index of shards (no weight_map)")
    for name in sorted({str(v) for v in weight_map.values()}):
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise BitnetError(f"{index}: shard {name!r} is not beside it; refused")
        if not (index.parent / name).is_file():
            raise BitnetError(f"{index}: its shard {name} is missing; copy it beside the index")
    return {name: str(shard) for name, shard in weight_map.items()}


def header(path: Path) -> dict[str, Entry]:
    """Where every tensor of a safetensors file lies.

    Raises:
      BitnetError: if the file is damaged or hostile.
    """
    try:
        # Checks sizes, offsets and overlaps against the length of the file.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST_HEADER:
                raise ValueError("header too large")
            text = file.read(size)
        found = json.loads(text, object_pairs_hook=_once)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as e:
        raise BitnetError(f"{path}: not safetensors, or damaged ({_line(e)})") from e
    found.pop("__metadata__", None)
    return {
        name: Entry(
            path,
            8 + size + x["data_offsets"][0],
            tuple(x["shape"]),
            _DTYPES.get(x["dtype"]),
        )
        for name, x in found.items()
    }


def read_json(path: Path) -> Any:
    """A small JSON file in which no key stands twice.

    Raises:
      BitnetError: if it is missing, too large or no JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON // 10**6} MB")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise BitnetError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BitnetError(f"{path}: not JSON, or damaged ({_line(e)})") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1]:
        raise ValueError(f"{twice[0][:80]!r} stands twice")
    return dict(pairs)


def _line(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return lines[0][:160] if lines else type(e).__name__
