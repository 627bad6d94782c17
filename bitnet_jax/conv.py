"""``conv_general_dilated``: the ternary convolution, for every layer that takes one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .leaf import Packed, Prequantized, Quantized, is_quantized
from .packed import unpack_weight
from .quantize import Scheme, dequantize, quantize_activations, quantize_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, latent: jax.Array | None, weight: Quantized, conv: Callable):
    """Convolve x (batch, ..., in) with the weight; ``latent`` only receives a gradient."""
    return _product_fwd(x, latent, weight, conv)[0]


def _product_fwd(x, latent, weight, conv):
    codes, scale = _quantize_samples(x)
    if weight.group:  # scales that differ within a sum cannot come after it
        out = conv(codes, dequantize(weight))
    else:
        # Codes are exact in float32, and so are their sums while below 2 ** 24.
        out = conv(codes, weight.codes.astype(jnp.float32).reshape(weight.shape)) * weight.scale[0]
    return out * scale, (codes, scale, weight, None if latent is None else ())


def _product_bwd(conv, residuals, g):
    """The gradients of the same convolution at the quantised values: straight through."""
    codes, scale, weight, trained = residuals
    _, pull = jax.vjp(conv, codes * scale, dequantize(weight))
    dx, dw = pull(g)
    return dx, None if trained is None else dw, None


_product.defvjp(_product_fwd, _product_bwd)


def _quantize_samples(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 codes as float32, and one scale a sample: neighbouring outputs share their inputs."""
    codes, scale = quantize_activations(x.reshape(x.shape[0], -1))
    ones = (1,) * (x.ndim - 1)
    return codes.astype(jnp.float32).reshape(x.shape), scale.reshape(-1, *ones)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: Any,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    *,
    scheme: Scheme | None = Scheme(),
    **more,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with a ternary kernel and int8 activations.

    q(x) = codes_x * scale_x (one scale a sample), q(w) = codes_w * scale_w (as the scheme says)
    out  = conv(codes_x, codes_w) * scale_w * scale_x, gradients straight through

    Put it into a Flax layer: ``nn.Conv(8, (3, 3), conv_general_dilated=...)``; `BitConv` does.

    Args:
      lhs: activations (batch, *spatial, in), as Flax lays them out.
      rhs: latent kernel (*spatial, in / groups, out), quantised here as the matrix of all its
        inputs by its outputs; or a quantised leaf of that shape, made with
        ``Policy(inputs=(("conv", 3),))`` for two spatial axes.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        precision, preferred_element_type: as in `jax.lax.conv_general_dilated`.
      scheme: how a latent kernel is quantised; None to convolve in float.

    Returns:
      (batch, *spatial, out), in lhs's dtype or ``preferred_element_type``.

    Raises:
      ValueError: if the batch axis of lhs is not its first, or the kernel's outputs not its last.

    >>> x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    >>> y = conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    >>> y.shape, round(float(y[0, 0, 0, 0]), 4)
    ((1, 2, 2, 1), 18.0)
    """
    options = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers),
        "feature_group_count": feature_group_count,
        "precision": precision,
        **more,
    }
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    if scheme is None and not is_quantized(rhs):
        return lax.conv_general_dilated(lhs, rhs.astype(lhs.dtype), **options).astype(dtype)
    numbers = options["dimension_numbers"]
    if numbers.lhs_spec[0] != 0 or numbers.rhs_spec[0] != len(rhs.shape) - 1:
        raise ValueError("expected lhs (batch, *spatial, in) and a kernel (*spatial, in, out)")
    conv = lambda x, w: lax.conv_general_dilated(x, w, **options)
    latent, weight = _kernel(rhs, scheme or Scheme())
    return jnp.asarray(_product(lhs.astype(jnp.float32), latent, weight, conv)).astype(dtype)


def _kernel(rhs: Any, scheme: Scheme) -> tuple[jax.Array | None, Quantized]:
    """(latent kernel or None, quantised kernel) of whatever stands on the right."""
    if isinstance(rhs, Prequantized):
        return rhs.latent.astype(jnp.float32), rhs.weight
    if isinstance(rhs, Quantized | Packed):
        return None, (unpack_weight(rhs) if isinstance(rhs, Packed) else rhs)
    latent = rhs.astype(jnp.float32)
    return latent, quantize_kernel(lax.stop_gradient(latent), scheme, rhs.ndim - 1)


@functools.cache
def conv_with_scheme(scheme: Scheme | None) -> Callable[..., jax.Array]:
    """`conv_general_dilated` bound to a scheme; one object for each, as `with_scheme`."""
    return functools.partial(conv_general_dilated, scheme=scheme)
