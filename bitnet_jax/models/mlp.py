"""The Phase 4 sandbox's test model: a small multi-layer perceptron, float or ternary."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..linen import BitDense
from ..quantize import Scheme

# torch's nn.Linear draws kernels from U(-1/sqrt(in), 1/sqrt(in)), whose variance is 1 / (3 in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(key: jax.Array, shape: tuple, dtype=jnp.float32, *, inputs: int) -> jax.Array:
    """U(-1/sqrt(in), 1/sqrt(in)), as torch draws the biases too."""
    return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    h_0 = x;  h_{i+1} = relu(h_i W_i + b_i) for i < layers;  y = h_layers W_out + b_out

    The tree is the same whether the layers are `flax.linen.Dense` or `BitDense`: ``layers_0``,
    ..., ``output``, each with ``kernel`` (in, out) and ``bias`` (out,), drawn as torch draws them.

    Attributes:
      hidden: width h of every layer but the last.
      layers: number of hidden layers; the model has one linear layer more.
      classes: width of the output.
      scheme: how latent weights become ternary; None for full precision.

    Input (..., h), output (..., classes).

    >>> model, x = MLP(hidden=64, layers=2), jnp.ones((4, 64))
    >>> variables = model.init(jax.random.key(0), x)
    >>> sorted(variables["params"]), model.apply(variables, x).shape
    (['layers_0', 'layers_1', 'output'], (4, 10))
    """

    hidden: int = 128
    layers: int = 3
    classes: int = 10
    scheme: Scheme | None = Scheme("threshold", "channel")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = nn.relu(self._linear(x, self.hidden, f"layers_{i}"))
        return self._linear(x, self.classes, "output")

    def _linear(self, x: jax.Array, features: int, name: str) -> jax.Array:
        bias_init = functools.partial(_bias_init, inputs=x.shape[-1])
        shared = {"kernel_init": _kernel_init, "bias_init": bias_init, "name": name}
        if self.scheme is None:
            return nn.Dense(features, **shared)(x)
        return BitDense(features, **shared, scheme=self.scheme)(x)
