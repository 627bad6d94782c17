"""Conversion that looks at data: each matrix becomes ternary so that its outputs change least.

Nothing of the network is known here but that its matrices meet their inputs in `dot_general`. A
leaf put in place of a kernel, `_Observed`, multiplies as the kernel does, and its gradient is what
we came for: with respect to a matrix of zeros that it carries, "the gradient" is X^T X of the
inputs it saw, summed over tokens, calls and layers that share it. XLA drops the rest of the
backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from .convert import check_finite, path_name, ternarise
from .errors import BitnetError
from .host import host_view
from .leaf import Acting, Product, Quantized, Ternary
from .policy import Policy, is_ternary_matrix
from .progress import counter
from .pytree import pytree
from .quantize import Scheme, dequantize, grouped, quantize_kernel, round_activations
from .reconstruct import corrected, damped, reconstruct

Tree = Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a network that runs by itself; stages run one after another.

    Attributes:
      path: keys of its subtree in the parameters; () for all of them.
      apply: (subtree, inputs) -> outputs, the next stage's inputs; any trees of arrays. Stages that
        run the same code should share the function: it is compiled once.
    """

    path: tuple[str, ...]
    apply: Callable[[Tree, Any], Any]


@pytree
@dataclasses.dataclass(frozen=True)
class _Observed(Acting):
    """A float matrix whose inputs are measured, in one of two streams that run side by side.

    In the stream of the converted model (``rounded``) inputs are rounded to 8 bits first.
    """

    kernel: jax.Array
    rounded: jax.Array
    gram: jax.Array
    cross: jax.Array
    name: str = dataclasses.field(metadata={"static": True})
    seen: Any = dataclasses.field(metadata={"static": True}, default=None)

    def product(self, lhs: jax.Array, call: Product) -> jax.Array:
        if self.seen is not None:
            self.seen.names.append(self.name)
        x = jnp.asarray(lhs, jnp.float32)
        x = jnp.where(self.rounded, round_activations(x, call.contract), x)
        x = jnp.asarray(_observe((call.contract, call.batch), x, self.gram, self.cross))
        return call.plain(x.astype(lhs.dtype), self.kernel)


_STREAMS = "streams"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(axes: tuple, x: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
    """x, with gradients X'^T X' and X'^T X of ``gram`` and ``cross`` whatever follows."""
    return x


def _observe_fwd(axes, x, gram, cross):
    return x, x


def _observe_bwd(axes, x, g):
    contract, batch = axes
    rows = [i for i in range(x.ndim) if i not in (*contract, *batch)]
    lead = [x.shape[i] for i in batch]
    size = functools.reduce(lambda a, i: a * x.shape[i], contract, 1)
    x = jax.lax.transpose(x, (*batch, *rows, *contract)).reshape(*lead, -1, size)
    true, changed = jax.lax.all_gather(x, _STREAMS)
    product = lambda a, b: jnp.einsum("...ri,...rj->...ij", a, b)
    return g, product(changed, changed), product(changed, true)


_observe.defvjp(_observe_fwd, _observe_bwd)


def calibrate(
    params: Tree,
    stages: Sequence[Stage] | Callable[[Tree, Any], Any],
    batches: Sequence[Any],
    policy: Policy = Policy(),
    scheme: Scheme = Scheme("twn", "channel"),
    *,
    rounds: int = 8,
    console: Console | None = None,
) -> Tree:
    """Latent weights to ternary ones whose outputs on these inputs are closest to the float ones'.

    Matrix after matrix, from below: with X the inputs it has in the float model, X' those it has
    behind the layers converted so far, rounded to 8 bits as at run time,

    T = argmin |X' T - X W|^2,  codes and scale = argmin |X' T - X' (codes scale)|^2

    by `bitnet_jax.reconstruct`: error feedback (GPTQ, arXiv 2210.17323), least squares scales,
    descent over codes. Matrices that no input reaches fall back to the scheme's rule.

    Args:
      params: tree of float arrays, as for `bitnet_jax.convert.ternarise`.
      stages: the network in parts that run one after another, or as one function (params, inputs)
        -> outputs. Its layers take ternary leaves (`BitDense` with any scheme).
      batches: inputs of the first stage, a few thousand tokens in all; of one shape, so that the
        program is compiled once.
      policy: which leaves, and the formats of the others.
      scheme: the rule of the start, and what shares a scale.
      rounds: of descent over the codes.
      console: where to draw the progress bar; None for silence.

    Returns:
      The tree with `Ternary` leaves, as `bitnet_jax.convert.ternarise` gives.

    Raises:
      BitnetError: for NaN or infinite weights, or no batches.

    >>> from bitnet_jax import BitDense
    >>> layer, x = BitDense(4), jax.random.normal(jax.random.key(0), (16, 8))
    >>> params = layer.init(jax.random.key(1), x)
    >>> tree = calibrate(params, layer.apply, [x])
    >>> type(tree["params"]["kernel"]).__name__
    'Ternary'
    """
    check_finite(params)
    if not batches:
        raise BitnetError("calibrate: no batches; give some inputs, or convert by the rule alone")
    parts = [Stage((), stages)] if callable(stages) else list(stages)
    streams = [jax.tree.map(lambda x: jnp.stack([x, x]), b) for b in batches]
    found: dict[str, Quantized] = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(is_ternary_matrix(path_name(p), x, policy) for p, x in leaves)
    with counter(console, "calibrate", total) as done:
        for i, stage in enumerate(parts):
            part = _Part(stage, params, policy, scheme)
            kernels = _convert(part, streams, rounds, lambda n, w: (found.update({n: w}), done()))
            if i + 1 < len(parts):
                streams = [_run(stage.apply, part.tree, kernels, part.probes(), x) for x in streams]
    return ternarise(params, policy, scheme, found)


def latent_start(params: Tree, converted: Tree, scheme: Scheme, keep: float) -> Tree:
    """Latent weights to train on from: those of the float model, moved towards the converted ones.

    w = c codes scale + keep (w_float - c codes scale)

    With keep = 0 the scheme's rule gives the converted codes and scales back: c is 1 for twn, whose
    scale is the mean of the codes that are not 0, and 1 / density for absmean and threshold, whose
    scale is the mean of all. With keep = 1 they are the float weights. Between, some codes are the
    rule's, and weights whose code is 0 keep a size of their own.

    Args:
      params: the float weights.
      converted: what `calibrate` made of them.
      scheme: the one they will be trained with.
      keep: 0..1.

    Returns:
      Float weights; leaves that are not quantised are those of ``params``.

    >>> from bitnet_jax import quantize_weights, ternarise
    >>> scheme, params = Scheme("absmean"), {"kernel": jnp.array([[0.9, -0.1], [0.1, -0.9]])}
    >>> converted = ternarise(params, scheme=scheme)
    >>> again = quantize_weights(latent_start(params, converted, scheme, 0.0)["kernel"], scheme)
    >>> again.codes.tolist(), round(float(again.scale[0, 0]), 4)
    ([[1, 0], [0, -1]], 0.5)
    """
    if keep == 1:
        return params
    one = lambda x, w: _moved(x, w, scheme.rule, keep) if isinstance(w, Quantized) else x
    return jax.tree.map(one, params, converted)


@functools.partial(jax.jit, static_argnums=2)
def _moved(kernel: jax.Array, weight: Quantized, rule: str, keep: float) -> jax.Array:
    if isinstance(weight, Ternary) and rule in ("absmean", "threshold"):
        blocks, rows = grouped(jnp.abs(weight.codes).astype(jnp.float32), weight.group)
        axes = (-2, -1) if weight.scale.shape[-1] == 1 else (-2,)
        size = rows * (weight.codes.shape[-1] if len(axes) == 2 else 1)
        density = blocks.sum(axes, keepdims=True) / size
        scale = weight.scale / jnp.maximum(density, 1e-3).squeeze(-2)
        weight = dataclasses.replace(weight, scale=scale)
    value = dequantize(weight)
    return (value + keep * (kernel.astype(jnp.float32) - value)).astype(kernel.dtype)


class _Part:
    """A stage with its weights: names of the matrices in the order in which it meets them."""

    def __init__(self, stage: Stage, params: Tree, policy: Policy, scheme: Scheme):
        self.apply, self.scheme, self.tree = stage.apply, scheme, params
        for key in stage.path:
            self.tree = self.tree[key]
        keys = [key for key in stage.path if key != "params"]
        self.prefix = "".join(f"{key}/" for key in keys)
        self.latent: dict[str, jax.Array] = {}
        self.inputs: dict[str, int | None] = {}
        for path, x in jax.tree_util.tree_leaves_with_path(self.tree):
            name = path_name(path)
            if is_ternary_matrix(self.prefix + name, x, policy):
                stack = policy.format_of(self.prefix + name) == "ternary-stack"
                self.latent[name] = x.astype(jnp.float32)
                self.inputs[name] = None if stack else policy.inputs_of(self.prefix + name, x.ndim)

    def start(self, name: str) -> Quantized:
        """The weight by the scheme's rule alone."""
        return _start(self.latent[name], self.scheme, self.inputs[name])

    def matrix(self, name: str) -> jax.Array:
        """The latent kernel as (..., in, out)."""
        x, n = self.latent[name], self.inputs[name]
        return x if n is None else x.reshape(math.prod(x.shape[:n]), -1)

    def probes(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Two zero matrices (..., in, in) for each kernel, to measure at."""
        shapes = {name: self.matrix(name).shape for name in self.latent}
        zeros = {name: jnp.zeros((*s[:-1], s[-2])) for name, s in shapes.items()}
        return {name: (x, x) for name, x in zeros.items()}

    def order(self, x: Any) -> list[str]:
        """Names as the network meets them; those it does not meet are left out."""
        seen = _Seen()
        flag = jnp.asarray(False)
        go = lambda k, x: self.apply(_observed(self.tree, k, flag, self.probes(), seen), x)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), x)
        jax.eval_shape(go, self.latent, one)
        return [name for name in dict.fromkeys(seen.names) if name in self.latent]


class _Seen:
    """Notes the names of matrices while a network is traced."""

    def __init__(self):
        self.names: list[str] = []


def _convert(part: _Part, streams: list, rounds: int, note: Callable) -> dict[str, jax.Array]:
    """Convert the matrices of a stage; its kernels (2, ...), float and converted."""
    both = lambda name, weight: _both(part.latent[name], weight)
    kernels = {name: both(name, part.start(name)) for name in part.latent}
    waiting = part.order(streams[0]) if kernels else []
    while waiting:
        probes = part.probes()
        measured = _sum(_measure(part.apply, part.tree, kernels, probes, x) for x in streams)
        # Matrices that share their inputs (query, key, value) are converted in one go.
        first = measured[waiting[0]]
        now = [n for n in waiting if _equal(measured[n], first)]
        for name in now:
            gram, cross = measured[name]
            weight = _solve(part, name, gram, cross, rounds)
            kernels[name] = both(name, weight)
            note(part.prefix + name, weight)
        waiting = [n for n in waiting if n not in now]
    return kernels


def _solve(part: _Part, name: str, gram: jax.Array, cross: jax.Array, rounds: int) -> Quantized:
    """One matrix, or a stack of them, from what was measured of its inputs."""
    start = part.start(name)
    if not host_view(gram).any():
        return start
    solve = functools.partial(_one_matrix, scheme=part.scheme, rounds=rounds)
    for _ in range(gram.ndim - 2):
        solve = jax.vmap(solve)
    weight = solve(part.matrix(name), gram, cross)
    return dataclasses.replace(start, codes=weight.codes, scale=weight.scale)


@functools.partial(jax.jit, static_argnames="scheme")
def _one_matrix(kernel, gram, cross, scheme, rounds) -> Quantized:
    return reconstruct(corrected(kernel, gram, cross), damped(gram), scheme, rounds)


_start = jax.jit(quantize_kernel, static_argnums=(1, 2))
_both = jax.jit(lambda latent, weight: jnp.stack([latent, dequantize(weight)]))


def _equal(a: Iterable[jax.Array], b: Iterable[jax.Array]) -> bool:
    same = lambda x, y: x.shape == y.shape and (host_view(x) == host_view(y)).all()
    return all(same(x, y) for x, y in zip(a, b))


def _sum(trees: Iterable[Tree]) -> Tree:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), trees)


def _observed(tree: Tree, kernels: dict, rounded: jax.Array, probes: dict, seen=None) -> Tree:
    """The tree with observed matrices in place of those in ``kernels``."""

    def one(path, x):
        name = path_name(path)
        if name not in kernels:
            return x
        gram, cross = probes[name]
        # One flag for each matrix of a stack, so that scan can slice them.
        flag = jnp.broadcast_to(rounded, gram.shape[:-2])
        return _Observed(kernels[name], flag, gram, cross, name, seen)

    return jax.tree_util.tree_map_with_path(one, tree)


def _in_streams(f: Callable, kernels: dict, x: Any) -> Any:
    """f(kernels, rounded, x) in both streams: float, and converted with 8-bit activations."""
    return jax.vmap(f, axis_name=_STREAMS)(kernels, jnp.array([False, True]), x)


@functools.partial(jax.jit, static_argnums=0)
def _run(apply: Callable, tree: Tree, kernels: dict, probes: dict, x: Any) -> Any:
    """What the stage gives, for one batch."""
    go = lambda kernels, rounded, x: apply(_observed(tree, kernels, rounded, probes), x)
    return _in_streams(go, kernels, x)


@functools.partial(jax.jit, static_argnums=0)
def _measure(apply: Callable, tree: Tree, kernels: dict, probes: dict, x: Any) -> dict:
    """X'^T X' and X'^T X of every matrix, for one batch."""

    def one(kernels, rounded, x):
        def total(probes):
            y = jax.tree.leaves(apply(_observed(tree, kernels, rounded, probes), x))
            return sum(
                z.astype(jnp.float32).sum() for z in y if jnp.issubdtype(z.dtype, jnp.inexact)
            )

        return jax.grad(total)(probes)

    # Both streams see both inputs and say the same.
    return jax.tree.map(lambda x: x[0], _in_streams(one, kernels, x))
