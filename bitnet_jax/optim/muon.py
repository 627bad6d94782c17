"""Muon on matrices: orthogonalised momentum (optax's), its coefficients, and NorMuon's rows."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from ..errors import BitnetError
from .trees import Tree, in_float32, like, wide

Coefficients = tuple[tuple[float, float, float], ...]

# One triple (a, b, c) a step: X <- a X + b (X X^T) X + c (X X^T)^2 X. `test_optim_muon.py` holds
# each to the singular values it is for.
COEFFICIENTS: dict[str, Coefficients] = {
    # Keller Jordan's Muon: fast from below, then wandering in 0.7 ... 1.2.
    "standard": ((3.4445, -4.7750, 2.0315),) * 5,
    # Dion (arXiv 2504.05295): a polynomial of its own for each step.
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express (arXiv 2505.16932): the minimax choice for values from 1e-3 up, with the
    # paper's margin of 1.01 against rounding; more steps, more exact.
    "polar_express": (
        (8.205160, -22.901935, 16.460725),
        (4.066395, -2.861154, 0.518400),
        (3.909595, -2.823352, 0.525037),
        (3.285564, -2.415302, 0.485294),
        (2.277873, -1.619822, 0.398481),
        (1.872576, -1.230704, 0.358516),
        (1.856437, -1.213239, 0.356800),
        (1.875000, -1.250000, 0.375000),
    ),
}
# optax's "aol" stops normalising rows whose norm is under about 1e-4, which fine-tuning reaches.
# Muon does not feel a constant factor; this exact one moves the floor to 1e-10.
_ABOVE_FLOOR = 2.0**20
_MATRIX = MuonDimensionNumbers(0, 1)


class RowsState(NamedTuple):
    """The running mean square of every output's updates, its input axes kept as 1."""

    square: Tree


def _momentum(beta: float, coefficients: str, mu_dtype: Any, axes_of: Callable, **kwargs):
    """optax's Muon; ``ns_steps`` follows the coefficients, whose number optax checks backwards."""
    if coefficients not in COEFFICIENTS:
        raise BitnetError(
            f"coefficients {coefficients!r}: expected one of {', '.join(COEFFICIENTS)}"
        )
    steps = COEFFICIENTS[coefficients]
    scale_by = optax.contrib.scale_by_muon(
        steps,
        len(steps),
        beta,
        mu_dtype=mu_dtype,
        preconditioning="aol",
        weight_dimension_numbers=axes_of,
        **kwargs,
    )
    return optax.chain(optax.scale(_ABOVE_FLOOR), scale_by)


def all_matrices(tree: Tree) -> Tree:
    """Every leaf is an (in, out) matrix.

    >>> all_matrices([0])
    [MuonDimensionNumbers(reduction_axis=0, output_axis=1)]
    """
    return jax.tree.map(lambda _: _MATRIX, tree)


def orthogonalise(
    x: jax.Array,
    coefficients: str = "dion",
    axes: MuonDimensionNumbers = _MATRIX,
) -> jax.Array:
    """The matrix with x's singular vectors and all singular values near 1.

    x = U S V^T  ->  about U V^T, by Newton-Schulz steps on rows brought near orthogonality first
    (AOL, arXiv 2512.04632); that rescales rows, so it is the factor of a matrix close to x.

    Smallest, median and largest singular value of the result, for a 256 x 512 Gaussian whose rows
    are scaled from 1e-3 to 1; in brackets with the Frobenius norm in AOL's place:

    | coefficients  | steps | singular values                       |
    |---------------|-------|---------------------------------------|
    | standard      | 5     | 0.68, 0.89, 1.13   (0.07, 0.76, 1.20) |
    | dion          | 5     | 0.98, 1.00, 1.03   (0.07, 0.98, 1.15) |
    | polar_express | 8     | 1.00, 1.00, 1.00   (0.72, 1.00, 1.00) |

    Args:
      x: float (in, out), or any shape with ``axes``.
      coefficients: ``"dion"``, the most exact in five steps; ``"standard"``; ``"polar_express"``,
        exact, for 8 steps' work.
      axes: which axes are inputs and outputs; others are a stack of independent matrices.

    Returns:
      The same shape and dtype.

    Raises:
      BitnetError: for coefficients that do not exist.

    >>> orthogonalise(jnp.diag(jnp.array([4.0, -0.1])), "polar_express").round(2).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    # Without momentum, optax's public Muon is the bare orthogonalisation.
    rule = _momentum(0.0, coefficients, None, lambda tree: axes, nesterov=False)
    x32 = wide(x)
    return like(rule.update(x32, rule.init(x32))[0], x)


def muon(
    axes_of: Callable[[Tree], Tree] = all_matrices,
    *,
    beta: float = 0.95,
    normuon: float | None = None,
    coefficients: str = "dion",
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """Muon's direction on matrices, as large as Adam's; no learning rate, no decay.

    m_t = beta m_(t-1) + (1 - beta) g_t,  out = 0.2 sqrt(max(in, out)) orthogonal(m_t, Nesterov's)

    so that the root mean square of the update is 0.2 (arXiv 2502.16982). With ``normuon`` every
    output is divided by its own running size first, see `normalise_rows`.

    Args:
      axes_of: a tree of float matrices to the same tree of `optax.contrib.MuonDimensionNumbers`.
      beta: decay of the momentum.
      normuon: decay of NorMuon's mean square (the paper's runs use 0.95); None for plain Muon.
      coefficients: see `orthogonalise`.
      mu_dtype: dtype the momentum is kept in; None for float32 at least, as its arithmetic is.

    Returns:
      An optax transformation.

    Raises:
      BitnetError: for coefficients that do not exist.

    >>> g, rule = jnp.eye(16, 64), muon()
    >>> round(float(rule.update(g, rule.init(g))[0][0, 0]), 1)  # 0.2 sqrt(64)
    1.6
    """
    momentum = _momentum(beta, coefficients, mu_dtype, axes_of)
    size = _adams_size(axes_of) if normuon is None else normalise_rows(normuon, axes_of)
    return in_float32(optax.chain(momentum, size))


def normalise_rows(
    decay: float = 0.95, axes_of: Callable[[Tree], Tree] = all_matrices
) -> optax.GradientTransformation:
    """Give every output the same share of the update (NorMuon, arXiv 2510.05491).

    v_t = decay v_(t-1) + (1 - decay) mean over inputs of o^2,
    out = 0.2 sqrt(in out) r / |r|,  r = o / sqrt(v_t)

    for each output; |r| is the norm of the whole matrix, so that its root mean square is 0.2 and
    a bias of v common to all outputs cancels.

    Args:
      decay: of the running mean square v; float32, one number an output and matrix.
      axes_of: as in `muon`.

    Returns:
      An optax transformation for what Muon puts out.

    >>> o, rule = jnp.array([[1.0, 0.1], [1.0, 0.1]]), normalise_rows()
    >>> rule.update(o, rule.init(o))[0].round(3).tolist()
    [[0.20000000298023224, 0.20000000298023224], [0.20000000298023224, 0.20000000298023224]]
    """

    def init(params):
        zero = lambda axes, x: jnp.zeros(_kept(x.shape, _tuple(axes.reduction_axis)), jnp.float32)
        return RowsState(_map(zero, axes_of(params), params))

    def update(updates, state, params=None):
        del params
        axes = axes_of(updates)
        mean = lambda a, o, v: (
            decay * v + (1 - decay) * (o * o).mean(_tuple(a.reduction_axis), keepdims=True)
        )
        square = _map(mean, axes, updates, state.square)
        return _map(_rescaled, axes, updates, square), RowsState(square)

    return optax.GradientTransformation(init, update)


def _rescaled(axes: MuonDimensionNumbers, o: jax.Array, square: jax.Array) -> jax.Array:
    """0.2 sqrt(in out) r / |r| with r = o / sqrt(square); zeros stay zeros."""
    r = o * jax.lax.rsqrt(jnp.maximum(square, 1e-20))
    both = _tuple(axes.reduction_axis) + _tuple(axes.output_axis)
    norm = jnp.sqrt((r * r).sum(both, keepdims=True))
    size = 0.2 * math.sqrt(math.prod(o.shape[i] for i in both))
    return size * r / jnp.maximum(norm, 1e-20)


def _adams_size(axes_of: Callable[[Tree], Tree]) -> optax.GradientTransformation:
    """Times 0.2 sqrt(max(in, out)), by which Muon's update has a root mean square of 0.2."""

    def one(axes, x):
        sides = (math.prod(x.shape[i] for i in _tuple(side)) for side in axes)
        return 0.2 * math.sqrt(max(sides)) * x

    return optax.stateless(lambda updates, params: _map(one, axes_of(updates), updates))


def _map(f: Callable, axes: Tree, *trees: Tree) -> Tree:
    is_axes = lambda x: isinstance(x, MuonDimensionNumbers)
    return jax.tree.map(f, axes, *trees, is_leaf=is_axes)


def _tuple(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with these axes as 1."""
    gone = {i % len(shape) for i in axes}
    return tuple(1 if i in gone else n for i, n in enumerate(shape))
