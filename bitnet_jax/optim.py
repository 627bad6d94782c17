"""MuGrokfast: Grokfast's filter, Muon for the hidden matrices, AdamW for the rest."""

import math
import re
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from .convert import path_name
from .errors import BitnetError

Tree = Any
Axes = Mapping[str, MuonDimensionNumbers | None]

# Hidden matrices are what multiplies activations inside the blocks. What meets tokens or routes
# them does not orthogonalise well: every Muon recipe, its author's first, gives it to Adam.
_NOT_HIDDEN = r"(?i)(^|/)(\w*embed\w*|wte|wpe|(lm_)?head|router|\w*norm\w*|ln\w*)(/|$)"
# Below this many inputs or outputs, orthogonalising is little more than a normalisation.
_SMALLEST_SIDE = 16
# optax's "aol" stops normalising rows whose norm is under about 1e-4, which fine-tuning reaches.
# Muon does not feel a constant factor; this exact one moves the floor to 1e-10.
_ABOVE_FLOOR = 2.0**20


class GrokfastState(NamedTuple):
    """Steps taken, and the running average of the gradients."""

    count: jax.Array
    ema: Tree


def grokfast_ema(
    alpha: float = 0.9, lamb: float = 1.0, ema_dtype: Any = None
) -> optax.GradientTransformation:
    """Amplify the slow part of the gradient (Grokfast-EMA, arXiv 2405.20233).

    ema_1 = g_1,  ema_t = alpha ema_(t-1) + (1 - alpha) g_t,  out_t = g_t + lamb ema_t

    Args:
      alpha: decay of the average; the paper's runs use 0.98.
      lamb: weight of the average; the paper's runs use 2.
      ema_dtype: dtype the average is kept in between steps; None for the parameter's own.

    Returns:
      An optax transformation, values equal to the published ``gradfilter_ema``; its arithmetic is
      in float32 at least, its updates have the gradient's dtype.

    >>> slow = grokfast_ema(alpha=0.5, lamb=2.0)
    >>> state = slow.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0):
    ...     out, state = slow.update(jnp.array([g]), state)
    ...     out.tolist()
    [3.0]
    [7.0]
    """

    def init(params):
        ema = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=ema_dtype), params)
        return GrokfastState(jnp.zeros((), jnp.int32), ema)

    def update(updates, state, params=None):
        del params
        keep = jnp.where(state.count == 0, 0.0, alpha)
        grads, old = _wide(updates), _wide(state.ema)
        ema = jax.tree.map(lambda e, g: keep * e + (1 - keep) * g, old, grads)
        out = jax.tree.map(lambda g, e: g + lamb * e, grads, ema)
        state = GrokfastState(state.count + 1, _like(ema, state.ema))
        return _like(out, updates), state

    return optax.GradientTransformation(init, update)


def labels(params: Tree, axes: Axes | None = None) -> Tree:
    """Which rule updates each leaf: ``"muon"``, ``"decay"`` or ``"plain"``.

    | label | leaves                                                             | rule            |
    |-------|--------------------------------------------------------------------|-----------------|
    | muon  | ``kernel`` of a hidden layer, 16 inputs and outputs or more        | Muon, decay     |
    | decay | every other matrix: embeddings, heads, routers, small kernels      | AdamW, decay    |
    | plain | vectors and scalars, and what is called bias or scale, stacked too | AdamW, no decay |

    Args:
      params: the variables; only paths and shapes are read.
      axes: for kernels that are no plain (in, out) matrix: a pattern, searched for in the path,
        to `optax.contrib.MuonDimensionNumbers`, the axes that are inputs and those that are
        outputs (others are a stack of independent matrices), or to None for AdamW. The first
        pattern that matches decides.

    Raises:
      BitnetError: for a hidden kernel with three axes or more that no pattern claims. optax's own
        Muon gives it to Adam without a word.

    >>> layer = {"kernel": jnp.ones((3, 32, 32)), "bias": jnp.ones((3, 32))}  # stacked by scan
    >>> labels({"layers": layer}, {"^layers/": MuonDimensionNumbers(-2, -1)})
    {'layers': {'bias': 'plain', 'kernel': 'muon'}}
    """

    def one(path, x):
        name = path_name(path)
        if _is_plain(name, x):
            return "plain"
        return "decay" if _matrix_axes(name, x, axes or {}) is None else "muon"

    return jax.tree_util.tree_map_with_path(one, params)


def _is_plain(name: str, x: jax.Array) -> bool:
    return x.ndim < 2 or name.rsplit("/", 1)[-1] in ("bias", "scale")


def _matrix_axes(name: str, x: jax.Array, axes: Axes) -> MuonDimensionNumbers | None:
    """The input and output axes of a hidden matrix, or None for a leaf that is not one."""
    if not re.search(r"(^|/)kernel$", name) or re.search(_NOT_HIDDEN, name):
        return None
    patterns = [p for p in axes if re.search(p, name)]
    if x.ndim > 2 and not patterns:
        raise BitnetError(
            f"{name}: a kernel with {x.ndim} axes {tuple(x.shape)}; say in axes= which are its "
            "inputs and outputs, or None for AdamW"
        )
    found = axes[patterns[0]] if patterns else MuonDimensionNumbers(0, 1)
    if found is None or min(_size(x, side) for side in found) < _SMALLEST_SIDE:
        return None
    return found


def _size(x: jax.Array, axes: Any) -> int:
    return math.prod(x.shape[i] for i in ((axes,) if isinstance(axes, int) else axes))


def mugrokfast(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.1,
    alpha: float = 0.9,
    lamb: float = 0.0,
    beta: float = 0.95,
    clip: float = 1.0,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Clip, Grokfast, then Muon for hidden matrices and AdamW for everything else.

    w -= rate (0.2 sqrt(max(in, out)) orthogonal(momentum) + weight_decay w)

    is Muon's step on an (in, out) matrix (arXiv 2502.16982): as large as Adam's, so that one
    learning rate and weight decay serve both.

    Grokfast is off unless ``lamb`` is given: in our runs on modular arithmetic, float and ternary,
    it was neutral in front of Muon at (0.9, 1) and up to 1.6x slower at the paper's (0.98, 2);
    what it helped was an untuned AdamW, less than a higher learning rate did.

    Args:
      learning_rate: of Muon; a number or a schedule.
      adam_learning_rate: of AdamW; None for the same.
      weight_decay: decoupled, times the learning rate; matrices only, see `labels`.
      alpha, lamb: of `grokfast_ema`.
      beta: decay of Muon's momentum (Nesterov).
      clip: largest global norm of the gradient; infinity for none.
      axes: of kernels that are no plain matrix, see `labels`.

    Returns:
      An optax transformation. Its arithmetic and state are float32 at least, whatever the
      parameters are; its updates have the gradient's dtype. ``init`` raises `BitnetError` as
      `labels` does.

    >>> params = {"up": {"kernel": jnp.ones((16, 64))}}
    >>> optimizer = mugrokfast(1.0, weight_decay=0.0)
    >>> grads = {"up": {"kernel": jnp.eye(16, 64)}}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> round(float(updates["up"]["kernel"][0, 0]), 1)  # -0.2 sqrt(64) eye
    -1.6
    """
    muon = optax.contrib.muon(
        learning_rate,
        # Five steps bring the singular values of an ill-conditioned matrix into 0.98 ... 1.03;
        # with the original coefficients and normalisation, 0.07 ... 1.20.
        ns_coeffs="dion",
        preconditioning="aol",
        beta=beta,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, x: _matrix_axes(path_name(path), x, axes or {}), tree
        ),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    parts: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(optax.scale(_ABOVE_FLOOR), muon),
        "decay": _adamw(rate, weight_decay),
        "plain": _adamw(rate, 0.0),
    }
    filters = [optax.clip_by_global_norm(clip)] + ([grokfast_ema(alpha, lamb)] if lamb else [])
    return _in_float32(
        optax.chain(*filters, optax.partition(parts, lambda tree: labels(tree, axes)))
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW on every leaf, decaying what `mugrokfast` decays: its baseline.

    Arguments, dtypes and clipping are `mugrokfast`'s; kernels may have any number of axes.

    >>> params = {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> optimizer = adamw(0.1, weight_decay=0.5)
    >>> updates, _ = optimizer.update(
    ...     jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    >>> updates["up"]["kernel"][0].tolist(), (updates["up"]["bias"] == 0).all().item()
    ([-0.05000000074505806, -0.05000000074505806], True)
    """

    def decays(params):
        one = lambda path, x: not _is_plain(path_name(path), x)
        return jax.tree_util.tree_map_with_path(one, params)

    rule = _adamw(learning_rate, weight_decay, mask=decays)
    return _in_float32(optax.chain(optax.clip_by_global_norm(clip), rule))


def _adamw(rate: optax.ScalarOrSchedule, weight_decay: float, mask: Any = None):
    """b2 = 0.95, as language models are trained: 0.999 remembers longer than short runs last."""
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=mask)


def _wide(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _like(tree: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on float32 copies: in float16 Adam's epsilon is 0 and squared norms overflow."""

    def update(updates, state, params=None):
        out, state = inner.update(_wide(updates), state, None if params is None else _wide(params))
        return _like(out, updates), state

    return optax.GradientTransformation(lambda params: inner.init(_wide(params)), update)
