"""Small models: what int8 and int4 would cost, measured, beside the ternary result."""

import numpy as np

from .convert import convert
from .models.folder import ModelFolder
from .policy import Policy
from .quantize import Scheme
from .train.evaluate import evaluate

# The Phase 4 seed: "Minimum: 5M parameters for optimal compression. Below 5M: consider 4-bit or
# 8-bit quantization".
SMALL = 5_000_000
_SCHEMES = {"int8": Scheme("int8", "channel"), "int4": Scheme("int4", 32)}


def alternatives(source: ModelFolder, held_out: np.ndarray, policy: Policy, batch: int) -> dict:
    """Convert the float model to int8 and to int4, no training, and measure both.

    Args:
      source: the float model.
      held_out: windows (n, length + 1) to measure on.
      policy: what becomes ternary in the main job; the same leaves become integers here.
      batch: windows evaluated at once.

    Returns:
      For ``"int8"`` and ``"int4"``: ``loss``, ``accuracy`` and ``ratio`` (bytes of the float arrays
      over bytes of the converted ones).
    """
    found = {}
    for name, scheme in _SCHEMES.items():
        converted = convert(source.params, policy, scheme)
        scores = evaluate(source.config.build(scheme), converted.tree, held_out, batch)
        ratio = converted.report.bytes_before / converted.report.bytes_after
        found[name] = {k: scores[k] for k in ("loss", "accuracy")} | {"ratio": ratio}
    return found


def sentence(result: dict) -> str:
    """What the report says of a small model; empty for a large one.

    Args:
      result: the main job's, with ``parameters`` and ``alternatives``.
    """
    if not result.get("alternatives"):
        return ""
    float_accuracy = result["scores"]["float"]["accuracy"]
    told = ", ".join(
        f"{name} {100 * (x['accuracy'] / float_accuracy - 1):+.2f} % accuracy, {x['ratio']:.1f}x "
        "smaller arrays"
        for name, x in result["alternatives"].items()
    )
    return (
        f"Below 5 million parameters ({result['parameters']:,} here) int8 or int4 may serve better;"
        f" without any training: {told}. --scheme int8 or int4 makes them."
    )
