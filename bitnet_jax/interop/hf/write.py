"""A model folder of ours to a folder that transformers loads and runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
from rich.console import Console
from safetensors.numpy import save_file

from ...checkpoint import size_on_disk
from ...errors import BitnetError
from ...models.decoder import DecoderConfig
from ...models.folder import ModelFolder
from ...progress import counter
from ..export import ExportReport
from .config import CONFIG, render
from .text import special_ids, write_tokenizer
from .weights import Weights

_SHARD_BYTES = 2 * 2**30


def save(
    model: ModelFolder,
    out: str | Path,
    *,
    latent: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    console: Console | None = None,
) -> ExportReport:
    """Write a folder that stock transformers loads and runs, all or nothing.

    | of the model                          | is written as                                     |
    |---------------------------------------|---------------------------------------------------|
    | float (``scheme`` None)               | float                                             |
    | ternary, one scale a matrix           | ``autobitlinear``: 2 bits a code, and the scale   |
    | ternary, finer scales; int8, int4     | ``autobitlinear``, unpacked: codes times scale    |
    | latent weights                        | quantised by the model's scheme, then as above    |
    | any ternary one, with ``latent``      | ``autobitlinear`` online, trained on there        |

    All forms round activations to int8 as we do. Matrices are never quantised twice: where latent
    weights are codes times scale already, codes and scale are read out of them, because absmean
    would shrink the scale by the share of zeros.

    Args:
      model: a decoder of ours, float, latent or packed.
      out: a new folder.
      latent: write latent weights. Those of a packed model are made of its codes, density d of
        which are not 0: w = codes * scale / d, whose absmean is the scale and whose codes are the
        codes.
      dtype: of everything that is not packed; transformers computes in what it finds. None takes
        bfloat16 if it holds every value exactly, else float32.
      shard_bytes: start another file after so many bytes.
      console: where to draw a progress bar; None for silence.

    Returns:
      What was written, and why it is larger than it could be.

    Raises:
      BitnetError: if the network is no decoder or has no class in transformers, ``latent`` is asked
        of a scheme that is not transformers' own, or the folder exists or cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        raise BitnetError(f"{out}: exists already; give another folder with --out or remove it")
    if not isinstance(model.config, DecoderConfig):
        raise BitnetError("only a decoder of ours has a place in transformers, not this network")
    weights = Weights(model, latent, dtype)
    ids = special_ids(model.files, model.tokenizer)
    room = out.with_name(f".{out.name}.saving-{os.getpid()}")
    try:
        room.mkdir(parents=True)
        write_shards(room, weights, shard_bytes, console)
        config = render(model.config, weights.form, ids) | {"dtype": weights.dtype}
        (room / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for file in room.glob("*.safetensors"):  # which safetensors lets nobody else read
            shutil.copymode(room / CONFIG, file)
        write_tokenizer(room, model.tokenizer, model.files, model.config.max_length)
        room.rename(out)
    except (OSError, safetensors.SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise BitnetError(f"{out}: cannot be written ({reason})") from e
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return ExportReport("hf", out, size_on_disk(out), *weights.told())


def write_shards(room: Path, weights: Weights, limit: int, console: Console | None) -> None:
    """Tensor after tensor into files of at most ``limit`` bytes, unless one alone is larger."""
    files: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush():
        save_file(held, room / f"part-{len(files)}", {"format": "pt"})
        files.append({name: x.nbytes for name, x in held.items()})
        held.clear()

    with counter(console, "write", len(weights.slots)) as done:
        for slot in weights.slots:
            for name, x in weights.stored(slot).items():
                if held and sum(y.nbytes for y in held.values()) + x.nbytes > limit:
                    flush()
                held[name] = np.ascontiguousarray(x)
            done()
        flush()
    if len(files) == 1:
        (room / "part-0").rename(room / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (room / f"part-{i}").rename(room / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(names.values()) for names in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (room / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
