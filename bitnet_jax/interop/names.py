"""Names of PyTorch tensors: wrappers stripped, packed attention split, modules as paths."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..errors import BitnetError
from .tensors import Tensors

Keys = tuple[str, ...]

# What wrappers put in front of every name: DataParallel, PEFT and the like, torch.compile, HF.
_PREFIXES = ("module.", "base_model.", "_orig_mod.", "model.")
ATTENTION = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor, or a third of one, with the name in the file it comes from."""

    origin: str
    array: np.ndarray


def rename_all(
    tensors: Tensors, rename: Sequence[tuple[str, str]], own: Collection[str] = ()
) -> dict[str, str]:
    """Name in the file to name without wrappers' prefixes, renamed as the caller asked.

    ``own`` are names of the network's own parts, which are no wrappers: a ``model`` inside it, say.
    """
    names = {n: n.replace("_orig_mod.", "") for n in (*tensors.arrays, *tensors.tied)}
    shared = lambda prefix: all(v.startswith(prefix) for v in names.values())
    prefixes = [p for p in _PREFIXES if p.removesuffix(".") not in own]
    while prefix := next(filter(shared, prefixes), ""):
        names = {k: v.removeprefix(prefix) for k, v in names.items()}
    for pattern, replacement in rename:
        try:
            names = {k: re.sub(pattern, replacement, v) for k, v in names.items()}
        except re.error as e:
            raise BitnetError(f"rename {pattern!r}: {e}") from None
    return names


def split_attention(source: str, tensors: Tensors, names: dict[str, str]) -> dict[str, Part]:
    """All tensors by their new names, MultiheadAttention's packed ones split into three."""
    parts: dict[str, Part] = {}
    attention = {m[1] for n in names.values() if (m := re.match(r"(.*?)(in|q)_proj_weight$", n))}
    for origin, name in names.items():
        x = tensors.arrays[tensors.tied.get(origin, origin)]
        for new, piece in _pieces(name, x, attention):
            if new in parts:
                raise BitnetError(f"{source}: {parts[new].origin} and {origin} both become {new}")
            parts[new] = Part(origin, piece)
    return parts


def _pieces(name: str, x: np.ndarray, attention: set[str]) -> list[tuple[str, np.ndarray]]:
    if m := re.match(r"(.*?)in_proj_(weight|bias)$", name):
        thirds = np.split(x, 3) if len(x) % 3 == 0 else [x]
        return [(f"{m[1]}{p}.{m[2]}", third) for p, third in zip(ATTENTION, thirds)]
    if m := re.match(r"(.*?)([qkv])_proj_weight$", name):
        return [(f"{m[1]}{ATTENTION['qkv'.index(m[2])]}.weight", x)]
    if (m := re.match(r"(.*?)out_proj\.(weight|bias)$", name)) and m[1] in attention:
        return [(f"{m[1]}out.{m[2]}", x)]
    return [(name, x)]


def permute_flattened(
    source: str, parts: dict[str, Part], flatten: Mapping[str, tuple[int, ...]]
) -> dict[str, Part]:
    """Inputs of the Linears these patterns name, from channels first to channels last."""
    parts = dict(parts)
    for pattern, shape in flatten.items():
        found = [n for n in parts if re.search(pattern, n) and n.endswith("weight")]
        for name in found:
            x = parts[name].array
            if x.ndim != 2 or x.shape[1] != math.prod(shape):
                raise BitnetError(
                    f"{source}: {name} of shape {x.shape} does not read a picture of {shape}"
                )
            last = np.moveaxis(x.reshape(-1, *shape), 1, -1)
            parts[name] = Part(parts[name].origin, last.reshape(x.shape))
        if not found:
            raise BitnetError(f"{source}: flatten {pattern!r} matches no weight")
    return parts


def path_of(module: str) -> Keys:
    """A torch module's name as a path; numbers join the name before, as Linen names layers.

    >>> path_of("layers.0.linear"), path_of("0")
    (('layers_0', 'linear'), ('0',))
    """
    return tuple(re.sub(r"(?<=[^.])\.(\d+)(?=\.|$)", r"_\1", module).split(".")) if module else ()
