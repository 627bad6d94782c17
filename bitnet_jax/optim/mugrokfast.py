"""MuGrokfast: Grokfast's filter, Muon for the hidden matrices, AdamW for the rest."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import optax

from ..errors import BitnetError
from .grokfast import grokfast_ema, grokfast_ma
from .labels import LABELS, Axes, is_plain, labels, map_named, matrix_axes
from .muon import muon
from .trees import in_float32

PerLabel = optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule]


def mugrokfast(
    learning_rate: PerLabel,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: PerLabel = 0.1,
    filter: Literal["ema", "ma"] | None = "ema",
    alpha: optax.ScalarOrSchedule = 0.9,
    lamb: optax.ScalarOrSchedule = 0.0,
    window: int = 100,
    ste: bool = False,
    beta: float = 0.95,
    normuon: float | None = None,
    coefficients: str = "dion",
    clip: float = 1.0,
    axes: Axes | None = None,
    mu_dtype: Any = None,
    ema_dtype: Any = None,
) -> optax.GradientTransformation:
    """Clip, Grokfast, then Muon for hidden matrices and AdamW for everything else.

    w -= rate (0.2 sqrt(max(in, out)) orthogonal(momentum) + weight_decay w)

    is Muon's step on an (in, out) matrix (arXiv 2502.16982): as large as Adam's, so that one
    learning rate and weight decay serve both.

    Grokfast is off unless ``lamb`` is given, since it helped nowhere we measured. Steps to learn
    x y mod 97, median of three seeds, everything else as tuned without it
    (`benchmarks/grokking.py`):

    | model   | Muon | with Grokfast (0.9, 1) | with the paper's (0.98, 2) | AdamW, tuned |
    |---------|------|------------------------|----------------------------|--------------|
    | float   | 175  | 225                    | 400                        | 250          |
    | ternary | 225  | 300                    | 550                        | 225          |

    The gradient of a ternary layer's kernel is one with respect to its latent weights, q(x)^T g,
    by the layer's own straight-through estimator. Filter, momentum and decay therefore act on
    latent weights without being told, and no gradient is zeroed where a code is already -1 or 1:
    the estimator is the identity everywhere, as BitNet's. The "STE mode" of the code this name
    comes from copied the gradient and did nothing else; ``ste`` here decides what is filtered.

    Args:
      learning_rate: a number or a schedule; or one for each of `labels`' three, in a mapping
        {"muon": ..., "decay": ..., "plain": ...}.
      adam_learning_rate: of "decay" and "plain"; None for the same as Muon's.
      weight_decay: decoupled, times the learning rate; a number or schedule, for "muon" and
        "decay"; or a mapping of all three.
      filter: ``"ema"``, ``"ma"`` or None; see `grokfast_ema` and `grokfast_ma`.
      alpha: of `grokfast_ema`.
      lamb: of either filter; off while it is the number 0.
      window: of `grokfast_ma`.
      ste: filter only the kernels labelled "muon", the large ones that become ternary, whose
        straight-through gradient is the noisy one; embeddings, heads and norms stay as they are,
        and cost no memory.
      beta: decay of Muon's momentum (Nesterov).
      normuon: decay of NorMuon's mean square, see `bitnet_jax.optim.muon`; None for plain Muon.
      coefficients: of Newton-Schulz, see `orthogonalise`.
      clip: largest global norm of the gradient; infinity for none.
      axes: of kernels that are no plain matrix, see `labels`.
      mu_dtype: dtype Muon's and Adam's momentum is kept in; None for float32 at least.
      ema_dtype: the same of the filter's average or window.

    Returns:
      An optax transformation. Its arithmetic is float32 at least, whatever the parameters are;
      its updates have the gradient's dtype. ``init`` raises `BitnetError` as `labels` does.

    Raises:
      BitnetError: for an unknown filter or coefficients, or a mapping without the three labels.

    >>> import jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((16, 64))}}
    >>> optimizer = mugrokfast(1.0, weight_decay=0.0)
    >>> grads = {"up": {"kernel": jnp.eye(16, 64)}}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> round(float(updates["up"]["kernel"][0, 0]), 1)  # -0.2 sqrt(64) eye
    -1.6
    """
    hidden = lambda tree: map_named(lambda name, x: matrix_axes(name, x, axes or {}), tree)
    rate = _per_label("learning_rate", learning_rate, adam_learning_rate, adam_learning_rate)
    decay = _per_label("weight_decay", weight_decay, None, 0.0)
    direction: dict[str, optax.GradientTransformation] = {
        "muon": muon(
            hidden, beta=beta, normuon=normuon, coefficients=coefficients, mu_dtype=mu_dtype
        ),
        "decay": _adam(mu_dtype),
        "plain": _adam(mu_dtype),
    }
    parts: dict[Hashable, optax.GradientTransformation] = {
        label: _stepped(direction[label], rate[label], decay[label]) for label in LABELS
    }
    where = lambda tree: labels(tree, axes)
    slow = _filter(filter, alpha, lamb, window, ema_dtype)
    if ste:
        chosen = lambda tree: map_named(lambda _, label: label == "muon", where(tree))
        slow = optax.masked(slow, chosen)
    return in_float32(
        optax.chain(optax.clip_by_global_norm(clip), slow, optax.partition(parts, where))
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    clip: float = 1.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """AdamW on every leaf, decaying what `mugrokfast` decays: its baseline.

    w -= rate (m / (sqrt(v) + 1e-8) + weight_decay w)

    Arguments, dtypes and clipping are `mugrokfast`'s; kernels may have any number of axes.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> optimizer = adamw(0.1, weight_decay=0.5)
    >>> updates, _ = optimizer.update(
    ...     jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    >>> updates["up"]["kernel"][0].tolist(), (updates["up"]["bias"] == 0).all().item()
    ([-0.05000000074505806, -0.05000000074505806], True)
    """
    decays = lambda params: map_named(lambda name, x: not is_plain(name, x), params)
    rule = _stepped(_adam(mu_dtype), learning_rate, weight_decay, decays)
    return in_float32(optax.chain(optax.clip_by_global_norm(clip), rule))


def _adam(mu_dtype: Any) -> optax.GradientTransformation:
    """b2 = 0.95, as language models are trained: 0.999 remembers longer than short runs last."""
    return optax.scale_by_adam(b1=0.9, b2=0.95, mu_dtype=mu_dtype)


def _stepped(direction, rate, decay, mask: Any = None) -> optax.GradientTransformation:
    """-rate (direction + decay w)."""
    decayed = optax.add_decayed_weights(decay, mask)
    return optax.chain(direction, decayed, optax.scale_by_learning_rate(rate))


def _filter(filter, alpha, lamb: Any, window, dtype) -> optax.GradientTransformation:
    if filter not in ("ema", "ma", None):
        raise BitnetError(f"filter {filter!r}: expected 'ema', 'ma' or None")
    if filter is None or (isinstance(lamb, int | float) and lamb == 0):
        return optax.identity()
    if filter == "ema":
        return grokfast_ema(alpha, lamb, dtype)
    return grokfast_ma(window, lamb, window_dtype=dtype)


def _per_label(name: str, value: PerLabel, decay: Any, plain: Any) -> Mapping[str, Any]:
    """A value for each label; ``decay`` and ``plain``, where given, go before a single value."""
    if isinstance(value, Mapping):
        if set(value) != set(LABELS):
            raise BitnetError(
                f"{name}: a mapping with {', '.join(map(str, value)) or 'nothing'}; it needs "
                f"exactly {', '.join(LABELS)}"
            )
        return value
    return {
        "muon": value,
        "decay": value if decay is None else decay,
        "plain": value if plain is None else plain,
    }
