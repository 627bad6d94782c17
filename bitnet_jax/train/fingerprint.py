"""What decides the result of a training, in a few numbers: whether two calls are the same one."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checkpoint


def fingerprint(
    settings: dict, data: np.ndarray, held_out: np.ndarray | None, trees: dict, program: str
) -> dict:
    """What decides the result of a training, as plain data to compare.

    Args:
      settings: plain numbers and names.
      data, held_out: windows of tokens.
      trees: the arrays given besides, by name: the first parameters, those inside the loss.
      program: the lowered step, which holds model, loss and optimizer, schedules included.

    >>> rows = np.zeros((2, 3), np.int32)
    >>> sorted(fingerprint({"seed": 0}, rows, None, {"parameters": rows}, "program"))
    ['data', 'held-out data', 'jax', 'parameters', 'program', 'seed']
    """
    crcs = lambda tree: [checkpoint.crc32(plain(x)) for x in jax.tree.leaves(tree)]
    sums = {name: zlib.crc32(json.dumps(crcs(tree)).encode()) for name, tree in trees.items()}
    return {
        **settings,
        "data": checkpoint.crc32(data),
        "held-out data": None if held_out is None else checkpoint.crc32(held_out),
        **sums,
        # Another version compiles another program; told apart, the message names the cause.
        "jax": f"{jax.__version__} on {jax.default_backend()}",
        "program": zlib.crc32(program.encode()),
    }


# What is told as changed, because its checksum says nothing, and in which words.
_SUMS = {
    "data": "data",
    "held-out data": "held-out data",
    "parameters": "initial parameters",
    "loss": "arrays in the loss",
    "program": "model, loss or optimizer",
}


def differences(then: dict, now: dict) -> str:
    """How two fingerprints differ, in words.

    >>> differences({"epochs": 3, "data": 1}, {"epochs": 4, "data": 2})
    'epochs was 3, is 4, data changed'
    """
    found = [k for k in {**now, **then} if then.get(k) != now.get(k)]
    # Settings change the program too: its own name is told only when it is the only one.
    if len(found) > 1 and "program" in found:
        found.remove("program")
    return ", ".join(
        f"{_SUMS[k]} changed" if k in _SUMS else f"{k} was {then.get(k)}, is {now.get(k)}"
        for k in found
    )


def is_key(x: Any) -> bool:
    """Whether an array holds JAX's typed random keys, which no file can."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def plain(x: Any) -> np.ndarray:
    """An array as numpy holds it, a random key as its bits."""
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)
