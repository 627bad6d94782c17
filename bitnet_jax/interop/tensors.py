"""Weights on disk to named arrays: safetensors, sharded or not, and PyTorch's own files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ..errors import BitnetError
from .mapped import Mapped, header, read_index
from .unpickle import load

_TORCH = (".pt", ".pth", ".bin")
# Where training scripts keep the state dict inside what they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What a file holds.

    Attributes:
      arrays: name to array, each distinct tensor once.
      tied: name to the name in ``arrays`` that it shares its memory with.
      ignored: names of entries that are no tensors.
    """

    arrays: dict[str, np.ndarray]
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read(path: Path, mapped: bool = False) -> Tensors:
    """Read every tensor of a checkpoint; nothing in it is executed.

    | path                                        | read by                                        |
    |---------------------------------------------|------------------------------------------------|
    | ``*.safetensors``                           | safetensors                                    |
    | ``*.safetensors.index.json``, a folder      | safetensors, every shard                       |
    | ``*.pt``, ``*.pth``, ``*.bin``              | torch, tensors only; needs torch installed     |

    Args:
      path: a file or a folder.
      mapped: leave safetensors on disk: their arrays are read-only views of the file's memory map,
        and a page is read when it is touched. The file must stay as it is as long as they live.

    Raises:
      BitnetError: if the file is missing, damaged, holds no tensor, or holds code.
    """
    if path.is_dir():
        path = inside(path)
    if not path.is_file():
        raise BitnetError(f"{path}: no such file; give safetensors or PyTorch weights")
    if path.suffix == ".safetensors":
        found = _safetensors(path, mapped)
    elif path.name.endswith(".safetensors.index.json"):
        found = _shards(path, mapped)
    elif path.suffix in _TORCH:
        found = from_state_dict(_torch(path), str(path))
    else:
        raise BitnetError(
            f"{path}: not weights by its name; expected .safetensors, .pt, .pth, .bin or a folder"
        )
    if not found.arrays:
        raise BitnetError(f"{path}: holds no tensor")
    return found


def inside(folder: Path) -> Path:
    """The weights of a folder: an index, or its only weight file."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{s}" for s in _TORCH)):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(f.name for f in files[:4])
            raise BitnetError(f"{folder}: holds several weight files ({names}); name one of them")
    raise BitnetError(f"{folder}: holds no weights (.safetensors, .pt, .pth or .bin)")


def _safetensors(path: Path, mapped: bool) -> Tensors:
    entries = header(path)  # refuses what the library below takes: a name that stands twice
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            kinds = {n: file.get_slice(n).get_dtype() for n in names}
            if mapped:
                known = {n for n, entry in entries.items() if entry.dtype is not None}
                arrays = {n: np.asarray(Mapped(path, entries).read(n)) for n in known}
            else:
                known = {n for n, k in kinds.items() if not k.startswith(("BF", "F8", "F4"))}
                arrays = {n: file.get_tensor(n) for n in known}
        if len(known) < len(names):  # dtypes numpy has not by itself, JAX reads
            with safetensors.safe_open(path, framework="flax") as file:
                arrays |= {n: np.asarray(file.get_tensor(n)) for n in names if n not in known}
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise BitnetError(f"{path}: not safetensors, or damaged ({_line(e)})") from e
    # safetensors' save_model leaves out shared tensors and says so: dropped name to kept name.
    tied = {a: b for a, b in metadata.items() if b in arrays and a not in arrays}
    return Tensors({n: arrays[n] for n in names}, tied)


def _shards(index: Path, mapped: bool) -> Tensors:
    weight_map = read_index(index)
    arrays: dict[str, np.ndarray] = {}
    tied: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        shard = _safetensors(index.parent / name, mapped)
        if twice := sorted(arrays.keys() & shard.arrays.keys()):
            raise BitnetError(f"{index}: {twice[0]} is in two shards; the folder is inconsistent")
        arrays |= shard.arrays
        tied |= shard.tied
    if absent := sorted(weight_map.keys() - arrays.keys() - tied.keys()):
        raise BitnetError(f"{index}: {absent[0]} is in no shard; the folder is incomplete")
    return Tensors(arrays, tied)


def _torch(path: Path) -> Mapping:
    """The dict in a PyTorch file."""
    found = load(path)
    if not isinstance(found, Mapping):
        raise BitnetError(f"{path}: holds a {type(found).__name__}, not a state dict")
    return found


def from_state_dict(state: Mapping, source: str = "state dict") -> Tensors:
    """A state dict of arrays or torch tensors to named arrays.

    Args:
      state: name to tensor, perhaps inside ``state_dict``, ``model_state_dict``, ``model`` or
        ``module`` of a larger dict. torch tensors may be shared, strided, on any device.
      source: what to call it in messages.

    Raises:
      BitnetError: for a tensor that has no plain array form (sparse, quantised).

    >>> from_state_dict({"model": {"w": np.ones(2)}, "epoch": 3}).ignored
    ('epoch',)
    """
    ignored: tuple[str, ...] = ()
    while not any(_is_array(x) for x in state.values()):
        inner = [k for k in _WRAPPERS if isinstance(state.get(k), Mapping)]
        if not inner:
            break
        ignored += tuple(str(k) for k in state if k != inner[0])
        state = state[inner[0]]
    arrays: dict[str, np.ndarray] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for key, x in state.items():
        name = str(key)
        if not _is_array(x):
            ignored += (name,)
            continue
        place = _place(x)
        if place in seen:
            tied[name] = seen[place]
        else:
            arrays[name] = _array(name, x, source)
            seen[place] = name
    return Tensors(arrays, tied, ignored)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _place(x: Any) -> Any:
    """What two names of one tensor have in common: memory, offset, shape and strides."""
    if not hasattr(x, "untyped_storage") or not x.numel():
        return id(x) if not hasattr(x, "untyped_storage") else object()
    try:
        start = x.untyped_storage().data_ptr()
    except RuntimeError:
        return object()
    return (start, x.storage_offset(), tuple(x.shape), tuple(x.stride()), str(x.dtype))


def _array(name: str, x: Any, source: str) -> np.ndarray:
    if not hasattr(x, "detach"):
        return np.asarray(x)
    try:
        x = x.detach().cpu().contiguous()
        if str(x.dtype) == "torch.bfloat16":  # numpy has no such dtype, but the same bits fit
            import torch

            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as e:
        raise BitnetError(
            f"{source}: {name} is no plain tensor ({_line(e)}); save a dense float copy of it"
        ) from e


def _line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return lines[0][:160] if lines else type(e).__name__
