"""``export``: a model in the form another library runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ..errors import BitnetError
from .checks import Json

Target = Literal["hf", "gguf", "onnx"]


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model for transformers (hf), llama.cpp (gguf) or onnxruntime (onnx).

    MODEL is a model folder of ours, packed or not, or a model of another library: a Hugging Face
    folder, a .gguf file. Codes and scales go over exactly or not at all; what was written, and why
    it is larger than it could be, is said at the end.
    """

    model: tyro.conf.Positional[Path]
    """The model."""
    to: Target
    """Which form."""
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")]
    """New folder (hf, onnx) or file (gguf)."""
    latent: bool = False
    """For hf: latent weights, quantised at every call, to train on there."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """For hf: of what is not packed, and of the computation; by default the smallest exact one."""
    form: Literal["2bit", "4bit", "int8", "qdq"] | None = None
    """For onnx: how a ternary matrix is stored; 2bit by default, qdq for TensorRT."""
    cache: bool = False
    """For onnx: keys and values go in and out, to generate from, as onnxruntime-genai does."""
    scale_tensors: bool = False
    """For gguf: scales of whole matrices as tensors of their own, exact, for llama.cpp of 2026."""
    module: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")] = None
    """The network the weights are for, as for compress."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json, or bytes; by default the one beside the weights."""
    json: Json = None
    """Also write what was said to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress

        for name, target in _ONLY_FOR.items():
            if getattr(self, name) and self.to != target:
                raise BitnetError(f"--{name.replace('_', '-')} is for --to {target}")
        if self.out.exists():
            raise BitnetError(f"{self.out}: exists already; give another --out or remove it")
        with console.status("reading", spinner="line"):
            source = compress.load_source(self.model, self.module, self.tokenizer)
        report = TARGETS[self.to](source, self, console)
        console.print(f"{report.path}: {report.form}, {report.bytes:,} bytes", highlight=False)
        for note in report.notes:
            console.print(f"  {note}", highlight=False)
        return dataclasses.asdict(report) | {"path": str(report.path)}


def _hf(source, command: Export, console: Console):
    from ..interop import hf

    return hf.save(source, command.out, latent=command.latent, dtype=command.dtype, console=console)


def _gguf(source, command: Export, console: Console):
    from ..interop.foreign import format_module

    gguf, exact = format_module("gguf"), command.scale_tensors
    return gguf.save(source, command.out, scale_tensors=exact, console=console)


def _onnx(source, command: Export, console: Console):
    from ..interop.foreign import format_module

    options = {} if command.form is None else {"form": command.form}
    save = format_module("onnx").save
    return save(source, command.out, cache=command.cache, console=console, **options)


TARGETS: dict[Target, Callable] = {"hf": _hf, "gguf": _gguf, "onnx": _onnx}
_ONLY_FOR = {
    "latent": "hf",
    "dtype": "hf",
    "form": "onnx",
    "cache": "onnx",
    "scale_tensors": "gguf",
}
