"""Ternary codes and scales that change a matrix's outputs least, given what it multiplies.

For inputs X (tokens, in), a target T (in, out) and a ternary weight Q with scale s,

    E = |X T - X (s Q)|^2 = sum over outputs of (t - s q)^T H (t - s q),    H = X^T X

is all that the inputs say: each step below lowers E, and none looks at the tokens again.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .leaf import Quantized
from .quantize import LEVELS, Scheme, grouped, matrix_values, quantize_weights

# H of few tokens is singular; this share of its mean diagonal is added to it, as GPTQ does
# (arXiv 2210.17323).
DAMPING = 0.01
# Rows whose errors are carried among themselves before they reach the others: the same result as
# one row after another, in matrix products.
_BLOCK = 32


def damped(gram: jax.Array, share: float = DAMPING) -> jax.Array:
    """H + share mean(diag H) I, and ones where an input was always 0.

    >>> damped(jnp.diag(jnp.array([2.0, 0.0])), 0.5).tolist()
    [[2.5, 0.0], [0.0, 0.5]]
    """
    size = gram.shape[-1]
    mean = jnp.trace(gram) / size
    return gram + jnp.where(mean > 0, share * mean, 1.0) * jnp.eye(size, dtype=gram.dtype)


def corrected(
    kernel: jax.Array, gram: jax.Array, cross: jax.Array, share: float = DAMPING
) -> jax.Array:
    """The matrix that serves the changed inputs as the given one served the true ones.

    T = W + (H + d I)^-1 (X'^T X - H) W,  the minimum of |X' T - X W|^2 + d |T - W|^2

    Args:
      kernel: W, float32 (in, out).
      gram: H = X'^T X' of the inputs X' that the converted layers below give, (in, in).
      cross: X'^T X, with the inputs X that the float model has there.
      share: d as a share of the mean diagonal of H.

    >>> eye = jnp.eye(2)
    >>> corrected(eye, eye, 2 * eye, 0.0).tolist()  # the inputs lost half of their size
    [[2.0, 0.0], [0.0, 2.0]]
    """
    factor = jax.scipy.linalg.cho_factor(damped(gram, share))
    return kernel + jax.scipy.linalg.cho_solve(factor, (cross - gram) @ kernel)


def output_error(target: jax.Array, gram: jax.Array, weight: Quantized) -> jax.Array:
    """E of each output, float32 (out,)."""
    difference = target - matrix_values(weight)
    return jnp.sum(difference * (gram @ difference), axis=0)


@functools.partial(jax.jit, static_argnames="scheme")
def reconstruct(
    target: jax.Array,
    gram: jax.Array,
    scheme: Scheme = Scheme("twn", "channel"),
    rounds: int = 8,
) -> Quantized:
    """A ternary weight with small E: error feedback, then descent over codes and scales.

    1. codes and scale by the rule of ``scheme``;
    2. inputs one after another, those that matter most first, each error spread over the inputs
       to come by the inverse of H: GPTQ's feedback, with the grid {-s, 0, s};
    3. scales refitted by least squares, s = q^T H t / q^T H q over what shares one;
    4. each code in turn replaced by the best one given all the others, and scales again, for a
       number of rounds. Steps 3 and 4 never raise E.

    Args:
      target: T, float32 (in, out).
      gram: H, float32 (in, in), damped.
      scheme: the start's rule, and what shares a scale: tensor, channel or a group of inputs.
      rounds: of step 4.

    Returns:
      A quantised weight in ``scheme``'s layout; E is never above that of the rule alone with
      scales refitted. The integer rules go the same way on their own grids; of "sherry" the rule
      decides which of four inputs is 0.

    >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])  # two inputs that nearly agree
    >>> target = jnp.array([[1.0], [-0.4]])
    >>> weight = reconstruct(target, gram, Scheme("twn", "channel"))
    >>> weight.codes.ravel().tolist()  # one of them is enough
    [1, 0]
    """
    start = quantize_weights(target, scheme)
    snap, group = _grid(scheme, start), start.group
    refit = functools.partial(_refit, target, gram, shared=scheme.scale == "tensor", group=group)
    plain = refit(start.codes.astype(jnp.float32), start.scale)
    fed = refit(_feedback(target, gram, _spread(start.scale, start), snap), start.scale)
    errors = [output_error(target, gram, _like(start, *x)) for x in (plain, fed)]
    if scheme.scale == "tensor":
        errors = [e.sum(keepdims=True) for e in errors]
    better = errors[1] < errors[0]
    codes, scale = jax.tree.map(lambda a, b: jnp.where(better, b, a), plain, fed)

    def one_round(_, state):
        codes, scale = state
        return refit(_descend(target, gram, codes, _spread(scale, start), snap), scale)

    return _like(start, *jax.lax.fori_loop(0, rounds, one_round, (codes, scale)))


def _like(start: Quantized, codes: jax.Array, scale: jax.Array) -> Quantized:
    return dataclasses.replace(start, codes=codes.astype(jnp.int8), scale=scale)


def _grid(scheme: Scheme, start: Quantized) -> Callable:
    """The nearest code to a number, as a function of (numbers, the inputs they are for)."""
    if scheme.rule != "sherry":
        levels = LEVELS.get(scheme.rule, 1)
        return lambda x, rows: jnp.clip(jnp.round(x), -levels, levels)
    # Which of four is 0 stays as the rule chose it; the others have a sign.
    free = jnp.abs(start.codes).astype(jnp.float32)
    return lambda x, rows: jnp.where(x >= 0, 1.0, -1.0) * free[rows]


def _spread(scale: jax.Array, like: Quantized) -> jax.Array:
    """Scale (groups, out or 1) as one number a weight, (in, out)."""
    rows, out = like.codes.shape
    each = jnp.repeat(scale, like.group or rows, axis=0)[:rows]
    return jnp.broadcast_to(each, (rows, out))


def _feedback(target: jax.Array, gram: jax.Array, scale: jax.Array, snap: Callable) -> jax.Array:
    """Codes by error feedback: GPTQ's rounding of one input after another."""
    size = target.shape[0]
    order = jnp.argsort(-jnp.diag(gram))
    upper = _padded(_upper_of_inverse(gram[order][:, order]))
    w, s = _rows(target[order], 0.0), _rows(scale[order], 1.0)
    index = jnp.pad(order, (0, -size % _BLOCK))

    def block(b, state):
        w, codes = state
        at = b * _BLOCK
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, at, _BLOCK)
        near = jax.lax.dynamic_slice(upper, (at, at), (_BLOCK, _BLOCK))
        rows, scales, which = take(w), take(s), take(index)

        def row(i, inner):
            rows, errors, q = inner
            code = snap(rows[i] / scales[i], which[i])
            error = (rows[i] - code * scales[i]) / near[i, i]
            rows = rows - near[i][:, None] * error  # U is 0 left of its diagonal
            return rows, errors.at[i].set(error), q.at[i].set(code)

        zeros = jnp.zeros_like(rows)
        _, errors, q = jax.lax.fori_loop(0, _BLOCK, row, (rows, zeros, zeros))
        w = w - take(upper).T @ errors
        return w, jax.lax.dynamic_update_slice_in_dim(codes, q, at, 0)

    _, codes = jax.lax.fori_loop(0, len(w) // _BLOCK, block, (w, jnp.zeros_like(w)))
    return jnp.zeros_like(target).at[order].set(codes[:size])


def _upper_of_inverse(gram: jax.Array) -> jax.Array:
    """U of H^-1 = U^T U, upper triangular: its row i says where the error of input i goes.

    From the last input to the first H = V V^T with V upper triangular, so U = V^-1, and H is
    never inverted.
    """
    v = jnp.linalg.cholesky(gram[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(v, jnp.eye(len(gram), dtype=gram.dtype))


def _descend(
    target: jax.Array, gram: jax.Array, codes: jax.Array, scale: jax.Array, snap: Callable
) -> jax.Array:
    """Each input's codes in turn set to the best given all the others: E never grows."""
    size = target.shape[0]
    h, t, q, s = _padded(gram), _rows(target, 0.0), _rows(codes, 0.0), _rows(scale, 1.0)
    slope = h @ (t - s * q)

    def block(b, state):
        slope, q = state
        at = b * _BLOCK
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, at, _BLOCK)
        near = jax.lax.dynamic_slice(h, (at, at), (_BLOCK, _BLOCK))
        own, old, scales = take(slope), take(q), take(s)

        def row(i, inner):
            own, new = inner
            best = snap(new[i] + own[i] / (near[i, i] * scales[i]), jnp.minimum(at + i, size - 1))
            own = own - near[:, i][:, None] * (scales[i] * (best - new[i]))
            return own, new.at[i].set(best)

        _, new = jax.lax.fori_loop(0, _BLOCK, row, (own, old))
        slope = slope - take(h).T @ (scales * (new - old))  # H is symmetric
        return slope, jax.lax.dynamic_update_slice_in_dim(q, new, at, 0)

    _, q = jax.lax.fori_loop(0, len(q) // _BLOCK, block, (slope, q))
    return q[:size]


def _padded(square: jax.Array) -> jax.Array:
    """A square matrix filled up with the identity to whole blocks."""
    size, pad = len(square), -len(square) % _BLOCK
    return jnp.pad(square, (0, pad)) + jnp.diag((jnp.arange(size + pad) >= size) * 1.0)


def _rows(x: jax.Array, fill: float) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % _BLOCK), (0, 0)), constant_values=fill)


def _refit(
    target: jax.Array,
    gram: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    shared: bool,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """Scales by least squares, one group of inputs after another; codes as they are."""
    size, out = codes.shape
    group = group or size
    blocks, _ = grouped(codes, group)
    groups = blocks.shape[0]
    pad = groups * group - size
    h = jnp.pad(gram, (0, pad))
    q = blocks.reshape(groups * group, out)
    each = jnp.repeat(scale, group, axis=0)
    slope = h @ (jnp.pad(target, ((0, pad), (0, 0))) - each * q)

    def one(g, state):
        slope, scale = state
        part = jax.lax.dynamic_slice_in_dim(q, g * group, group)
        columns = jax.lax.dynamic_slice_in_dim(h, g * group, group, axis=1)
        moved = columns @ part
        own = jax.lax.dynamic_slice_in_dim(slope, g * group, group)
        reached = jax.lax.dynamic_slice_in_dim(moved, g * group, group)
        gain, size = jnp.sum(part * own, 0), jnp.sum(part * reached, 0)
        if shared:
            gain, size = gain.sum(keepdims=True), size.sum(keepdims=True)
        step = jnp.where(size > 0, gain / jnp.where(size > 0, size, 1.0), 0.0)
        # A scale of 0 or less would make codes meaningless: keep the old one there.
        step = jnp.where(scale[g] + step > 0, step, 0.0)
        return slope - moved * step, scale.at[g].add(step)

    _, scale = jax.lax.fori_loop(0, groups, one, (slope, scale))
    return codes, scale
