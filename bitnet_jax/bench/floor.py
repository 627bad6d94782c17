"""What the machine could do: the fastest reading of memory and the fastest products known here."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIZE = 2048  # of the square products
_BYTES = 256 << 20  # read at once: more than caches hold


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading() -> dict[str, tuple[Callable, float]]:
    """Read bandwidth: the maximum of many integers, by numpy on every core, or on the device."""
    whole = np.zeros(_BYTES // 4, np.int32)
    if jax.default_backend() == "cpu":
        pool, parts = ThreadPoolExecutor(threads()), np.array_split(whole, threads())
        call = lambda: list(pool.map(np.max, parts))
    else:
        there, largest = jax.device_put(whole), jax.jit(jnp.max)
        call = lambda: jax.block_until_ready(largest(there))
    return {"read bandwidth": (call, float(_BYTES))}


def products() -> dict[str, tuple[Callable, float]]:
    """Matrix peaks: XLA's square products of float32, bfloat16 and int8."""
    found = {}
    dims = (((1,), (1,)), ((), ()))  # both contract their last axis, the layout int8 units want
    for dtype, out in (("float32", "float32"), ("bfloat16", "float32"), ("int8", "int32")):
        x = jnp.ones((_SIZE, _SIZE), dtype)
        product = jax.jit(
            lambda x, out=out: lax.dot_general(x, x, dims, preferred_element_type=out)
        )
        call = lambda product=product, x=x: jax.block_until_ready(product(x))
        found[f"matrix peak, {dtype}"] = (call, 2.0 * _SIZE**3)
    return found
