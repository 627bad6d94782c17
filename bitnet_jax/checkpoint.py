"""Save and load trees, packed or not, with no template: versioned, checksummed, atomic.

A checkpoint is a folder: ``weights/`` (Orbax), ``manifest.json`` (ours) and any small files the
caller adds (a tokenizer). Orbax forgets static fields and loads flipped bits without a word; the
manifest holds the static fields and a checksum of every file and leaf. Files are checked before
Orbax opens them, because on a damaged one its background threads print tracebacks nobody can catch.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from orbax.checkpoint import v1 as ocp

from .convert import path_name
from .errors import BitnetError
from .leaf import PACKED, Packed, Quantized, is_quantized
from .nnx import variables

Tree = Any

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
# What the manifest calls each kind of leaf: "packed" is the ternary one.
_NAMES: dict[type, str] = {kind.unpacked: kind.unpacked.__name__.lower() for kind in PACKED}
_NAMES |= {kind: f"packed-{_NAMES[kind.unpacked]}".removesuffix("-ternary") for kind in PACKED}
_KINDS = {name: kind for kind, name in _NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load` returns.

    Attributes:
      tree: nested dicts of arrays and ternary leaves, as saved.
      metadata: the plain data given to `save`.
      files: the extra files, name to bytes.
    """

    tree: Tree
    metadata: dict
    files: dict[str, bytes]


def crc32(x: Any) -> int:
    """CRC-32 of an array's bytes, dtype and shape."""
    x = np.ascontiguousarray(x)
    head = f"{x.dtype.name}{x.shape}".encode()
    return zlib.crc32(x.reshape(-1).view(np.uint8).data if x.size else b"", zlib.crc32(head))


def size_on_disk(path: str | os.PathLike) -> int:
    """Bytes of every file in a folder, or of one file: what copying it would move."""
    path = Path(path)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


def _plain(node: Any) -> Any:
    """A quantised leaf as a dict of its arrays, which is how Orbax gives it back anyway."""
    if is_quantized(node):
        return {"codes": node.codes, "scale": node.scale}
    return node


def _statics(leaf: Quantized | Packed) -> dict:
    extra = {"in_features": leaf.in_features} if isinstance(leaf, Packed) else {}
    axes = {"in_shape": leaf.in_shape, "out_shape": leaf.out_shape}
    axes = {name: list(shape) for name, shape in axes.items() if shape}
    return {"kind": _NAMES[type(leaf)], "group": leaf.group, **extra, **axes}


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def save(
    path: str | os.PathLike,
    tree: Tree,
    metadata: dict | None = None,
    files: dict[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a tree of arrays and quantised leaves to a new folder, all or nothing.

    Everything is written to a hidden folder beside ``path`` and renamed when complete: a kill or
    a full disk leaves no half checkpoint, and an old one untouched.

    Args:
      path: the folder to make.
      tree: nested dicts of arrays and quantised leaves, Flax's boxes removed; or an NNX module or
        its `flax.nnx.State`, written as `bitnet_jax.nnx.variables` lays it out: as Linen's
        variables, so that there is one layout on disk.
      metadata: plain data kept with it, JSON-able.
      files: small extra files by name, kept beside the weights and checksummed like them.
      overwrite: replace an existing checkpoint (the old one goes only when the new is complete).

    Raises:
      BitnetError: if ``path`` exists and ``overwrite`` is false, or writing fails.
    """
    path, files, metadata = Path(os.path.abspath(path)), files or {}, metadata or {}
    _put_back(path)
    if path.exists() and not overwrite:
        raise BitnetError(f"{path}: exists already; give another folder or remove it first")
    if path.exists() and not (path / _MANIFEST).is_file():
        raise BitnetError(f"{path}: exists and is no checkpoint, so it is not overwritten")
    tree = variables(tree) if isinstance(tree, nnx.Module | nnx.State) else meta.unbox(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    # As JAX holds them: float64 from numpy becomes float32 here rather than unnoticed on load.
    plain = jax.tree.map(jnp.asarray, jax.tree.map(_plain, tree, is_leaf=is_quantized))
    flat = jax.tree_util.tree_leaves_with_path(plain)
    arrays = {path_name(p): np.asarray(x) for p, x in flat}
    _check_names(path, len(flat), arrays, files)
    ours = {
        "version": FORMAT_VERSION,
        "ternary": {path_name(p): _statics(x) for p, x in leaves if is_quantized(x)},
        "crc32": {name: crc32(x) for name, x in arrays.items()},
        "empty": {n: [x.dtype.name, list(x.shape)] for n, x in arrays.items() if not x.size},
        "extra": sorted(files),
        "metadata": metadata,
    }
    # Orbax refuses arrays without elements; the manifest remembers them.
    stored = jax.tree.map(lambda x: x if np.size(x) else np.zeros(1, np.uint8), plain)
    room = path.with_name(f".{path.name}.saving-{os.getpid()}")
    try:
        _clear_leftovers(path)
        _fill(room, stored, files, ours)
        _swap(room, path)
    except Exception as e:
        shutil.rmtree(room, ignore_errors=True)
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        raise BitnetError(
            f"{path}: could not be saved ({reason}); free disk space or give another folder. "
            "Nothing half-written was left"
        ) from e


def _fill(room: Path, stored: Tree, files: dict[str, bytes], manifest: dict) -> None:
    """Write everything into a new folder, the manifest last, with the checksums of the rest."""
    room.mkdir(parents=True)
    for name, data in files.items():
        (room / name).write_bytes(data)
    with _quiet(), _threads_awaited():
        ocp.save(str(room / "weights"), stored)
    written = {n: zlib.crc32((room / n).read_bytes()) for n in files_in(room)}
    manifest = {**manifest, "files": written}
    manifest["self"] = zlib.crc32(_text(manifest).encode())
    (room / _MANIFEST).write_text(_text(manifest))


def _check_names(path: Path, leaves: int, arrays: dict, files: dict[str, bytes]) -> None:
    """Refuse what could not be told apart, or found again, on load."""
    if not leaves:
        raise BitnetError(f"{path}: there is nothing to save, the tree has no leaf")
    if len(arrays) != leaves:
        raise BitnetError(f"{path}: two leaves of the tree have the same path; rename one")
    for name in files:
        if name in (_MANIFEST, "weights") or Path(name).name != name:
            raise BitnetError(f"{path}: {name!r} cannot be the name of an extra file")


def files_in(folder: Path) -> list[str]:
    """Paths of all files in a folder, relative to it, sorted."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def _swap(room: Path, path: Path) -> None:
    """Put the finished folder in place; an old one is moved aside first, then removed."""
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(room, path)
    except OSError:
        _put_back(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _left(path: Path, kind: str) -> list[Path]:
    """What a killed save left beside ``path``: "saving" (its own) or "replaced" (the old one)."""
    head = f".{path.name}.{kind}-"
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    return [f for f in siblings if f.name.startswith(head) and f.name[len(head) :].isdigit()]


def _put_back(path: Path) -> None:
    """Put back a checkpoint that a save moved aside and did not live to replace."""
    for left in _left(path, "replaced"):
        if not path.exists():
            with contextlib.suppress(OSError):
                os.rename(left, path)


def _clear_leftovers(path: Path) -> None:
    """Remove what a killed save left here."""
    for left in _left(path, "saving") + _left(path, "replaced"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _quiet():
    """Orbax and TensorStore log every step of a save; a user wants the outcome."""
    loggers = [logging.getLogger(n) for n in ("absl", "orbax")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


@contextlib.contextmanager
def _threads_awaited():
    """Orbax's writing threads end before a failed save does, and without tracebacks of their own.

    The first failure is the one that is raised; the other threads would write on into a folder that
    is being removed, and say so on stderr.
    """
    known, hook = set(threading.enumerate()), threading.excepthook
    threading.excepthook = lambda args: hook(args) if args.thread in known else None
    try:
        yield
    except Exception:
        for thread in set(threading.enumerate()) - known:
            with contextlib.suppress(Exception):
                thread.join(timeout=10)
        raise
    finally:
        threading.excepthook = hook


def _present(path: str | os.PathLike) -> Path:
    """The folder itself or, where a save was killed between its two renames, the old one aside."""
    path = Path(os.path.abspath(path))
    return path if path.exists() else next(iter(_left(path, "replaced")), path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a folder to `load`, aside from a killed save included."""
    return _present(path).exists()


def read_manifest(path: str | os.PathLike) -> dict:
    """A checkpoint's manifest: version, ternary leaves, checksums and the caller's metadata.

    Raises:
      BitnetError: if there is no checkpoint, the manifest is damaged, or its version is not ours.
    """
    path = _present(path)
    if not path.is_dir():
        raise BitnetError(f"{path}: no such folder; give the folder of a packed checkpoint")
    if not (path / _MANIFEST).is_file():
        inside = ", ".join(sorted(p.parent.name for p in path.glob(f"*/{_MANIFEST}")))
        hint = f"; inside it these are: {inside}" if inside else ""
        raise BitnetError(f"{path}: not a bitnet-jax checkpoint (no {_MANIFEST} in it){hint}")
    try:
        ours = json.loads((path / _MANIFEST).read_text())
        version, told = ours["version"], ours.pop("self")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise BitnetError(f"{path / _MANIFEST}: damaged; restore it from a copy") from e
    if version != FORMAT_VERSION:
        raise BitnetError(
            f"{path}: format version {version}, this bitnet-jax reads {FORMAT_VERSION}; upgrade it"
        )
    if told != zlib.crc32(_text(ours).encode()):
        raise BitnetError(
            f"{path / _MANIFEST}: damaged (checksum mismatch); restore it from a copy"
        )
    return ours


def load(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint back, verifying the checksum of every file and every leaf.

    Args:
      path: the folder given to `save`.

    Returns:
      `Checkpoint` with the tree, ternary leaves rebuilt with their static fields; arrays are on
      the default device, whatever mesh they were saved from.

    Raises:
      BitnetError: naming the file or leaf that is missing, truncated or changed.
    """
    path = _present(path)
    ours = read_manifest(path)
    for name, crc in ours["files"].items():
        _check_file(path / name, crc)
    files = {name: (path / name).read_bytes() for name in ours["extra"]}
    try:
        with _quiet():
            stored = _load_weights(str(path / "weights"))
    except Exception as e:
        raise BitnetError(f"{path}/weights: cannot be read; restore it from a copy") from e
    empty = {n: np.zeros(shape, dtype) for n, (dtype, shape) in ours["empty"].items()}
    stored = jax.tree_util.tree_map_with_path(lambda p, x: empty.get(path_name(p), x), stored)
    found = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(stored)}
    for name, crc in ours["crc32"].items():
        if name not in found:
            raise BitnetError(f"{path}: leaf {name} is missing; restore the checkpoint from a copy")
        if crc32(found[name]) != crc:
            raise BitnetError(
                f"{path}: leaf {name} is damaged (checksum mismatch); restore it from a copy"
            )
    return Checkpoint(_rebuild(stored, ours["ternary"]), ours["metadata"], files)


def _load_weights(path: str) -> Tree:
    """Orbax's part, placed on one device here, whatever mesh it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        ocp.metadata(path).metadata,
    )
    return ocp.load(path, target)


def _check_file(path: Path, crc: int) -> None:
    if not path.is_file():
        raise BitnetError(f"{path}: missing; restore the checkpoint from a copy")
    if zlib.crc32(path.read_bytes()) != crc:
        raise BitnetError(
            f"{path}: truncated or damaged (checksum mismatch); restore it from a copy"
        )


def _rebuild(tree: Tree, ternary: dict[str, dict]) -> Tree:
    """Dicts of codes and scale back to ternary leaves, by their paths."""

    def is_leaf_dict(x):
        arrays = isinstance(x, dict) and all(hasattr(v, "dtype") for v in x.values())
        return arrays and set(x) == {"codes", "scale"}

    def one(path, x):
        statics = dict(ternary.get(path_name(path), {}))
        statics |= {k: tuple(v) for k, v in statics.items() if isinstance(v, list)}
        return _KINDS[statics.pop("kind")](**x, **statics) if statics else x

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf_dict)
