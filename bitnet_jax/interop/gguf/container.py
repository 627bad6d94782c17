"""The container of a GGUF file: metadata and where each tensor lies, everything checked first.

The `gguf` package's own reader trusts the numbers in a file: a count of 2 ** 60 keeps it busy for
ever. Here nothing is read, and no memory taken, before it is known to lie inside the file.
"""

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BitnetError

# A tensor's type: name, weights in a block, bytes of a block. Those of ggml.h that hold weights;
# 42 is llama.cpp's of 2026 and not in the gguf package yet.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 42: ("Q2_0", 64, 18),
}  # fmt: skip
TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
# bitnet.cpp's own types, whose tensors stock readers cannot even measure.
_FORKS = {36: "I2_S", 38: "TL1", 40: "a type of a fork"}

_MAGIC, _VERSIONS, _ALIGNMENT, _MAX_AXES = b"GGUF", (2, 3), 32, 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?QqD", strict=True))
_SCALARS[12] = "d"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file.

    Attributes:
      name: as in the file.
      shape: row-major, as numpy has it: (out, in) for a matrix.
      kind: the type's name, ``"TQ2_0"`` say.
      start, nbytes: its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Container:
    """A GGUF file, its weights not yet read.

    Attributes:
      path: the file.
      fields: metadata: numbers, strings, numpy arrays of numbers, lists of strings.
      tensors: name to `Tensor`.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8 (rows, bytes of a row), mapped from the file, not copied."""
        t = self.tensors[name]
        rows = math.prod(t.shape[:-1])
        data = np.memmap(self.path, np.uint8, "r", t.start, (t.nbytes,)).view(np.ndarray)
        return data.reshape(rows, t.nbytes // rows)


class _Reader:
    """A position in a file's bytes that never leaves them."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def fail(self, why: str) -> BitnetError:
        return BitnetError(f"{self.path}: damaged at byte {self.at}: {why}; download it again")

    def need(self, count: int, what: str, size: int = 1) -> None:
        """That ``count`` things of ``size`` bytes or more can still follow."""
        if count * size > len(self.data) - self.at:
            raise self.fail(f"it promises {count} {what}, more than the file has room for")

    def bytes(self, count: int, what: str = "bytes") -> memoryview:
        self.need(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, format: str) -> Any:
        return struct.unpack(f"<{format}", self.bytes(struct.calcsize(f"<{format}")))[0]

    def string(self) -> str:
        try:
            return str(self.bytes(self.number("Q"), "bytes of text"), "utf-8")
        except UnicodeDecodeError:
            raise self.fail("text that is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"metadata of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self.need(count, "strings", 8)
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"an array of type {kind}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        self.need(count, "numbers", dtype.itemsize)
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)


def _mapped(path: Path) -> Any:
    return np.memmap(path, np.uint8, "r")


def open_gguf(path: str | os.PathLike) -> Container:
    """Read a GGUF file's metadata and table of tensors; the weights stay in the file.

    Args:
      path: the file.

    Raises:
      BitnetError: if it is missing, no GGUF, of another version or byte order, or if anything in
        it is out of place: counts, lengths, names twice, tensors outside the file or over another.
    """
    path = Path(path)
    if not path.is_file():
        raise BitnetError(f"{path}: no such file; give a .gguf")
    if path.stat().st_size < 24:
        raise BitnetError(f"{path}: not a GGUF file (too short)")
    reader = _Reader(path, memoryview(_mapped(path)))
    if bytes(reader.bytes(4)) != _MAGIC:
        raise BitnetError(f"{path}: not a GGUF file (it does not start with GGUF)")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise BitnetError(f"{path}: GGUF version {version}; expected little-endian version 2 or 3")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    reader.need(pairs, "entries of metadata", 13)
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string()
        if key in fields:
            raise reader.fail(f"metadata {key!r} twice")
        fields[key] = reader.value()
    reader.need(tensors, "tensors", 32)
    table = [_entry(reader) for _ in range(tensors)]
    return Container(path, fields, _placed(reader, table, fields))


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape, type and offset."""
    name, axes = reader.string(), reader.number("I")
    if not 1 <= axes <= _MAX_AXES:
        raise reader.fail(f"tensor {name!r} has {axes} axes")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _placed(reader: _Reader, table: list, fields: dict[str, Any]) -> dict[str, Tensor]:
    """The table of tensors with their place in the file, each in its own."""
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.fail(f"alignment {alignment!r} is no power of two")
    base = -(-reader.at // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, number, offset in table:
        if name in found:
            raise reader.fail(f"tensor {name!r} twice")
        if number not in TYPES:
            known = _FORKS.get(number, f"type {number}")
            raise BitnetError(
                f"{reader.path}: tensor {name!r} is {known}, which is not read here (bitnet.cpp's "
                "types are its own); take the model's Hugging Face folder instead"
            )
        kind, block, size = TYPES[number]
        nbytes = math.prod(shape) // block * size
        if not all(shape) or shape[-1] % block:
            raise reader.fail(f"tensor {name!r} of shape {shape} does not fit {kind}")
        if offset % alignment or base + offset + nbytes > len(reader.data):
            raise reader.fail(f"tensor {name!r} lies outside the file or between its places")
        found[name] = Tensor(name, shape, kind, base + offset, nbytes)
    ordered = sorted(found.values(), key=lambda t: t.start)
    for one, other in zip(ordered, ordered[1:]):
        if one.start + one.nbytes > other.start:
            raise reader.fail(f"tensors {one.name!r} and {other.name!r} overlap")
    return found
