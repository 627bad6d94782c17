"""Grokfast's two filters (arXiv 2405.20233): amplify the part of the gradient that stays."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import BitnetError
from .trees import Tree, at, like, wide


class GrokfastState(NamedTuple):
    """Steps taken, and the running average of the gradients."""

    count: jax.Array
    ema: Tree


class GrokfastWindowState(NamedTuple):
    """Steps taken, and the last gradients: every leaf (window, ...), oldest overwritten first."""

    count: jax.Array
    window: Tree


def grokfast_ema(
    alpha: optax.ScalarOrSchedule = 0.9,
    lamb: optax.ScalarOrSchedule = 1.0,
    ema_dtype: Any = None,
) -> optax.GradientTransformation:
    """Amplify the slow part of the gradient (Grokfast-EMA, arXiv 2405.20233).

    ema_1 = g_1,  ema_t = alpha ema_(t-1) + (1 - alpha) g_t,  out_t = g_t + lamb ema_t

    Args:
      alpha: decay of the average, a number or a schedule; the paper's runs use 0.98.
      lamb: weight of the average, a number or a schedule; the paper's runs use 2.
      ema_dtype: dtype the average is kept in between steps; None for the parameter's own. With
        bfloat16, an alpha of 0.99 or more adds less than half a unit in the last place: the
        average then stands still.

    Returns:
      An optax transformation, values equal to the published ``gradfilter_ema``; its arithmetic is
      in float32 at least, its updates have the gradient's dtype.

    >>> slow = grokfast_ema(alpha=0.5, lamb=2.0)
    >>> state = slow.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0):
    ...     out, state = slow.update(jnp.array([g]), state)
    ...     out.tolist()
    [3.0]
    [7.0]
    """

    def init(params):
        ema = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=ema_dtype), params)
        return GrokfastState(jnp.zeros((), jnp.int32), ema)

    def update(updates, state, params=None):
        del params
        keep = jnp.where(state.count == 0, 0.0, at(alpha, state.count))
        weight = at(lamb, state.count)
        grads, old = wide(updates), wide(state.ema)
        ema = jax.tree.map(lambda e, g: keep * e + (1 - keep) * g, old, grads)
        out = jax.tree.map(lambda g, e: g + weight * e, grads, ema)
        state = GrokfastState(state.count + 1, like(ema, state.ema))
        return like(out, updates), state

    return optax.GradientTransformation(init, update)


def grokfast_ma(
    window: int = 100,
    lamb: optax.ScalarOrSchedule = 5.0,
    filter: Literal["mean", "sum"] = "mean",
    warmup: bool = True,
    trigger: bool | Callable[[jax.Array], Any] = False,
    window_dtype: Any = None,
) -> optax.GradientTransformation:
    """Amplify what the last gradients have in common (Grokfast-MA, arXiv 2405.20233).

    out_t = g_t + lamb mean(g_(t-window+1) ... g_t)

    when (not warmup) or (the window is full and not trigger); else out_t = g_t. The window holds
    ``window`` copies of the gradients: for small models only; `grokfast_ema` holds one.

    Args:
      window: how many gradients, this one among them.
      lamb: weight of the mean or sum, a number or a schedule; the paper's runs use 5.
      filter: ``"mean"`` or ``"sum"`` of the window.
      warmup: wait until the window is full. Without it, what there is gets averaged.
      trigger: switches the filter off, a bool or a function of the step (from 0). It does nothing
        without ``warmup``, as published.
      window_dtype: dtype the gradients are kept in; None for the parameter's own.

    Returns:
      An optax transformation, values equal to the published ``gradfilter_ma``; its arithmetic is
      in float32 at least, its updates have the gradient's dtype.

    Raises:
      BitnetError: for a window below 1 or an unknown filter.

    >>> common = grokfast_ma(window=2, lamb=2.0)
    >>> state = common.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 5.0):
    ...     out, state = common.update(jnp.array([g]), state)
    ...     out.tolist()
    [1.0]
    [7.0]
    [13.0]
    """
    if filter not in ("mean", "sum") or window < 1:
        raise BitnetError(
            f"grokfast_ma: window {window}, filter {filter!r}; take 1 or more, 'mean' or 'sum'"
        )

    def init(params):
        zeros = lambda p: jnp.zeros((window, *p.shape), window_dtype or p.dtype)
        return GrokfastWindowState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(updates, state, params=None):
        del params
        count, slot = state.count, state.count % window
        put = lambda kept, g: kept.at[slot].set(g.astype(kept.dtype))
        kept = jax.tree.map(put, state.window, updates)
        full = count + 1 >= window
        on = jnp.logical_or(not warmup, full & jnp.logical_not(at(trigger, count)))
        weight = jnp.where(on, at(lamb, count), 0.0)
        if filter == "mean":
            weight = weight / jnp.minimum(count + 1, window)
        # Slots not yet filled are zeros, so that the sum is right from the start.
        out = jax.tree.map(lambda g, k: g + weight * k.sum(0), wide(updates), wide(kept))
        return like(out, updates), GrokfastWindowState(count + 1, kept)

    return optax.GradientTransformation(init, update)
