"""Sub-norms for a decoder trained without them, with the scales that change it least."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from .errors import BitnetError
from .models.decoder import ACTIVATIONS, DecoderConfig
from .models.folder import ModelFolder
from .train.agreement import agreement
from .train.evaluate import evaluate

Tree = Any


def insert_sub_norms(
    source: ModelFolder, tokens: np.ndarray, *, batch: int = 8, console: Console | None = None
) -> ModelFolder:
    """A float decoder with an RMSNorm before each output projection, as BitNet has them.

    y -> g y / r,  r = sqrt(mean(y^2) + eps) of each token,  g = sum(|y|^2 / r) / sum(|y|^2 / r^2)

    **The function changes**: a norm makes all tokens equally long, and no scale undoes that. g
    is the one number that changes the norm's input least over the tokens given, the zero of the
    derivative of sum |g y / r - y|^2 by g; with eps = 0 it is the mean of r. Norms go in from
    below, attention before MLP, and each y is that of the model as changed so far. What is left
    is for training to take back, and how much that is `change` says; measure it on other text
    than ``tokens``.

    One number for each norm and not one for each feature: a feature that only a few calibration
    tokens use would get their r for its own, and on held-out text of small decoders that we
    trained, scales a feature were as near with SwiGLU and further off with squared ReLU.

    Args:
      source: a float `Decoder` without sub-norms.
      tokens: int windows (n, length + 1) of text to calibrate on; a few thousand tokens will do.
      batch: windows evaluated at once; changes g in its last digits only. The text is run twice
        for each layer.
      console: where to say what the change is on ``tokens``, too kind a figure; None for silence.

    Returns:
      A model folder with ``config.sub_norms``, the same arrays and, new, float32 scales under
      ``attention/sub_norm`` and ``mlp/sub_norm`` of each layer, constant vectors of g. ``source``
      stays as it is.

    Raises:
      BitnetError: if the source is no float decoder, has sub-norms already, or there is no text.

    >>> from bitnet_jax.models.decoder import DecoderConfig
    >>> config, tokens = DecoderConfig(vocab_size=8, layers=1), np.arange(6)[None]
    >>> params = config.build(None).init(jax.random.key(0), tokens)
    >>> source = ModelFolder(config, None, params, tokenizer=None)
    >>> changed = insert_sub_norms(source, tokens)
    >>> changed.config.sub_norms, changed.params["params"]["layer_0"]["mlp"]["sub_norm"].keys()
    (True, dict_keys(['scale']))
    """
    config = _check(source, tokens)
    changed = dataclasses.replace(source, config=dataclasses.replace(config, sub_norms=True))
    sites = [(f"layer_{i}", part) for i in range(config.layers) for part in ("attention", "mlp")]
    widths = {"attention": config.heads * config.head_dim, "mlp": config.hidden}
    params = source.params
    for site in sites:  # all scales are there from the start, since the module asks for them
        params = _with_scale(params, site, jnp.ones(widths[site[1]]))
    for site in sites:
        g = _least_change(changed.model, params, tokens, batch, site)
        params = _with_scale(params, site, jnp.full(widths[site[1]], g, jnp.float32))
    changed = dataclasses.replace(changed, params=params)
    if console is not None:
        found = change(source, changed, tokens, batch)
        console.print(
            f"sub-norms: loss {found['loss_before']:.4f} -> {found['loss_after']:.4f}, the same "
            f"likeliest token at {100 * found['top1']:.2f} % of positions, KL {found['kl']:.4f}"
        )
    return changed


def change(
    before: ModelFolder, after: ModelFolder, tokens: np.ndarray, batch: int = 8
) -> dict[str, float]:
    """How far a changed model is from what it was.

    Args:
      before, after: models of the same vocabulary.
      tokens: int windows (n, length + 1), best of text that neither was fitted to.
      batch: windows evaluated at once.

    Returns:
      ``top1`` and ``kl`` of `bitnet_jax.train.agreement.agreement`` with the model before, and
      ``loss_before`` and ``loss_after``, in nats a token.
    """
    same = agreement(after.model, after.params, before.model, before.params, tokens, batch)
    losses = (evaluate(m.model, m.params, tokens, batch)["loss"] for m in (before, after))
    return {**same, **dict(zip(("loss_before", "loss_after"), losses, strict=True))}


def _check(source: ModelFolder, tokens: np.ndarray) -> DecoderConfig:
    if not isinstance(source.config, DecoderConfig):
        raise BitnetError("sub-norms: only a Decoder has a place for them, not a network of yours")
    if source.scheme is not None:
        raise BitnetError("sub-norms: this model is ternary already; insert them before converting")
    if source.config.sub_norms:
        raise BitnetError("sub-norms: this model has them already")
    if np.ndim(tokens) != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise BitnetError("sub-norms: no text to calibrate on; give one window or more")
    return source.config


def _with_scale(params: Tree, site: tuple[str, str], scale: jax.Array) -> Tree:
    """The variables with one norm's scale set, everything else shared."""
    layer, part = site
    tree = params["params"]
    inner = {**tree[layer][part], "sub_norm": {"scale": scale}}
    return {**params, "params": {**tree, layer: {**tree[layer], part: inner}}}


def _least_change(
    model: nn.Module, params: Tree, tokens: np.ndarray, batch: int, site: tuple[str, str]
) -> float:
    """g of one norm, 1 where there is nothing to measure."""
    parts = [tokens[i : i + batch, :-1] for i in range(0, len(tokens), batch)]
    above, below = np.sum([jax.device_get(_sums(model, params, x))[site] for x in parts], axis=0)
    return above / below if below > 0 else 1.0


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Tree, tokens: jax.Array) -> dict:
    """Numerator and denominator of g for every norm, were it the next; one program for all."""
    shown = model.apply(params, tokens, mutable=[ACTIVATIONS])[1][ACTIVATIONS]
    eps = model.config.norm_eps
    return {
        (layer, part): jnp.stack(moments(values["mixed"][0], eps))
        for layer, parts in shown.items()
        for part, values in parts.items()
    }


def moments(y: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """sum(|y|^2 / r) and sum(|y|^2 / r^2) over tokens, r = sqrt(mean(y^2) + eps); float32.

    Args:
      y: (..., features) of any float dtype.
      eps: of the norm.

    >>> [float(x) for x in moments(jnp.array([[2.0, 2.0], [6.0, 6.0]]), 0.0)]  # r is 2 and 6
    [16.0, 4.0]
    """
    square = jnp.square(y.astype(jnp.float32))
    total, r = square.sum(-1), jnp.sqrt(square.mean(-1) + eps)
    return (total / r).sum(), (total / r**2).sum()
