"""Settings for the phases of the Agent Forge pipeline, with a reason for each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import optax

from ..errors import BitnetError
from .mugrokfast import mugrokfast

PRESETS: Mapping[int, Mapping[str, Any]] = MappingProxyType(
    {
        1: {"learning_rate": 8e-3, "weight_decay": 0.1},
        3: {"learning_rate": 2e-4, "weight_decay": 0.0, "clip": 0.5},
        4: {"learning_rate": 1.5e-3, "weight_decay": 0.1},
        5: {"learning_rate": 1e-3, "weight_decay": 0.1, "ste": True},
        6: {"learning_rate": 1e-4, "weight_decay": 0.0},
        7: {"learning_rate": 2e-4, "weight_decay": 0.0, "clip": 0.5},
    }
)


def preset(phase: int, **changes: Any) -> optax.GradientTransformation:
    """`mugrokfast` as a phase of the pipeline starts it; any of its arguments may be changed.

    optimizer = mugrokfast(**(PRESETS[phase] | changes))

    | phase                 | rate: reference, ours | lambda: reference, ours | why ours          |
    |-----------------------|-----------------------|-------------------------|-------------------|
    | 1 pretraining         | 1e-3, 8e-3            | 0.3, off                | peak of the demo  |
    | 3 reasoning (RL)      | 5e-4, 2e-4, clip 0.5  | 0.1, off                | noisy gradients   |
    | 4 ternary fine-tuning | none, 1.5e-3          | none, off               | docs/results.md   |
    | 5 ternary curriculum  | 1e-3, 1e-3            | 2.0, off; ste           | trained at length |
    | 6 tools and persona   | 1e-4, 1e-4            | 0.2, off                | bends it a little |
    | 7 experts             | 5e-4, 2e-4, clip 0.5  | 0.15, off               | as 3              |

    The reference is the-agent-maker's ``from_phase``; it has no phase 4 and raises for it. Its
    rates and lambdas carry no evidence for this optimizer: its filter, g + lambda (g - ema), has
    the opposite sign and amplifies the fast part; its matrices are not orthogonalised, so that
    a rate means another step; its weight decay was never applied. The filter as published made
    Muon slower in our runs, at phase 5's alpha 0.98 and lambda 2 by more than twice (see
    `mugrokfast`), so it is off; under ``ste`` it stays off the other leaves if you give a ``lamb``.
    Only 1 and 4 rest on measured runs; 3, 5, 6 and 7 are starting points.

    Weight decay is 0.1 where weights are trained at length, and 0 where a trained model is only
    bent a little. Not here: the reference's ``kl_coefficient`` (phases 3 and 7) is a term of the
    loss, which an optimizer never sees: add it there. Its ``qk_clip_threshold`` (25 to 30) was
    only counted: `qk_clip` is the real one, chained behind, since it needs the logits. Its
    schedules are yours to pass as ``learning_rate``.

    Args:
      phase: 1, 3, 4, 5, 6 or 7. Phases 2 and 8 do not train by gradients.
      changes: arguments of `mugrokfast` that replace the preset's.

    Returns:
      An optax transformation.

    Raises:
      BitnetError: for another phase, or an argument `mugrokfast` does not have.

    >>> import jax.numpy as jnp
    >>> optimizer = preset(4, learning_rate=optax.cosine_decay_schedule(1.5e-3, 1000))
    >>> params = {"up": {"kernel": jnp.ones((16, 16))}}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["up"]["kernel"].shape
    (16, 16)
    """
    if phase not in PRESETS:
        known = ", ".join(map(str, PRESETS))
        raise BitnetError(f"phase {phase!r} has no preset; there are {known}")
    try:
        return mugrokfast(**{**PRESETS[phase], **changes})
    except TypeError as e:
        raise BitnetError(f"preset: {e}") from None
