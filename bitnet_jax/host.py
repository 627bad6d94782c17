"""A look at values from Python, without a program compiled for every shape.

To JAX each operation on each shape is a program, and to compile one takes a tenth of a second on a
CPU, whatever it does. What is only looked at once, numpy can read where it lies.
"""

import jax
import numpy as np


def host_view(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """``x`` as numpy if it lies in this machine's memory, not copied; as it is on a device.

    Both have the same operations, so `x.__array_namespace__()` serves either.

    >>> import jax.numpy as jnp
    >>> x = host_view(jnp.ones(3))
    >>> xp = x.__array_namespace__()
    >>> bool(xp.isfinite(x).all())
    True
    """
    if not (isinstance(x, jax.Array) and x.is_fully_addressable):
        return x
    here = all(device.platform == "cpu" for device in x.devices())
    return np.asarray(x) if here else x


def all_finite(x: jax.Array | np.ndarray) -> bool:
    """Whether no value is NaN or infinite.

    >>> all_finite(np.array([1.0, np.inf]))
    False
    """
    x = host_view(x)
    return bool(x.__array_namespace__().isfinite(x).all())


def largest(x: jax.Array | np.ndarray) -> float:
    """The largest absolute value, 0 of nothing.

    >>> largest(np.array([1.0, -2.5])), largest(np.zeros((0, 3)))
    (2.5, 0.0)
    """
    x = host_view(x)
    return float(abs(x).max(initial=0))
