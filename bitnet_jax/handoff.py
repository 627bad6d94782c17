"""What Phase 4 hands to Phase 5: one folder with the ternary model in every form that trains on.

| in the folder         | what it is                                                               |
|-----------------------|--------------------------------------------------------------------------|
| ``packed/``           | the packed model, a model folder of ours                                 |
| ``float16/``          | the same values, codes * scale, as a plain float16 tree (Orbax)          |
| ``model.safetensors`` | the same for PyTorch, with ``model.json``: the reference's loader        |
| ``latent/``           | the latent weights, if asked for: training goes on where it stopped      |
| ``tokenizer.json``    | and the other tokenizer files that lay beside the source                 |
| ``phase5.json``       | which network, formats, scores, sizes, checksums; how to train on        |
"""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checkpoint
from .calibrate import latent_start
from .convert import dequantise, path_name, unpack
from .errors import BitnetError
from .host import all_finite
from .interop.phase3_pair import save_pair
from .leaf import Packed, is_quantized
from .models.folder import TOKENIZER, ModelFolder, PythonModule, load_model, save_model
from .models.phase3 import Phase3Config
from .optim.presets import PRESETS
from .output import write_json
from .policy import Policy

Tree = Any

MANIFEST = "phase5.json"
_VERSION = 1
# Tokenizer files of the usual libraries, carried through untouched.
_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "tokenizer.model",
)  # fmt: skip


def write(
    folder: Path,
    packed: ModelFolder,
    policy: Policy,
    *,
    latent: Tree = None,
    description: dict | None = None,
    beside: Path | None = None,
    scores: dict | None = None,
) -> dict:
    """Write the hand-off folder.

    Args:
      folder: a new folder.
      packed: the packed model, its scales as `bitnet_jax.half.exact_in_half` leaves them.
      policy: what its leaves were made by.
      latent: the latent weights, to be handed on too.
      description: the JSON that came with the Phase 3 model.
      beside: where the source lay, with its tokenizer's files.
      scores: to be told to the next phase.

    Returns:
      What is in ``phase5.json``.

    Raises:
      BitnetError: if a value of the float16 tree is not codes * scale exactly, or files cannot be
        written.
    """
    values = dequantise(packed.params)
    half = jax.tree_util.tree_map_with_path(_half, values)
    for path, x in jax.tree_util.tree_leaves_with_path(packed.params, is_leaf=is_quantized):
        if is_quantized(x) and not _equal(_at(values, path), _at(half, path)):
            raise BitnetError(f"{path_name(path)}: codes * scale is no float16; see exact_in_half")
    try:
        folder.mkdir(parents=True)
        save_model(folder / "packed", packed)
        checkpoint.save(folder / "float16", half)
        if latent is not None:
            checkpoint.save(folder / "latent", latent)
        (folder / TOKENIZER).write_text(packed.tokenizer.to_str())
        for name in _TOKENIZER_FILES:
            if beside is not None and (beside / name).is_file():
                shutil.copyfile(beside / name, folder / name)
    except OSError as e:
        raise BitnetError(f"{folder}: cannot be written ({e.strerror or e})") from e
    told = _manifest(packed, policy, latent is not None, scores or {})
    if isinstance(packed.config, Phase3Config):
        metadata = {"phase": 4, "made_by": "bitnet-jax", "formats": told["formats"]}
        save_pair(folder / "model", half, packed.config, description or {}, metadata)
        told["torch"] = "model.safetensors"
    told["files"] = {f: _sum(folder / f) for f in checkpoint.files_in(folder)}
    write_json(folder / MANIFEST, told)
    return told


def _manifest(packed: ModelFolder, policy: Policy, latent: bool, scores: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(packed.params, is_leaf=is_quantized)
    kinds = [type(x).__name__ if isinstance(x, Packed) else str(x.dtype) for _, x in leaves]
    return {
        "version": _VERSION,
        "network": type(packed.config).__name__,
        "config": dataclasses.asdict(packed.config),
        "scheme": dataclasses.asdict(packed.scheme) if packed.scheme else None,
        "policy": {"rules": list(policy.rules), "inputs": list(policy.inputs)},
        "formats": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "packed": "packed",
        "float16": "float16",
        "latent": "latent" if latent else None,
        "optimizer": {"preset": 5, **PRESETS[5]},
        "train_on": (
            "bitnet-jax continue DIR --data TEXT --out NEW. The float16 values are codes times "
            "scale exactly; quantising them again by absmean or threshold keeps the codes but "
            "shrinks the scale by the share of codes that are not 0, so carry the scale, or "
            "divide the values by that share first"
        ),
        "scores": scores,
    }


def load(folder: Path) -> tuple[ModelFolder, Tree, Policy]:
    """A hand-off folder, to train on from it.

    Args:
      folder: what `write` made.

    Returns:
      The packed model; latent weights that quantise to its codes (those that were handed on, or
      made from its values); the policy.

    Raises:
      BitnetError: if it is no such folder, or a file of it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise BitnetError(f"{folder}: no {MANIFEST} in it; give the folder that compress handed on")
    try:
        told = json.loads(file.read_text())
        version, files, rules = told["version"], told["files"], told["policy"]
        policy = Policy(*(tuple(tuple(x) for x in rules[k]) for k in ("rules", "inputs")))
    except (ValueError, KeyError, TypeError) as e:
        raise BitnetError(f"{file}: damaged; restore it from a copy") from e
    if version != _VERSION:
        raise BitnetError(f"{file}: version {version}, this bitnet-jax reads {_VERSION}; upgrade")
    for name, sums in files.items():
        if not (folder / name).is_file() or _sum(folder / name) != sums:
            raise BitnetError(f"{folder / name}: missing or damaged; restore it from a copy")
    packed = load_model(folder / "packed")
    if packed.scheme is None or isinstance(packed.config, PythonModule):
        raise BitnetError(f"{folder}/packed: is not ternary")
    if told.get("latent"):
        return packed, checkpoint.load(folder / told["latent"]).tree, policy
    tree = unpack(packed.params)
    return packed, latent_start(dequantise(tree), tree, packed.scheme, keep=0.0), policy


def _half(path: tuple, x: jax.Array) -> jax.Array:
    """Float weights in float16, where it can hold them; a memory and all else as it is."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if not floating or path_name(path).startswith("buffers/"):
        return x
    half = x.astype(jnp.float16)
    return half if all_finite(half) else x


def _at(tree: Tree, path: tuple) -> jax.Array:
    for key in path:
        tree = tree[key.key]
    return tree


def _equal(a: jax.Array, b: jax.Array) -> bool:
    return bool(np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)))


def _sum(file: Path) -> dict:
    data = file.read_bytes()
    return {"bytes": len(data), "crc32": zlib.crc32(data)}
