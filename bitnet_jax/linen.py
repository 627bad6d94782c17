"""``BitDense``: Linen's Dense with the ternary operator put in."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .dot import with_scheme
from .packed import is_ternary
from .quantize import Scheme


def promote_activations(x: jax.Array, kernel: Any, bias: Any, *, dtype: Any = None):
    """Flax's dtype promotion for inputs and bias, leaving the kernel as it is.

    The kernel still takes part in choosing the dtype, but is not cast: codes and scale come from
    the latent weights in their own precision, so the ternary weight does not depend on ``dtype``.

    Returns:
      (x, kernel, bias) with x and bias in ``dtype``, or in the common dtype of all three.
    """
    if dtype is None:
        arrays = [a for a in (x, kernel, bias) if a is not None]
        dtype = jnp.result_type(*(a.dtype if is_ternary(a) else a for a in arrays))
    x = jnp.asarray(x, dtype)
    return x, kernel, None if bias is None else jnp.asarray(bias, dtype)


class BitDense(nn.Dense):
    """A drop-in for `flax.linen.Dense` whose kernel acts ternary.

    y = (codes_x @ codes_w) * scale_w * scale_x + bias, see `bitnet_jax.dot_general`.

    All of Dense's arguments, parameter names, shapes, dtypes, initial values and partition
    metadata are Dense's own. The tree decides what it does: a float ``kernel`` is latent weights,
    trained through the straight-through estimator; a `PackedTernary` (or `Ternary`) leaf in its
    place is multiplied as it is.

    Attributes:
      scheme: how latent weights become codes and scale.

    Input (..., in), output (..., features).

    Raises:
      ValueError: if a ternary leaf has another shape than (in, features).

    >>> import bitnet_jax
    >>> layer, x = BitDense(4), jnp.ones((1, 8))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (4,), 'kernel': (8, 4)}}
    >>> packed = bitnet_jax.convert(variables).tree
    >>> bool((layer.apply(packed, x) == layer.apply(variables, x)).all())
    True
    """

    promote_dtype: Any = promote_activations
    scheme: Scheme = Scheme()

    def __post_init__(self):
        if self.dot_general is None and self.dot_general_cls is None:
            self.dot_general = with_scheme(self.scheme)
        super().__post_init__()

    def param(self, name, init_fn, *init_args, unbox=True, **init_kwargs):
        """Linen's ``param``, letting a ternary leaf stand where it would expect a float array."""
        if self.has_variable("params", name):
            value = nn.unbox(self.get_variable("params", name))
            if is_ternary(value):
                if value.shape != tuple(init_args[0]):
                    raise ValueError(
                        f"{'/'.join(self.path)}/{name}: ternary leaf of shape {value.shape}, "
                        f"but the layer's input and features need {tuple(init_args[0])}"
                    )
                return value
        return super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
