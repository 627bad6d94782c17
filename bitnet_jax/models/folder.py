"""A model folder: weights, which network they belong to, its scheme, its tokenizer."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import tokenizers

from .. import checkpoint
from ..calibrate import Stage
from ..errors import BitnetError
from ..quantize import Scheme
from . import phase3
from .decoder import DecoderConfig, stages
from .phase3 import Phase3Config

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class PythonModule:
    """A network defined in a Python file of the user's.

    ``file.py:Name``, where ``Name(scheme=...)`` gives a Linen module from tokens (batch, length) to
    logits (batch, length, vocab): float for ``scheme=None``, ternary for a `Scheme`. A Linen class
    with a field ``scheme`` is that already.

    Attributes:
      source: ``path/to/file.py:Name``. The file is run when the network is built.
    """

    source: str

    def build(self, scheme: Scheme | None) -> nn.Module:
        """The network, float for None.

        Raises:
          BitnetError: if the file or the name is not there, or fails.
        """
        file, _, name = self.source.rpartition(":")
        if not file or not name.isidentifier():
            raise BitnetError(f"--module {self.source}: expected FILE.py:NAME, as in net.py:Net")
        if not Path(file).is_file():
            raise BitnetError(f"--module {self.source}: there is no file {file}")
        try:
            make = getattr(_import(Path(file).resolve()), name)
        except AttributeError:
            raise BitnetError(f"--module {self.source}: {file} defines no {name}") from None
        except Exception as e:
            raise BitnetError(f"--module {self.source}: {file} fails: {_line(e)}") from e
        try:
            module = make(scheme=scheme)
        except Exception as e:
            raise BitnetError(
                f"--module {self.source}: {name}(scheme=...) fails: {_line(e)}; it must take the "
                "scheme of its ternary layers, or None for the float network"
            ) from e
        if not isinstance(module, nn.Module):
            raise BitnetError(
                f"--module {self.source}: {name}(scheme=...) gave {type(module).__name__}, "
                "not a flax.linen.Module"
            )
        return module


def _line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:200]}" if text else type(e).__name__


def _import(path: Path) -> Any:
    """Run a Python file as a module, once: its classes must be the same every time."""
    name = f"_bitnet_user_{abs(hash(str(path)))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A language model with all it needs to read and write text.

    Attributes:
      config: the network: shape of a `Decoder` or of a Phase 3 network, or a `PythonModule`.
      scheme: of its ternary layers; None for a float model.
      params: its variables: float, latent or packed.
      tokenizer: text to tokens and back.
      files: small files that go with the model wherever it goes, by name: what Hugging Face keeps
        beside ``tokenizer.json``, say.
    """

    config: DecoderConfig | Phase3Config | PythonModule
    scheme: Scheme | None
    params: Any
    tokenizer: tokenizers.Tokenizer
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The module that applies ``params``."""
        return self.config.build(self.scheme)

    def stages(self, scheme: Scheme | None) -> list[Stage]:
        """The network with ternary layers of this scheme, in parts, for `bitnet_jax.calibrate`."""
        if isinstance(self.config, DecoderConfig):
            return stages(self.config, scheme)
        if isinstance(self.config, Phase3Config):
            return phase3.stages(self.config, scheme)
        return [Stage((), self.config.build(scheme).apply)]


def save_model(path: str | os.PathLike, folder: ModelFolder, overwrite: bool = False) -> None:
    """Write a model folder, all or nothing; over an existing one only if told so.

    Raises:
      BitnetError: as `bitnet_jax.checkpoint.save`.
    """
    kinds = {"decoder": DecoderConfig, "phase3": Phase3Config, "module": PythonModule}
    metadata = {
        "model": next(name for name, kind in kinds.items() if isinstance(folder.config, kind)),
        "config": dataclasses.asdict(folder.config),
        "scheme": None if folder.scheme is None else dataclasses.asdict(folder.scheme),
    }
    files = {**folder.files, TOKENIZER: folder.tokenizer.to_str().encode()}
    checkpoint.save(path, folder.params, metadata, files, overwrite)


def load_model(path: str | os.PathLike, module: PythonModule | None = None) -> ModelFolder:
    """Read a model folder back, every checksum verified.

    Args:
      path: the folder.
      module: the network, for a folder whose network is a Python file of the user's: a folder by
        itself never makes code run.

    Raises:
      BitnetError: if the folder is damaged, holds no language model, or needs ``module``.
    """
    stored = checkpoint.load(path)
    kind, config = stored.metadata.get("model"), stored.metadata.get("config", {})
    if kind not in ("decoder", "phase3", "module") or TOKENIZER not in stored.files:
        raise BitnetError(f"{path}: holds no language model with its tokenizer")
    if kind == "module" and module is None:
        raise BitnetError(f"{path}: needs its network, --module {config['source']}")
    scheme = stored.metadata["scheme"]
    known = Phase3Config if kind == "phase3" else DecoderConfig
    return ModelFolder(
        known(**config) if module is None else module,
        None if scheme is None else Scheme(**scheme),
        stored.tree,
        tokenizers.Tokenizer.from_str(stored.files[TOKENIZER].decode()),
        {name: data for name, data in stored.files.items() if name != TOKENIZER},
    )
