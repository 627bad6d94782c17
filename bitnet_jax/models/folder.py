"""A model folder: packed weights, the model's shape and scheme, its tokenizer."""

import dataclasses
import os
from typing import Any

import tokenizers

from .. import checkpoint
from ..errors import BitnetError
from ..quantize import Scheme
from .decoder import Decoder, DecoderConfig

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A decoder language model with all it needs to read and write text.

    Attributes:
      config: shape of the `Decoder`.
      scheme: of its ternary layers; None for a float model.
      params: its variables: float, latent or packed.
      tokenizer: text to tokens and back.
    """

    config: DecoderConfig
    scheme: Scheme | None
    params: Any
    tokenizer: tokenizers.Tokenizer

    @property
    def model(self) -> Decoder:
        """The module that applies ``params``."""
        return Decoder(self.config, self.scheme)


def save_model(path: str | os.PathLike, folder: ModelFolder) -> None:
    """Write a new model folder, all or nothing.

    Raises:
      BitnetError: as `bitnet_jax.checkpoint.save`.
    """
    metadata = {
        "model": "decoder",
        "config": dataclasses.asdict(folder.config),
        "scheme": None if folder.scheme is None else dataclasses.asdict(folder.scheme),
    }
    files = {TOKENIZER: folder.tokenizer.to_str().encode()}
    checkpoint.save(path, folder.params, metadata, files)


def load_model(path: str | os.PathLike) -> ModelFolder:
    """Read a model folder back, every checksum verified.

    Raises:
      BitnetError: if the folder is damaged or holds no decoder.
    """
    stored = checkpoint.load(path)
    if stored.metadata.get("model") != "decoder" or TOKENIZER not in stored.files:
        raise BitnetError(f"{path}: holds no decoder with its tokenizer")
    scheme = stored.metadata["scheme"]
    return ModelFolder(
        DecoderConfig(**stored.metadata["config"]),
        None if scheme is None else Scheme(**scheme),
        stored.tree,
        tokenizers.Tokenizer.from_str(stored.files[TOKENIZER].decode()),
    )
