"""What every optimizer here needs: wide arithmetic on narrow leaves, and numbers that may vary."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any


def wide(tree: Tree) -> Tree:
    """Every leaf in float32 at least.

    >>> wide(jnp.ones(1, jnp.bfloat16)).dtype.name
    'float32'
    """
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def like(tree: Tree, other: Tree) -> Tree:
    """Every leaf in the dtype of the one in the same place of ``other``.

    >>> like(jnp.ones(1), jnp.ones(1, jnp.bfloat16)).dtype.name
    'bfloat16'
    """
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def at(value: Any, count: jax.Array) -> Any:
    """A number, or what a schedule says at this step.

    >>> at(0.5, 3), at(lambda step: 2 * step, 3)
    (0.5, 6)
    """
    return value(count) if callable(value) else value


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on float32 copies: in float16 Adam's epsilon is 0 and squared norms overflow.

    >>> narrow = jnp.ones(1, jnp.float16)
    >>> optimizer = in_float32(optax.trace(0.9))
    >>> updates, state = optimizer.update(narrow, optimizer.init(narrow))
    >>> updates.dtype.name, state.trace.dtype.name
    ('float16', 'float32')
    """

    def update(updates, state, params=None):
        out, state = inner.update(wide(updates), state, None if params is None else wide(params))
        return like(out, updates), state

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)
