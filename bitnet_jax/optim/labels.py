"""Which rule updates which leaf, by path and shape."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from ..convert import path_name
from ..errors import BitnetError
from .trees import Tree

Axes = Mapping[str, MuonDimensionNumbers | None]
LABELS = ("muon", "decay", "plain")

# Hidden matrices are what multiplies activations inside the blocks. What meets tokens or routes
# them does not orthogonalise well: every Muon recipe, its author's first, gives it to Adam.
_NOT_HIDDEN = r"(?i)(^|/)(\w*embed\w*|wte|wpe|(lm_)?head|router|\w*norm\w*|ln\w*)(/|$)"
# Below this many inputs or outputs, orthogonalising is little more than a normalisation.
_SMALLEST_SIDE = 16


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

    >>> import jax.numpy as jnp
    >>> layer = {"kernel": jnp.ones((3, 32, 32)), "bias": jnp.ones((3, 32))}  # stacked by scan
    >>> labels({"layers": layer}, {"^layers/": MuonDimensionNumbers(-2, -1)})
    {'layers': {'bias': 'plain', 'kernel': 'muon'}}
    """

    def one(name, x):
        if is_plain(name, x):
            return "plain"
        return "decay" if matrix_axes(name, x, axes or {}) is None else "muon"

    return map_named(one, params)


def map_named(f: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """``f(path as text, leaf)`` of every leaf.

    >>> map_named(lambda name, x: name, {"params": {"up": {"kernel": 0}}})
    {'params': {'up': {'kernel': 'up/kernel'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: f(path_name(path), x), tree)


def is_plain(name: str, x: Any) -> bool:
    """Whether a leaf is one that never decays: a vector, a bias, a scale.

    >>> import jax.numpy as jnp
    >>> is_plain("layers/norm/scale", jnp.ones((3, 32))), is_plain("up/kernel", jnp.ones((3, 32)))
    (True, False)
    """
    last = name.rsplit("/", 1)[-1]
    return x.ndim < 2 or last in ("bias", "scale") or last.endswith("_scale")


def matrix_axes(name: str, x: Any, axes: Axes) -> MuonDimensionNumbers | None:
    """The input and output axes of a hidden matrix, or None for a leaf that is not one.

    Raises `BitnetError` as `labels` does.

    >>> import jax.numpy as jnp
    >>> matrix_axes("up/kernel", jnp.ones((32, 16)), {})
    MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    """
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


def _size(x: Any, axes: Any) -> int:
    return math.prod(x.shape[i] for i in ((axes,) if isinstance(axes, int) else axes))
