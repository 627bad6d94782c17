"""Parameter tree in, parameter tree out: which leaves become ternary, and what became of each."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import BitnetError
from .host import all_finite
from .leaf import (
    Packed,
    PackedSparse,
    PackedTernary,
    Prequantized,
    Quantized,
    Ternary,
    is_quantized,
)
from .packed import pack_weight, unpack_weight
from .policy import FLOATS, Policy, is_ternary_matrix, place, quantized_format, scheme_of
from .quantize import Scheme, dequantize, quantize_kernel
from .quantpack import quantize_packed

Tree = Any


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
        if jnp.issubdtype(x.dtype, jnp.floating) and not all_finite(x):
            what = "NaN" if bool(jnp.isnan(x).any()) else "infinite values"
            raise BitnetError(
                f"{path_name(path)}: holds {what}; repair or retrain this weight, then convert"
            )


def kernel_arguments(
    x: jax.Array, path: str, format: str, policy: Policy, scheme: Scheme
) -> tuple[Scheme, int | None]:
    """The scheme and the number of input axes a kernel is quantised with."""
    inputs = None if format == "ternary-stack" else policy.inputs_of(path, x.ndim)
    return scheme_of(format, path, scheme), inputs


def _kernel(x: jax.Array, path: str, format: str, policy: Policy, scheme: Scheme) -> Quantized:
    return _quantize_kernel(x, *kernel_arguments(x, path, format, policy, scheme))


_quantize_kernel = jax.jit(quantize_kernel, static_argnums=(1, 2))
_quantize_packed = jax.jit(quantize_packed, static_argnums=(1, 2))


def ternarise(
    params: Tree,
    policy: Policy = Policy(),
    scheme: Scheme = Scheme(),
    found: Mapping[str, Quantized] = MappingProxyType({}),
) -> Tree:
    """Latent weights to quantised leaves where the policy says so; the other leaves are cast.

    Args:
      params: tree of float arrays: Linen's variables (with or without ``params``) or an
        `flax.nnx.State`. Leaves that are quantised already stay as they are.
      policy: which leaves, and the formats of the others.
      scheme: how latent weights become codes and scale.
      found: quantised weights that are known already, by path, as from `bitnet_jax.calibrate`.

    Returns:
      A tree of the same structure, `Ternary` (`Int8`, `Int4`) in place of the matrices.

    Raises:
      BitnetError: if a leaf holds NaN or infinity.

    >>> tree = ternarise({"up": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}})
    >>> tree["up"]["kernel"].codes.dtype, tree["up"]["bias"].dtype
    (dtype('int8'), dtype('float16'))
    """
    return _each(params, policy, scheme, _quantize_kernel, found)


def _each(params: Tree, policy: Policy, scheme: Scheme, quantise: Callable, found: Mapping) -> Tree:
    """One leaf after the other, so that no two of them are in memory twice."""
    check_finite(params)

    def one(path, x):
        name = path_name(path)
        if name in found or is_quantized(x):
            return found.get(name, x)
        format, _ = place(name, x, policy)
        if format is None:
            return x
        if format in FLOATS:
            return x.astype(format)
        return quantise(x, *kernel_arguments(x, name, format, policy, scheme))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)


def prequantize(params: Tree, policy: Policy = Policy(), scheme: Scheme = Scheme()) -> Tree:
    """The quantised weights the layers would compute from these latent ones, to compute them once.

    Args:
      params: tree of latent weights.
      policy: which leaves are ternary; the others are None in the result.
      scheme: the one the model's layers have.

    Returns:
      A tree of the same structure, for `attach`. Runs under jit.

    >>> prequantize({"up": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}})["up"]["bias"] is None
    True
    """

    def one(path, x):
        name = path_name(path)
        format = quantized_format(name, x, policy)
        if not is_ternary_matrix(name, x, policy):
            return None
        return _kernel(jax.lax.stop_gradient(x), name, format, policy, scheme)

    return jax.tree_util.tree_map_with_path(one, params)


def keep_what_layers_refuse(
    apply: Callable, params: Tree, policy: Policy, scheme: Scheme
) -> tuple[Policy, tuple[str, ...]]:
    """A policy that leaves in float the matrices whose layers take no packed leaf.

    A network of the user's may have plain layers (``nn.Dense``) among those that take leaves
    (`BitDense`). Nothing is computed: the network is only traced.

    Args:
      apply: params -> anything, the network on some input.
      params: its variables.
      policy, scheme: as for `convert`.

    Returns:
      The policy, with a rule ``"float16"`` in front for each such leaf, and their paths.

    >>> import flax.linen as nn
    >>> apply = lambda v: nn.Dense(4, use_bias=False).apply(v, jnp.ones((1, 4)))
    >>> keep_what_layers_refuse(apply, {"params": {"kernel": jnp.eye(4)}}, Policy(), Scheme())[1]
    ('kernel',)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in leaves]
    packed: dict[int, Packed] = {}
    for i, (name, x) in enumerate(zip(names, plain)):
        if format := quantized_format(name, x, policy):
            one = lambda x, n=name, f=format: pack_weight(_kernel(x, n, f, policy, scheme))
            packed[i] = jax.eval_shape(one, x)

    def runs(chosen: dict[int, Packed]) -> bool:
        tree = structure.unflatten([chosen.get(i, x) for i, x in enumerate(plain)])
        try:
            jax.eval_shape(apply, tree)
        except Exception:
            return False
        return True

    if runs(packed) or not runs({}):  # what fails in float too is not the leaves' fault
        return policy, ()
    refused = tuple(names[i] for i, leaf in packed.items() if not runs({i: leaf}))
    rules = tuple((f"^{re.escape(name)}$", "float16") for name in refused)
    return dataclasses.replace(policy, rules=rules + policy.rules), refused


def attach(params: Tree, weights: Tree) -> Tree:
    """Latent weights with the quantised ones computed from them before.

    Args:
      params: tree of latent weights.
      weights: what `prequantize` gave for them.

    Returns:
      The tree with `Prequantized` leaves: the same values and gradients, without quantising again.

    >>> params = {"up": {"kernel": jnp.eye(4)}}
    >>> type(attach(params, prequantize(params))["up"]["kernel"]).__name__
    'Prequantized'
    """
    return jax.tree.map(lambda x, w: x if w is None else Prequantized(x, w), params, weights)


def _on(kind: type, f: Callable, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: f(x) if isinstance(x, kind) else x, tree, is_leaf=is_quantized)


def pack(tree: Tree) -> Tree:
    """Every `Ternary`, `Int8` and `Int4` leaf packed; exact; other leaves as they are.

    >>> from bitnet_jax import quantize_weights
    >>> pack({"kernel": quantize_weights(jnp.eye(4))})["kernel"].codes.shape
    (1, 4)
    """
    return _on(Quantized, pack_weight, tree)


def unpack(tree: Tree) -> Tree:
    """Every packed leaf unpacked; exact inverse of `pack`."""
    return _on(Packed, unpack_weight, tree)


def dequantise(tree: Tree) -> Tree:
    """Every quantised leaf, packed or not, to its float32 values codes * scale.

    For plain float layers and other libraries. Not for `BitDense`: quantising these values again
    is not the same ternary weight under absmean (see `dequantize`).
    """
    return _on(Quantized, dequantize, unpack(tree))


def report(before: Tree, after: Tree, policy: Policy = Policy()) -> Report:
    """Compare a float tree with what it was converted to, leaf by leaf.

    Args:
      before: the float tree.
      after: the same tree with ternary leaves, packed or not.
      policy: the one it was converted by; says why a leaf was kept.
    """
    old = jax.tree_util.tree_leaves_with_path(before, is_leaf=is_quantized)
    new = jax.tree.leaves(after, is_leaf=is_quantized)
    return Report(tuple(_leaf_report(path_name(p), x, y, policy) for (p, x), y in zip(old, new)))


def _leaf_report(path: str, x: jax.Array, y: Any, policy: Policy) -> LeafReport:
    _, note = place(path, x, policy)
    if not is_quantized(y):
        return LeafReport(path, x.shape, str(y.dtype), x.nbytes, y.nbytes, note=note)
    size = 4 * math.prod(x.shape) if is_quantized(x) else x.nbytes
    return LeafReport(path, x.shape, format_name(y), size, y.nbytes, *code_counts(y))


def format_name(leaf: Quantized | Packed) -> str:
    """``"ternary"``, ``"int8"`` or ``"int4"``: what a quantised leaf's codes are."""
    return type(leaf).__name__.removeprefix("Packed").lower()


def code_counts(leaf: Quantized | Packed) -> tuple[int, int, int]:
    """How many codes are -1, 0 and +1; zeros for a leaf that is not ternary."""
    if not isinstance(leaf, Ternary | PackedTernary | PackedSparse):
        return 0, 0, 0
    codes = np.asarray((unpack_weight(leaf) if isinstance(leaf, Packed) else leaf).codes)
    minus, zeros, plus = (int((codes == v).sum()) for v in (-1, 0, 1))
    return minus, zeros, plus


def convert(params: Tree, policy: Policy = Policy(), scheme: Scheme = Scheme()) -> Converted:
    """A full-precision tree to a packed ternary one, with a report of every leaf.

    ``pack(ternarise(params, policy, scheme))``, without the unpacked tree in between; the same
    module applies it, because the tree decides what its layers do.

    >>> result = convert({"up": {"kernel": jnp.eye(8)}})
    >>> leaf = result.report.leaves[0]
    >>> leaf.format, leaf.bytes_before, leaf.bytes_after, leaf.zeros, leaf.plus
    ('ternary', 256, 20, 56, 8)
    """
    tree = pack(_each(params, policy, scheme, _quantize_packed, {}))
    return Converted(tree, report(params, tree, policy))
