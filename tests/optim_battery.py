"""What the tests of the optimizers share: golden data, a tree with every kind of leaf, a run."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
from optax.contrib import MuonDimensionNumbers

from .battery import normal

STACK = MuonDimensionNumbers(-2, -1)
LAYERS = {"^layers/": STACK}


@functools.cache
def golden(name):
    with np.load(Path(__file__).parent / "golden" / "optim" / f"{name}.npz") as data:
        return dict(data)


def tree(seed=0, dtype=jnp.float32):
    """A tree with a leaf of every kind: an embedding, a head, stacked matrices and vectors."""
    x = functools.partial(normal, seed, dtype=dtype)
    return {
        "embed": {"embedding": x(40, 16)},
        "layers": {"up": {"kernel": x(2, 16, 24), "bias": x(2, 24)}, "norm": {"scale": x(2, 16)}},
        "head": {"kernel": x(16, 40)},
    }


@functools.cache
def jitted(optimizer):
    return jax.jit(optimizer.update)


def run(optimizer, params, grads):
    """All updates and the final state, the parameters moving with them."""
    state, updates = optimizer.init(params), []
    for g in grads:
        u, state = jitted(optimizer)(g, state, params)
        params = jax.tree.map(jnp.add, params, u)
        updates.append(u)
    return updates, state, params


def first(optimizer, params, grads):
    return run(optimizer, params, [grads])[0][0]


def assert_trees_close(a, b, rtol=1e-5, atol=1e-7):
    f32 = lambda x: np.asarray(x, np.float32)
    jax.tree.map(lambda x, y: assert_allclose(f32(x), f32(y), rtol, atol), a, b)
