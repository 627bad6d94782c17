"""What is in a packed checkpoint: every leaf, its bytes, its codes; every checksum verified."""

import dataclasses
import math
from pathlib import Path

import jax
from rich.console import RenderableType

from . import checkpoint
from .convert import code_counts, format_name, path_name
from .errors import BitnetError
from .interop import foreign
from .interop.foreign import NAMES
from .leaf import Packed, is_quantized
from .report import leaf_table


def inspect(path: Path) -> dict:
    """Load a checkpoint, verifying every checksum, and describe it as plain data.

    Args:
      path: the checkpoint's folder; or a Hugging Face folder or a .gguf file, described as it is
        read here; or an .onnx file or its folder, of which the stored tensors are listed.

    Returns:
      ``version`` (of another library's form its name), ``metadata`` (what was saved with it),
      ``files_verified`` and ``leaves_verified`` (how many checksums held), ``bytes_on_disk``,
      ``parameters``, ``bits_per_parameter`` (on disk), ``float32_bytes`` (4 a parameter), and
      ``leaves``: path, shape, format, bytes, and for ternary ones zeros, minus, plus and how many
      weights share a scale. Of ONNX no figures of parameters: it stores bytes of codes.

    Raises:
      BitnetError: naming the first file or leaf that is missing or damaged.
    """
    kind = foreign.kind_of(path)
    if kind == "onnx":
        graph = path / foreign.GRAPH if path.is_dir() else path
        about = _described(path, NAMES[kind], {}, _onnx_rows(graph))
        # Bytes of packed codes are no parameters.
        return {k: v for k, v in about.items() if k not in _OF_PARAMETERS}
    if kind is not None:
        model = foreign.load(path)
        metadata = {"config": dataclasses.asdict(model.config), "files": sorted(model.files)}
        return _described(path, NAMES[kind], metadata, _rows(model.params))
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.load(path)
    verified = {
        "files_verified": len(manifest["files"]),
        "leaves_verified": len(manifest["crc32"]),
    }
    described = _described(path, manifest["version"], stored.metadata, _rows(stored.tree))
    return described | verified


_OF_PARAMETERS = ("parameters", "bits_per_parameter", "float32_bytes")


def _rows(tree) -> list[dict]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return [_leaf(path_name(p), x) for p, x in leaves]


def _onnx_rows(path: Path) -> list[dict]:
    """The tensors an ONNX file stores, by name, with their bytes there."""
    foreign.format_module("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError) as e:
        raise BitnetError(f"{path}: not ONNX, or damaged ({type(e).__name__})") from e
    return [
        {
            "path": x.name,
            "shape": list(x.dims),
            "bytes": x.ByteSize(),
            "format": onnx.TensorProto.DataType.Name(x.data_type).lower(),
            "minus": 0,
            "zeros": 0,
            "plus": 0,
        }
        for x in graph.initializer
        if math.prod(x.dims) > 8  # not the constants of shapes and axes
    ]


def _described(path: Path, version, metadata: dict, rows: list[dict]) -> dict:
    parameters = sum(math.prod(x["shape"]) for x in rows)
    size = checkpoint.size_on_disk(path)
    return {
        "version": version,
        "metadata": metadata,
        "files_verified": 0,
        "leaves_verified": 0,
        "bytes_on_disk": size,
        "parameters": parameters,
        "bits_per_parameter": 8 * size / max(parameters, 1),
        "float32_bytes": 4 * parameters,
        "leaves": rows,
    }


def _leaf(path: str, x) -> dict:
    row = {"path": path, "shape": list(x.shape), "bytes": x.nbytes}
    if not is_quantized(x):
        return row | {"format": str(x.dtype), "minus": 0, "zeros": 0, "plus": 0}
    minus, zeros, plus = code_counts(x)
    stored = format_name(x) if isinstance(x, Packed) else f"{format_name(x)}, unpacked"
    counts = {"minus": minus, "zeros": zeros, "plus": plus}
    per_scale = math.prod(x.shape) // max(x.scale.size, 1)
    return row | {"format": stored} | counts | {"weights_per_scale": per_scale}


def _size(result: dict) -> str:
    size = result["bytes_on_disk"]
    if "parameters" not in result:
        return f"{len(result['leaves'])} tensors, {size:,} bytes on disk"
    return (
        f"{result['parameters']:,} parameters in {size:,} bytes on disk, "
        f"{result['bits_per_parameter']:.2f} bits each, "
        f"{result['float32_bytes'] / size:.2f}x smaller than float32"
    )


def render(result: dict) -> list[RenderableType]:
    """Tables and lines for a person, from what `inspect` returned."""
    about = [f"{k}: {v}" for k, v in result["metadata"].items()]
    return [
        *about,
        leaf_table(result["leaves"]),
        _size(result),
        f"All checksums hold: {result['files_verified']} files, "
        f"{result['leaves_verified']} arrays, format version {result['version']}"
        if result["files_verified"]
        else f"{result['version']} keeps no checksums; everything could be read",
    ]
