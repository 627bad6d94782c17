"""PyTorch weights to Flax variables: names, axes, packed attention, tied tensors, and a report."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import BitnetError
from .names import ATTENTION, Keys, Part, path_of, permute_flattened, rename_all, split_attention
from .tensors import Tensors, from_state_dict, read

Tree = Any
_EMBEDDING = re.compile(r"(?i)(^|[._])(\w*embed\w*|\w*emb|wte|wpe)$")
# torch's name of a layer's tensor, and what Flax calls it.
_STATISTICS = {"running_mean": "mean", "running_var": "var"}
_TORCH_LEAF = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_TORCH_LEAF |= {flax: torch for torch, flax in _STATISTICS.items()}
# BatchNorm counts its batches; Flax does not.
_COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What became of every tensor of the file, by its name there.

    Attributes:
      used: to the path in the tree.
      renamed: to the name after prefixes were stripped and the caller's renames made.
      tied: to the tensor it is one with; kept once.
      left_over: tensors the tree has no place for.
      ignored: entries that are no tensors.
    """

    used: dict[str, str]
    renamed: dict[str, str]
    tied: dict[str, str]
    left_over: tuple[str, ...]
    ignored: tuple[str, ...]

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Sentences for a person: how many were used, and all that was not."""
        told = [f"{len(self.used)} tensors used"]
        told += [f"tied, kept once: {a} = {b}" for a, b in self.tied.items()]
        for what, names in (("left over", self.left_over), ("no tensors", self.ignored)):
            told += [f"{what}: {', '.join(names)}"] if names else []
        return told


@dataclasses.dataclass(frozen=True)
class Imported:
    """Flax variables, ``{"params": ..., "batch_stats": ...}``, and what became of every tensor.

    Integer tensors that no template claims are in ``"buffers"``: among parameters, `jax.grad` would
    refuse them.
    """

    tree: Tree
    report: ImportReport


def from_torch(
    source: Any,
    like: Tree | None = None,
    *,
    rename: Sequence[tuple[str, str]] = (),
    heads: int | None = None,
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Any = "float32",
    mapped: bool = False,
) -> Imported:
    """PyTorch weights as Flax variables.

    | torch                                   | Flax                                              |
    |-----------------------------------------|---------------------------------------------------|
    | Linear ``weight`` (out, in)             | ``kernel`` (in, out)                              |
    | Conv ``weight`` (out, in/groups, ...)   | ``kernel`` (..., in/groups, out)                  |
    | Embedding ``weight`` (rows, features)   | ``embedding``                                     |
    | LayerNorm, RMSNorm, BatchNorm ``weight``| ``scale``                                         |
    | ``running_mean``, ``running_var``       | ``batch_stats``: ``mean``, ``var``                |
    | MultiheadAttention ``in_proj_weight``   | ``query``, ``key``, ``value``: ``kernel``         |
    | MultiheadAttention ``out_proj.weight``  | ``out``: ``kernel``                               |
    | a name ``layers.0.linear``              | a path ``layers_0/linear``                        |

    Not told apart from a Conv, and so to be permuted by hand: ConvTranspose. Recurrent layers have
    no such table; their tensors keep names and shapes.

    Args:
      source: a path (see `bitnet_jax.interop.tensors.read`), a state dict of arrays or tensors, or
        an ``nn.Module``.
      like: variables of the network the weights are for, as ``jax.eval_shape(model.init, ...)`` or
        `bitnet_jax.nnx.variables` gives them: the result has exactly this structure, and layer
        kinds, heads and tied tensors follow from it. Without it they are told by names and shapes:
        a matrix whose layer is called embedding (embed, emb, wte, wpe) is one, any other matrix a
        Linear's.
      rename: pairs (pattern, replacement) for `re.sub`, applied in order to the names in the file.
      heads: without ``like``: split attention kernels to (in, heads, head_dim) as Flax has them.
      flatten: for a Linear that reads a flattened picture: pattern of its name to the picture's
        (channels, height, width). torch flattens channels first, Flax last.
      dtype: of the float arrays; None keeps the file's.
      mapped: leave the weights on disk: numpy views in the file's dtypes, see
        `bitnet_jax.interop.tensors.read`; for files larger than memory.

    Returns:
      `Imported`.

    Raises:
      BitnetError: in one line, if the file cannot be read, a tensor holds NaN, or with ``like``
        tensors are missing or of another shape.

    >>> state = {"up.weight": np.ones((3, 2)), "up.bias": np.zeros(3)}
    >>> jax.tree.map(jnp.shape, from_torch(state).tree)
    {'params': {'up': {'bias': (3,), 'kernel': (2, 3)}}}
    """
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    name = "state dict" if isinstance(source, Mapping) else str(source)
    tensors = from_state_dict(source) if isinstance(source, Mapping) else read(Path(source), mapped)
    if not tensors.arrays:
        raise BitnetError(f"{name}: holds no tensor")
    _check(name, tensors)
    own = () if like is None else like.get("params", like)
    names = rename_all(tensors, rename, own)
    if like is None:  # a tied tensor has one place, its first
        names = {n: new for n, new in names.items() if n not in tensors.tied}
    parts = split_attention(name, tensors, names)
    parts = permute_flattened(name, parts, flatten or {})
    placed = _by_kind(name, parts, heads) if like is None else _by_template(name, parts, like)
    tree, used = _tree(placed, dtype, mapped)
    counters = tuple(n for n in tensors.arrays if n.endswith(_COUNTER))
    report = ImportReport(
        used=used,
        renamed={a: b for a, b in names.items() if a != b},
        tied={a: b for a, b in tensors.tied.items() if a not in used},
        left_over=tuple(n for n in tensors.arrays if n not in used and n not in counters),
        ignored=tensors.ignored + counters,
    )
    return Imported(tree, report)


def _check(source: str, tensors: Tensors) -> None:
    for name, x in tensors.arrays.items():
        if jnp.issubdtype(x.dtype, jnp.floating) and not np.isfinite(x.astype(np.float32)).all():
            what = "NaN" if np.isnan(x.astype(np.float32)).any() else "infinite values"
            raise BitnetError(f"{source}: {name} holds {what}; repair or retrain this weight first")


Placed = dict[Keys, Part]


def _by_kind(source: str, parts: dict[str, Part], heads: int | None) -> Placed:
    """Every tensor placed by its name and shape alone."""
    placed: Placed = {}
    siblings = {n.rpartition(".")[0] for n in parts}
    for name, part in parts.items():
        module, _, leaf = name.rpartition(".")
        if leaf == _COUNTER:
            continue
        x, collection = part.array, "params"
        if leaf in _STATISTICS:
            collection, leaf = "batch_stats", _STATISTICS[leaf]
        elif not jnp.issubdtype(x.dtype, jnp.inexact):
            collection = "buffers"
        elif leaf == "weight":
            leaf = "scale" if x.ndim < 2 else "kernel"
            if x.ndim == 2 and _EMBEDDING.search(module):
                leaf = "embedding"
            x = _kernel(x) if leaf == "kernel" else x
        if heads and _in_attention(module, siblings):
            x = _heads(source, name, x, heads, leaf)
        path = (collection, *path_of(module), leaf)
        if path in placed:
            raise BitnetError(f"{source}: {placed[path].origin} and {part.origin} become one path")
        placed[path] = Part(part.origin, x)
    return placed


def _in_attention(module: str, modules: set[str]) -> bool:
    """Whether this is one of the four projections of an attention, all of them there."""
    around, dot, last = module.rpartition(".")
    four = (*ATTENTION, "out")
    return last in four and all(around + dot + part in modules for part in four)


def _kernel(x: np.ndarray) -> np.ndarray:
    """(out, in, *spatial) to (*spatial, in, out)."""
    return np.moveaxis(x, (0, 1), (-1, -2))


def _heads(source: str, name: str, x: np.ndarray, heads: int, leaf: str) -> np.ndarray:
    """Split the axis of all heads' features: the last, or for the out projection the first."""
    out = re.search(r"(^|\.)out\.\w+$", name) is not None
    if out and leaf == "bias":
        return x
    size = x.shape[0] if out else x.shape[-1]
    if size % heads:
        raise BitnetError(
            f"{source}: {name} has {size} features, which {heads} heads do not divide"
        )
    split = (heads, size // heads)
    return x.reshape(*split, *x.shape[1:]) if out else x.reshape(*x.shape[:-1], *split)


def _by_template(source: str, parts: dict[str, Part], like: Tree) -> Placed:
    """The template's leaves filled, each from the tensor of its name."""
    like = like if "params" in like else {"params": like}
    modules = {
        (path_of(m), leaf): p for n, p in parts.items() for m, _, leaf in [n.rpartition(".")]
    }
    placed: Placed = {}
    wrong: list[str] = []
    for path, x in jax.tree_util.tree_leaves_with_path(like):
        keys = _keys(path)
        module = path_of(".".join(keys[1:-1]))
        names = (_TORCH_LEAF.get(keys[-1], keys[-1]), keys[-1])
        part = next((modules[module, n] for n in names if (module, n) in modules), None)
        if part is None:
            wrong.append(f"{'/'.join(keys[1:])} is missing (no {'.'.join((*module, names[0]))})")
            continue
        y = _fit(part.array, keys[-1], tuple(x.shape))
        if y is None:
            shapes = f"{tuple(part.array.shape)}, {'/'.join(keys[1:])} needs {tuple(x.shape)}"
            wrong.append(f"{part.origin} has shape {shapes}")
            continue
        placed[keys] = Part(part.origin, y)
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BitnetError(
            f"{source}: does not fit the network: {'; '.join(wrong[:3])}{more}. "
            "Map names with rename=, or give the network these weights are for"
        )
    return placed


def _keys(path: Any) -> Keys:
    """A leaf's path as text, without the level that Flax's boxes add."""
    if path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((k,), simple=True) for k in path)


def _fit(x: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A torch tensor in the shape of a Flax leaf, or None."""
    if leaf == "kernel" and x.ndim >= 2:
        x = _kernel(x)
        # A matrix may stand for (in, heads, head_dim) or (heads, head_dim, out).
        sizes = [math.prod(shape[:i]) for i in range(1, len(shape))]
        if x.ndim == 2 and x.shape[0] in sizes and x.size == math.prod(shape):
            return x.reshape(shape)
    if leaf == "bias" and x.size == math.prod(shape):
        return x.reshape(shape)
    return x if x.shape == shape else None


def _tree(placed: Placed, dtype: Any, mapped: bool) -> tuple[Tree, dict[str, str]]:
    """Nested dicts of arrays, and the path of each tensor of the file."""
    tree: dict = {}
    used: dict[str, list[str]] = {}
    for keys, part in placed.items():
        node: Any = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        x, floating = part.array, jnp.issubdtype(part.array.dtype, jnp.floating)
        own = dtype if floating else None
        node[keys[-1]] = x if mapped else jnp.asarray(np.ascontiguousarray(x), own)
        used.setdefault(part.origin, []).append("/".join(keys[1:]))
    return tree, {origin: ", ".join(paths) for origin, paths in used.items()}
