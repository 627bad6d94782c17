"""One product of activations and a matrix: ours from packed codes, XLA's and PyTorch's."""

import dataclasses
import itertools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..dot import dot_general
from ..leaf import PackedTernary
from ..packed import pack_weight
from ..quantize import quantize_weights

_LAST_FIRST = (((1,), (0,)), ((), ()))
_LAST_LAST = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Activations float32 (rows, k); the same matrix (k, n) several times, at places of its own.

    ``packed`` are as many lists as it takes to be out of the caches, each as long as ``floats``.
    """

    x: np.ndarray
    packed: list[list[PackedTernary]]
    floats: list[np.ndarray]

    @classmethod
    def make(cls, rows: int, k: int, n: int, copies: int) -> "Weights":
        """Normal values. Packed copies are 16 times smaller, so four lists for one row."""
        random = np.random.default_rng(0)
        w = random.standard_normal((k, n), dtype=np.float32)
        leaf = jax.jit(lambda w: pack_weight(quantize_weights(w)))(w)
        own = lambda: jax.tree.map(lambda a: jnp.array(a, copy=True), leaf)
        packed = [[own() for _ in range(copies)] for _ in range(4 if rows == 1 else 1)]
        x = random.standard_normal((rows, k), dtype=np.float32)
        return cls(x, packed, [w.copy() for _ in range(copies)])


def _call(product: Callable, x: jax.Array, *lists: list) -> Callable:
    """A whole list in one program, so that no dispatch is timed; the next list at the next call."""
    run, turn = jax.jit(lambda x, weights: [product(x, w) for w in weights]), itertools.cycle(lists)
    return lambda: jax.block_until_ready(run(x, next(turn)))


def ours(weights: Weights) -> Callable:
    """The layer's own product: activations to int8, packed codes, scales after."""
    product = lambda x, w: dot_general(x, w, _LAST_FIRST)
    return _call(product, jnp.asarray(weights.x), *weights.packed)


def xla(weights: Weights) -> dict[str, Callable]:
    """Products of float matrices, in both layouts."""
    x, half = jnp.asarray(weights.x), jnp.asarray(weights.x, jnp.bfloat16)
    straight = lambda x, w: lax.dot_general(x, w, _LAST_FIRST)
    turned = lambda x, w: lax.dot_general(x, w, _LAST_LAST)
    across = [jnp.asarray(w.T) for w in weights.floats]
    return {
        "XLA float32": _call(straight, x, [jnp.asarray(w) for w in weights.floats]),
        "XLA float32, (out, in)": _call(turned, x, across),
        "XLA bfloat16": _call(turned, half, [w.astype(jnp.bfloat16) for w in across]),
    }


def torch(weights: Weights) -> dict[str, Callable]:
    """`F.linear` in float32 and bfloat16, and a straightforward BitLinear's forward pass."""
    import torch
    from torch.nn import functional as F

    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    x = torch.from_numpy(weights.x)
    ws = [torch.from_numpy(w).T.contiguous() for w in weights.floats]
    halves = [w.bfloat16() for w in ws]

    def each(f: Callable, x, ws: list) -> Callable:
        def call():
            with torch.no_grad():
                return [f(x, w) for w in ws]

        return call

    return {
        "torch float32": each(F.linear, x, ws),
        "torch bfloat16": each(F.linear, x.bfloat16(), halves),
        "torch BitLinear": each(lambda x, w: F.linear(*bit_linear(x, w)), x, ws),
    }


def bit_linear(x, w):
    """What most PyTorch projects have: both rounded in float, the gradient of what was not.

    Args:
      x, w: torch tensors, activations (..., in) and weights (out, in).
    """
    scale = w.abs().mean().clamp(min=1e-5)
    codes = (w / scale).round().clamp(-1, 1) * scale
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (x * (127 / largest)).round().clamp(-128, 127) * (largest / 127)
    return x + (rounded - x).detach(), w + (codes - w).detach()
