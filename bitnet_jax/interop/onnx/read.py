"""Codes and scales read back from an ONNX file of ours."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...errors import BitnetError
from ...leaf import Int4, Int8, Quantized, Sparse, Ternary
from .blocks import Blocks, unpack_blocks
from .graph import numpy_helper, onnx
from .write import FILE, KEY, VERSION

_KINDS = {kind.__name__: kind for kind in (Ternary, Sparse, Int8, Int4)}


def codes_of(path: str | os.PathLike) -> dict[str, Quantized]:
    """The quantised matrices of a file that `save` wrote, each verified by its checksum.

    Args:
      path: the folder, or its ``model.onnx``.

    Returns:
      Path in the parameter tree to leaf: codes and scale as they were exported, bit for bit.

    Raises:
      BitnetError: if the file is missing, damaged or not of ours.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    model = _load(path)
    about = {entry.key: entry.value for entry in model.metadata_props}.get(KEY)
    if about is None:
        raise BitnetError(f"{path}: not written by bitnet-jax, so its codes cannot be told")
    try:
        about = json.loads(about)
        version, leaves = about["version"], dict(about["leaves"])
    except (ValueError, TypeError, KeyError) as e:
        raise BitnetError(f"{path}: damaged, its description cannot be read") from e
    if version != VERSION:
        raise BitnetError(f"{path}: of format version {version}; this library reads {VERSION}")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {name: _leaf(path, name, record, tensors) for name, record in leaves.items()}


def _load(path: Path) -> Any:
    """The model with its external data, which may lie in this folder only."""
    try:
        model = onnx.load_model(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value != f"{path.name}.data":
                    raise BitnetError(
                        f"{path}: says its weights are in {entry.value!r}, not beside it"
                    )
        onnx.load_external_data_for_model(model, str(path.parent))
    except FileNotFoundError as e:
        raise BitnetError(f"{e.filename or path}: there is no such file") from e
    except BitnetError:
        raise
    except Exception as e:  # protobuf's own, onnx's own, ValueError
        raise BitnetError(f"{path}: damaged, or no ONNX file ({type(e).__name__})") from e
    return model


def _leaf(path: Path, name: str, record: dict, tensors: dict[str, Any]) -> Quantized:
    try:
        codes = numpy_helper.to_array(tensors[f"{name}/codes"])
        scale = numpy_helper.to_array(tensors[f"{name}/scale"])
        codes, scale = _arrays(record, codes, scale)
        kind, group, crc = _KINDS[record["kind"]], int(record["group"]), record["crc32"]
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise BitnetError(f"{path}: damaged, {name} cannot be read") from e
    if zlib.crc32(scale.tobytes(), zlib.crc32(codes.tobytes())) != crc:
        raise BitnetError(f"{path}: damaged, {name} is not what was written")
    return kind(jnp.asarray(codes), jnp.asarray(scale), group)


def _arrays(record: dict, codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (in, out) and scale float32 (groups, out or 1), as the leaf had them."""
    (size, out), (groups, width) = record["shape"], record["scale"]
    if not (0 < size * out <= 4 * codes.nbytes and 0 < groups <= size and 0 < width <= out):
        raise ValueError("more than the file holds")
    if record["blocks"]:
        blocks = Blocks(**record["blocks"])
        if record["group"]:
            first = np.arange(groups) * record["group"] // blocks.size
            scale = scale[:, first].T[:, :width]
        codes = unpack_blocks(codes, blocks)
    elif codes.dtype == np.uint8:
        codes = (codes.astype(np.int16) - 128).astype(np.int8)
    codes = codes.astype(np.int8).reshape(-1, out)[:size]
    return np.ascontiguousarray(codes), np.ascontiguousarray(scale.reshape(groups, width))
