"""Parameter tree in, parameter tree out: which leaves become ternary, and what became of each."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import BitnetError
from .packed import PackedTernary, is_ternary, pack_weight, unpack_weight
from .quantize import Scheme, Ternary, dequantize, quantize_weights

Tree = Any

FORMATS = ("ternary", "ternary-stack", "float32", "float16", "bfloat16")

# What the Phase 4 seed asks for: embeddings, head, norms and biases stay in float16, attention and
# MLP matrices become ternary. In Flax a matrix that multiplies is always called `kernel`.
DEFAULT_RULES = (
    (r"(^|/)(\w*embed\w*|wte|wpe)(/|$)", "float16"),
    (r"(^|/)(lm_)?head(/|$)", "float16"),
    (r"(^|/)(\w*norm\w*|ln\w*)(/|$)", "float16"),
    (r"(^|/)(bias|scale)$", "float16"),
    (r"(^|/)kernel$", "ternary"),
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which leaves become ternary, and what format the others are kept in.

    Args:
      rules: pairs (pattern, format), tried in order on the leaf's path (``layer_0/mlp/up/kernel``)
        with `re.search`; the first that matches decides. Formats: ``"ternary"`` for a matrix
        (in, out); ``"ternary-stack"`` for matrices (..., in, out) stacked by scan; or the float
        dtype to keep, ``"float32"``, ``"float16"``, ``"bfloat16"``.

    A leaf that no rule matches is kept unchanged; if it has two axes or more it is listed in
    `Report.unmatched`, so that no matrix stays large without a word.

    Raises:
      ValueError: for an unknown format or a pattern that is no regular expression.

    >>> Policy().format_of("layer_0/attention/query/kernel"), Policy().format_of("embed/embedding")
    ('ternary', 'float16')
    >>> Policy((("mlp/.*kernel", "ternary"),)).format_of("head/kernel") is None
    True
    """

    rules: tuple[tuple[str, str], ...] = DEFAULT_RULES

    def __post_init__(self):
        for pattern, format in self.rules:
            if format not in FORMATS:
                raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"pattern {pattern!r}: {e}") from None

    def format_of(self, path: str) -> str | None:
        """The format the first matching rule gives this path, or None."""
        return next((f for pattern, f in self.rules if re.search(pattern, path)), None)


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What became of one leaf. Counts of codes are 0 for leaves that are not ternary."""

    path: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    minus: int = 0
    zeros: int = 0
    plus: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """Every leaf of a conversion, and the matrices no rule matched.

    Bytes are of the arrays in memory; what they take on disk is the checkpoint's to say.
    """

    leaves: tuple[LeafReport, ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Paths of leaves with two axes or more that stayed as they were because no rule fits."""
        return tuple(x.path for x in self.leaves if x.note and len(x.shape) > 1)

    @property
    def bytes_before(self) -> int:
        return sum(x.bytes_before for x in self.leaves)

    @property
    def bytes_after(self) -> int:
        return sum(x.bytes_after for x in self.leaves)

    @property
    def codes(self) -> tuple[int, int, int]:
        """How many codes are -1, 0 and +1 in all."""
        return (
            sum(x.minus for x in self.leaves),
            sum(x.zeros for x in self.leaves),
            sum(x.plus for x in self.leaves),
        )

    def as_dict(self) -> dict:
        """Plain data for JSON: totals, leaves and unmatched paths."""
        minus, zeros, plus = self.codes
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "codes": {"minus": minus, "zeros": zeros, "plus": plus},
            "unmatched": list(self.unmatched),
            "leaves": [dataclasses.asdict(x) for x in self.leaves],
        }


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of `convert`: the packed tree and the report on it."""

    tree: Tree
    report: Report


def path_name(path: tuple) -> str:
    """A leaf's path as text, ``layer_0/mlp/up/kernel``, without Flax's ``params/`` in front."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # Flax's boxes
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")


def check_finite(params: Tree) -> None:
    """Raise `BitnetError` naming the first leaf that holds NaN or infinity."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all()):
            what = "NaN" if bool(jnp.isnan(x).any()) else "infinite values"
            raise BitnetError(
                f"{path_name(path)}: holds {what}; repair or retrain this weight, then convert"
            )


def _place(path: str, x: jax.Array, policy: Policy) -> tuple[str | None, str]:
    """The format a leaf takes, None to keep it, and why if the reason is not the policy's own."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None, ""
    format = policy.format_of(path)
    if format is None:
        return None, "no rule matches"
    if format == "ternary" and x.ndim != 2:
        return None, f"has {x.ndim} axes; the ternary rule takes 2 (stacks: 'ternary-stack')"
    if format == "ternary-stack" and x.ndim < 2:
        return None, f"has {x.ndim} axes; 'ternary-stack' takes 2 or more"
    if format == "float16" and float(jnp.abs(x).max(initial=0)) > float(jnp.finfo("float16").max):
        return None, "outgrows float16"
    return format, ""


def ternarise(params: Tree, policy: Policy = Policy(), scheme: Scheme = Scheme()) -> Tree:
    """Latent weights to `Ternary` leaves where the policy says so; the other leaves are cast.

    Args:
      params: tree of float arrays, as Flax's ``init`` returns it (with or without ``params``).
      policy: which leaves, and the formats of the others.
      scheme: how latent weights become codes and scale.

    Returns:
      A tree of the same structure, `Ternary` in place of the matrices.

    Raises:
      BitnetError: if a leaf holds NaN or infinity.

    >>> tree = ternarise({"up": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}})
    >>> tree["up"]["kernel"].codes.dtype, tree["up"]["bias"].dtype
    (dtype('int8'), dtype('float16'))
    """
    check_finite(params)
    quantize = jax.jit(quantize_weights, static_argnums=1)

    def one(path, x):
        format, _ = _place(path_name(path), x, policy)
        if format is None:
            return x
        return quantize(x, scheme) if format.startswith("ternary") else x.astype(format)

    return jax.tree_util.tree_map_with_path(one, params)


def _on(kind: type, f: Callable, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: f(x) if isinstance(x, kind) else x, tree, is_leaf=is_ternary)


def pack(tree: Tree) -> Tree:
    """Every `Ternary` leaf to a `PackedTernary` one; exact; other leaves are returned as they are.

    >>> pack({"kernel": quantize_weights(jnp.eye(4))})["kernel"].codes.shape
    (1, 4)
    """
    return _on(Ternary, jax.jit(pack_weight), tree)


def unpack(tree: Tree) -> Tree:
    """Every `PackedTernary` leaf to a `Ternary` one; exact inverse of `pack`."""
    return _on(PackedTernary, jax.jit(unpack_weight), tree)


def dequantise(tree: Tree) -> Tree:
    """Every ternary leaf, packed or not, to its float32 values codes * scale.

    For plain float layers and other libraries. Not for `BitDense`: quantising these values again
    is not the same ternary weight under absmean (see `dequantize`).
    """
    return _on(Ternary, jax.jit(dequantize), unpack(tree))


def report(before: Tree, after: Tree, policy: Policy = Policy()) -> Report:
    """Compare a float tree with what it was converted to, leaf by leaf.

    Args:
      before: the float tree.
      after: the same tree with ternary leaves, packed or not.
      policy: the one it was converted by; says why a leaf was kept.
    """
    old = jax.tree_util.tree_leaves_with_path(before)
    new = jax.tree.leaves(after, is_leaf=is_ternary)
    return Report(tuple(_leaf_report(path_name(p), x, y, policy) for (p, x), y in zip(old, new)))


def _leaf_report(path: str, x: jax.Array, y: Any, policy: Policy) -> LeafReport:
    _, note = _place(path, x, policy)
    if not is_ternary(y):
        return LeafReport(path, x.shape, str(y.dtype), x.nbytes, y.nbytes, note=note)
    codes = np.asarray(unpack_weight(y).codes if isinstance(y, PackedTernary) else y.codes)
    size = y.codes.nbytes + y.scale.nbytes
    minus, zeros, plus = (int((codes == v).sum()) for v in (-1, 0, 1))
    return LeafReport(path, x.shape, "ternary", x.nbytes, size, minus, zeros, plus)


def convert(params: Tree, policy: Policy = Policy(), scheme: Scheme = Scheme()) -> Converted:
    """A full-precision tree to a packed ternary one, with a report of every leaf.

    ``pack(ternarise(params, policy, scheme))``; the same module applies it, because the tree
    decides what its layers do.

    >>> result = convert({"up": {"kernel": jnp.eye(8)}})
    >>> leaf = result.report.leaves[0]
    >>> leaf.format, leaf.bytes_before, leaf.bytes_after, leaf.zeros, leaf.plus
    ('ternary', 256, 20, 56, 8)
    """
    tree = pack(ternarise(params, policy, scheme))
    return Converted(tree, report(params, tree, policy))
