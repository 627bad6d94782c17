"""Linen's layers with the ternary operator put in: BitDense, BitConv, BitEmbed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .conv import conv_with_scheme
from .dot import with_scheme
from .embed import attend, take
from .leaf import is_quantized
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
        dtype = jnp.result_type(*(a.dtype if is_quantized(a) else a for a in arrays))
    x = jnp.asarray(x, dtype)
    return x, kernel, None if bias is None else jnp.asarray(bias, dtype)


class _TakesLeaves(nn.Module):
    """A Linen module whose parameters may be quantised leaves instead of float arrays."""

    def param(self, name, init_fn, *init_args, unbox=True, **init_kwargs):
        """Linen's ``param``, letting a leaf of ours stand where it would expect a float array."""
        if self.has_variable("params", name):
            value = nn.unbox(self.get_variable("params", name))
            if is_quantized(value):
                if value.shape != tuple(init_args[0]):
                    raise ValueError(
                        f"{'/'.join(self.path)}/{name}: quantised leaf of shape {value.shape}, "
                        f"but the layer's input and features need {tuple(init_args[0])}"
                    )
                return value
        return super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)


class BitDense(_TakesLeaves, nn.Dense):
    """A drop-in for `flax.linen.Dense` whose kernel acts ternary.

    y = (codes_x @ codes_w) * scale_w * scale_x + bias, see `bitnet_jax.dot_general`.

    All of Dense's arguments, parameter names, shapes, dtypes, initial values and partition
    metadata are Dense's own. The tree decides what it does: a float ``kernel`` is latent weights,
    trained through the straight-through estimator; a `PackedTernary` leaf (or any other of
    `bitnet_jax.leaf`) in its place is multiplied as it is.

    Attributes:
      scheme: how latent weights become codes and scale; None leaves them in float.

    Input (..., in), output (..., features).

    Raises:
      ValueError: if a quantised leaf has another shape than (in, features).

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
    scheme: Scheme | None = Scheme()

    def __post_init__(self):
        if self.dot_general is None and self.dot_general_cls is None:
            self.dot_general = with_scheme(self.scheme)
        super().__post_init__()


class BitDenseGeneral(_TakesLeaves, nn.DenseGeneral):
    """A drop-in for `flax.linen.DenseGeneral` whose kernel acts ternary.

    As `BitDense`, contracting ``axis`` of the input with the kernel's input axes. A packed leaf for
    it is made with `bitnet_jax.Policy` told how many axes are inputs:
    ``Policy(inputs=(("query/kernel", 1), ("out/kernel", 2)))``.

    Attributes:
      scheme: how latent weights become codes and scale; None leaves them in float.

    >>> layer, x = BitDenseGeneral((2, 4)), jnp.ones((1, 8))
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x))
    {'params': {'bias': (2, 4), 'kernel': (8, 2, 4)}}
    """

    promote_dtype: Any = promote_activations
    scheme: Scheme | None = Scheme()

    def __post_init__(self):
        if self.dot_general is None and self.dot_general_cls is None:
            self.dot_general = with_scheme(self.scheme)
        super().__post_init__()


class BitConv(_TakesLeaves, nn.Conv):
    """A drop-in for `flax.linen.Conv` whose kernel acts ternary, see `bitnet_jax.conv`.

    Attributes:
      scheme: how latent weights become codes and scale; None leaves them in float.

    Input (batch, *spatial, in), output (batch, *spatial, features).

    >>> layer, x = BitConv(4, (3, 3)), jnp.ones((1, 8, 8, 2))
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x))
    {'params': {'bias': (4,), 'kernel': (3, 3, 2, 4)}}
    """

    promote_dtype: Any = promote_activations
    scheme: Scheme | None = Scheme()

    def __post_init__(self):
        if self.conv_general_dilated is None and self.conv_general_dilated_cls is None:
            self.conv_general_dilated = conv_with_scheme(self.scheme)
        super().__post_init__()


class BitEmbed(_TakesLeaves, nn.Embed):
    """A drop-in for `flax.linen.Embed` whose table may be a quantised leaf, int8 or int4 say.

    A float table behaves as in Embed, trained and looked up in float; nothing is quantised on the
    way. Convert it with the policy formats ``"int8"`` or ``"int4"``.

    Input int (...), output (..., features); ``attend``: (..., features) to (..., num_embeddings).

    >>> import bitnet_jax
    >>> layer, ids = BitEmbed(10, 4), jnp.array([3, 1])
    >>> variables = layer.init(jax.random.key(0), ids)
    >>> small = bitnet_jax.convert(variables, bitnet_jax.Policy((("embedding", "int8"),))).tree
    >>> bool(jnp.allclose(layer.apply(small, ids), layer.apply(variables, ids), atol=0.01))
    True
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        table: Any = self.embedding
        return take(table, inputs, self.dtype) if is_quantized(table) else super().__call__(inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """Logits of every row of the table: query @ table.T."""
        table: Any = self.embedding
        return attend(query, table, self.dtype) if is_quantized(table) else super().attend(query)
