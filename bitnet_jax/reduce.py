"""Sums and maxima over the inputs of weights; for large ones on a CPU row by row, in one order.

XLA's CPU backend reduces anything but plain memory element by element, at a twentieth of the
memory's speed. A loop that adds whole rows is not fused into anything, so it is fast, and its sums
have the same bits in every program; `bitnet_jax.ops.quantise` takes them in the same order, and is
compiled once where a loop is compiled for every matrix.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .ops import quantise

# Elements from which the loop is worth its turns and its compilation.
LARGE = 1 << 16
_ROWS = 16  # added in one turn; more outgrow the registers


def over(
    f: Callable,
    op: Callable,
    blocks: jax.Array,
    axes: tuple[int, ...],
    *beside: jax.Array,
    cpu: Callable | None = None,
) -> tuple[jax.Array, ...]:
    """Reduce f(blocks, *beside) over the inputs, and the outputs too where axes has them.

    Args:
      f: (blocks, *beside) -> tuple of arrays like blocks, element by element, none below 0.
      op: `jnp.add` or `jnp.maximum`.
      blocks: float32 (..., groups, group, out).
      axes: (-2,), or (-2, -1).
      beside: (..., groups, 1, out or 1) each.
      cpu: what gives the same on a CPU, for large blocks, in the place of the loops.

    Returns:
      (..., groups, out), or (..., groups), one for each of f's results.

    >>> [x.tolist() for x in over(lambda w: (w, 2 * w), jnp.add, jnp.ones((1, 3, 1)), (-2,))]
    [[[3.0]], [[6.0]]]
    """
    reduce = jnp.sum if op is jnp.add else functools.partial(jnp.max, initial=0)
    plain = lambda *x: tuple(reduce(y, axis=axes) for y in f(*x))
    if not _is_large(blocks):
        return plain(blocks, *beside)

    def by_rows(*x):
        totals = _over_inputs(f, op, *x)
        totals = tuple(over_outputs(op, y) for y in totals) if -1 in axes else totals
        return tuple(y.squeeze(axes) for y in totals)

    return lax.platform_dependent(blocks, *beside, cpu=cpu or by_rows, default=plain)


def abs_sum(blocks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum of |blocks|, as `over` takes it; of large ones on a CPU in C++ where a compiler is there.

    Over the outputs too, for XLA would add the halves of `over_outputs` again for all who use them.

    >>> abs_sum(jnp.array([[[1.0], [-2.0]]]), (-2,)).tolist()
    [[3.0]]
    """

    def native(x):
        *lead, groups, size, out = x.shape
        return (quantise.sums(x.reshape(*lead, groups * size, out), size, -1 in axes),)

    here = _is_large(blocks) and quantise.serves(blocks)
    size = lambda x: (jnp.abs(x),)
    return over(size, jnp.add, blocks, axes, cpu=native if here else None)[0]


def _is_large(blocks: jax.Array) -> bool:
    return blocks.size >= LARGE and blocks.shape[-2] != 1


def _over_inputs(f: Callable, op: Callable, blocks: jax.Array, *beside: jax.Array):
    *lead, groups, size, out = blocks.shape
    kinds = jax.eval_shape(f, blocks, *beside)
    # Like blocks, so that shard_map knows along which mesh axes the sums differ.
    totals = tuple(jnp.zeros_like(blocks[..., :1, :], kind.dtype) for kind in kinds)
    at = lambda group, row=0: (0,) * len(lead) + (group, row, 0)
    of = lambda group, a: lax.dynamic_slice(a, at(group), (*lead, 1, 1, a.shape[-1]))

    def run(totals, first, rows, turns):
        """Every group's ``turns`` times ``rows`` rows from row ``first`` on, in their order."""

        def turn(t, totals):
            group, row = lax.div(t, turns), first + lax.rem(t, turns) * rows
            part = lax.dynamic_slice(blocks, at(group, row), (*lead, 1, rows, out))
            own, sums = [of(group, a) for a in beside], [of(group, a) for a in totals]
            for r in range(rows):
                sums = [op(a, b) for a, b in zip(sums, f(part[..., r : r + 1, :], *own))]
            put = lambda a, b: lax.dynamic_update_slice(a, b, at(group))
            return tuple(put(a, b) for a, b in zip(totals, sums))

        return lax.fori_loop(0, groups * turns, turn, totals)

    rows = min(size, _ROWS)
    turns, left = divmod(size, rows)
    totals = run(totals, 0, rows, turns)
    return run(totals, size - left, left, 1) if left else totals


def over_outputs(op: Callable, x: jax.Array) -> jax.Array:
    """(..., out) to (..., 1): the first half with the second, until one is left.

    >>> over_outputs(jnp.add, jnp.arange(5.0)).tolist()
    [10.0]
    """
    while (n := x.shape[-1]) > 1:
        half = n // 2
        y = op(x[..., :half], x[..., half : 2 * half])
        x = lax.concatenate([y, x[..., 2 * half :]], x.ndim - 1) if n % 2 else y
    return x
