"""Sub-norms put into a trained decoder: RMSNorm before the two output projections of a block."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import BitnetError
from .decoder import DecoderConfig
from .folder import ModelFolder

_NAME = "sub_norm"


def insert_sub_norms(source: ModelFolder, tokens: np.ndarray) -> ModelFolder:
    """The same weights with ``sub_norms``, each norm scaled so that outputs stay about as large.

    y -> g y / rms(y),  g = mean over tokens of rms(y) = argmin sum |g y / rms(y) - y|^2

    **This changes the function.** A norm divides every token by its own size, and no scale undoes
    that for all of them; g keeps the outputs closest on these tokens, layer by layer from below.
    What is lost is for training to bring back: measure it (`bitnet_jax.train.agreement`). Norms
    there are what BitNet b1.58 2B4T has, and where BitDistill puts them before fine-tuning.

    Args:
      source: a float `Decoder` without sub-norms.
      tokens: int (n, length), some text of the kind it will see.

    Returns:
      The folder of the new model; the other weights are the same arrays.

    Raises:
      BitnetError: if the model is no decoder, or has sub-norms already.
    """
    if not isinstance(source.config, DecoderConfig):
        raise BitnetError("sub-norms: only a Decoder has a place for them")
    if source.config.sub_norms:
        raise BitnetError("sub-norms: the model has them already")
    config = dataclasses.replace(source.config, sub_norms=True)
    sizes = jax.jit(lambda p: _sizes(config.build(None), p, tokens))(source.params)
    layers = dict(source.params["params"])
    for (layer, part), size in sizes.items():
        width = config.width if part == "attention" else config.hidden
        norm = {_NAME: {"scale": jnp.full((width,), size)}}
        layers[layer] = {**layers[layer], part: {**layers[layer][part], **norm}}
    return dataclasses.replace(source, config=config, params={"params": layers})


def _sizes(model: nn.Module, params: Any, tokens: np.ndarray) -> dict:
    """g of every sub-norm, by (layer, part), each measured behind those below it."""
    found = {}

    def meet(next_function, args, kwargs, context):
        if context.module.name != _NAME:
            return next_function(*args, **kwargs)
        y = args[0].astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + context.module.epsilon)
        found[context.module.path[:2]] = size.mean()
        return (size.mean() * y / size).astype(args[0].dtype)

    with nn.intercept_methods(meet):
        model.apply(params, tokens)
    return found
