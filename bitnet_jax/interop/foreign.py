"""Models of other libraries, recognised by looking at them."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Literal

import tokenizers
from rich.console import Console

from ..errors import BitnetError
from ..models.folder import ModelFolder
from . import hf

Kind = Literal["hf", "gguf", "onnx"]
NAMES: dict[Kind, str] = {"hf": "Hugging Face", "gguf": "GGUF", "onnx": "ONNX"}
GRAPH = "model.onnx"


def kind_of(path: Path) -> Kind | None:
    """What kind of model of another library this is; None if it is none, or one of ours.

    A folder with the config.json of a transformers model, a ``.gguf`` file, an ``.onnx`` file or
    the folder of a ``model.onnx``.
    """
    if path.is_dir():
        onnx = (path / GRAPH).is_file()
        return "hf" if hf.is_folder(path) else "onnx" if onnx else None
    for kind in ("gguf", "onnx"):
        if path.suffix.lower() == f".{kind}" and path.is_file():
            return kind
    return None


def format_module(kind: Kind) -> ModuleType:
    """``bitnet_jax.interop.hf``, ``.gguf`` or ``.onnx``, with what it needs installed.

    Raises:
      BitnetError: saying which extra to install.
    """
    try:
        return importlib.import_module(f".{kind}", __package__)
    except ImportError as e:
        raise BitnetError(
            f"{NAMES[kind]} needs a package that is not installed ({e.name or e}); "
            f"pip install 'bitnet-jax[{kind}]'"
        ) from e


def load(
    path: Path, tokenizer: tokenizers.Tokenizer | None = None, console: Console | None = None
) -> ModelFolder:
    """A model that `kind_of` knows, with another tokenizer if one is given.

    Raises:
      BitnetError: if it cannot be read, or is a graph, which only runs.
    """
    kind = kind_of(path)
    if kind == "hf":
        return hf.load(path, tokenizer=tokenizer, console=console)
    if kind != "gguf":
        raise BitnetError(f"{path}: ONNX holds a graph to run, no model that is read back")
    found: ModelFolder = format_module(kind).load(path)
    return found if tokenizer is None else ModelFolder(
        found.config, found.scheme, found.params, tokenizer, found.files
    )  # fmt: skip
