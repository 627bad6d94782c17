"""Which leaves become ternary, and what format the others are kept in."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from .host import largest
from .quantize import Scheme

FLOATS = ("float32", "float16", "bfloat16")
FORMATS = ("ternary", "ternary-stack", "int8", "int4", *FLOATS)
# One scale for 32 inputs keeps an outlier among 4-bit weights from flattening a whole column.
_INT4_GROUP = 32

# What the Phase 4 seed asks for: embeddings, head, norms and biases stay in float16, attention and
# MLP matrices become ternary. In Flax a matrix that multiplies is always called `kernel`.
DEFAULT_RULES = (
    (r"(^|/)(\w*embed\w*|wte|wpe)(/|$)", "float16"),
    (r"(^|/)(lm_)?head(/|$)", "float16"),
    (r"(^|/)(\w*norm\w*|ln\w*)(/|$)", "float16"),
    (r"(^|/)(bias|scale)$", "float16"),
    (r"(^|/)kernel$", "ternary"),
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which leaves become ternary, and what format the others are kept in.

    Args:
      rules: pairs (pattern, format), tried in order on the leaf's path (``layer_0/mlp/up/kernel``)
        with `re.search`; the first that matches decides. Formats: ``"ternary"`` for a matrix
        (in, out); ``"ternary-stack"`` for matrices (..., in, out) stacked by scan; ``"int8"`` (one
        scale an output) and ``"int4"`` (one for 32 inputs of an output), with one scale a row
        for embedding tables; or the float dtype to keep, ``"float32"``, ``"float16"``,
        ``"bfloat16"``.
      inputs: pairs (pattern, number of leading axes that are inputs), for kernels with more than
        two axes: 1 for an attention's query (in, heads, head_dim), 2 for its out (heads, head_dim,
        out). Their axes look like a stack's, so they are not guessed.

    A leaf that no rule matches is kept unchanged; if it has two axes or more it is listed in
    `Report.unmatched`, so that no matrix stays large without a word.

    Raises:
      ValueError: for an unknown format or a pattern that is no regular expression.

    >>> Policy().format_of("layer_0/attention/query/kernel"), Policy().format_of("embed/embedding")
    ('ternary', 'float16')
    >>> Policy((("mlp/.*kernel", "ternary"),)).format_of("head/kernel") is None
    True
    """

    rules: tuple[tuple[str, str], ...] = DEFAULT_RULES
    inputs: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        for pattern, format in self.rules:
            if format not in FORMATS:
                raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
            _check_pattern(pattern)
        for pattern, count in self.inputs:
            if not count > 0:
                raise ValueError(f"inputs of {pattern!r}: expected 1 or more axes, got {count}")
            _check_pattern(pattern)

    def format_of(self, path: str) -> str | None:
        """The format the first matching rule gives this path, or None."""
        return next((f for pattern, f in self.rules if re.search(pattern, path)), None)

    def inputs_of(self, path: str, ndim: int) -> int | None:
        """How many leading axes of a kernel are inputs, None if that is not known."""
        known = (n for pattern, n in self.inputs if re.search(pattern, path))
        return next(known, 1 if ndim == 2 else None)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"pattern {pattern!r}: {e}") from None


def place(path: str, x: jax.Array, policy: Policy) -> tuple[str | None, str]:
    """The format a leaf takes, None to keep it, and why if the reason is not the policy's own."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None, ""
    format = policy.format_of(path)
    if format is None:
        return None, "no rule matches"
    if format == "ternary-stack" and x.ndim < 2:
        return None, f"has {x.ndim} axes; 'ternary-stack' takes 2 or more"
    if format in ("ternary", "int8", "int4"):
        inputs = policy.inputs_of(path, x.ndim)
        if inputs is None or not inputs < x.ndim:
            return None, (
                f"has {x.ndim} axes; say in Policy(inputs=...) how many are inputs "
                "(or 'ternary-stack')"
            )
    if format == "float16" and largest(x) > float(jnp.finfo("float16").max):
        return None, "outgrows float16"
    return format, ""


def quantized_format(name: str, x: Any, policy: Policy) -> str:
    """The quantised format a leaf takes by its path and shape, or an empty string."""
    format, inputs = policy.format_of(name) or "", policy.inputs_of(name, x.ndim)
    matrix = inputs is not None and inputs < x.ndim
    return format if format == "ternary-stack" or (format not in FLOATS and matrix) else ""


def is_ternary_matrix(name: str, x: Any, policy: Policy) -> bool:
    """Whether a leaf is a matrix that layers multiply by and the policy makes ternary.

    A table that the policy makes ternary is looked up instead: layers never quantise it.
    """
    return not is_table(name) and quantized_format(name, x, policy).startswith("ternary")


def is_table(name: str) -> bool:
    """Whether a path is that of an embedding table.

    >>> is_table("embed/embedding"), is_table("embed/proj/kernel")
    (True, False)
    """
    return name.rsplit("/", 1)[-1] == "embedding"


def scheme_of(format: str, path: str, scheme: Scheme) -> Scheme:
    """The scheme of a format: the caller's for ternary ones; tables have a scale a row."""
    if is_table(path):
        # One of four adjacent rows cannot be 0 in a table: rows have nothing to do with each other.
        if format.startswith("ternary"):
            rule = "twn" if scheme.rule == "sherry" else scheme.rule
            return dataclasses.replace(scheme, rule=rule, scale="row")
        return Scheme(format, "row")  # pyright: ignore[reportArgumentType]
    if format.startswith("ternary"):
        return scheme
    return Scheme("int8", "channel") if format == "int8" else Scheme("int4", _INT4_GROUP)
