"""Planning for a size: which part of a model takes which format, at the least predicted damage."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from rich.table import Table

from .convert import path_name
from .errors import BitnetError
from .host import largest
from .packed import pack_weight
from .policy import Policy, is_table, scheme_of
from .quantize import Scheme, dequantize, quantize_kernel

Tree = Any
Rules = Sequence[tuple[str, str]]

FORMATS = ("ternary", "int4", "int8", "float16")
# What is no parameter stays as it is.
_OTHERS = (r"^(buffers|batch_stats)/", "float32")
# Points of a front of (bytes, damage); with more, only the best of those nearly as large is kept.
_POINTS = 20_000


@dataclasses.dataclass(frozen=True)
class Option:
    """A format a component could take.

    Attributes:
      format: as in `Policy`.
      bytes: of its arrays then.
      damage: predicted; sums over components.
    """

    format: str
    bytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A component: matrices of the same place in every layer.

    Attributes:
      component: their path with ``*`` for the number of the layer.
      paths: of its leaves.
      parameters, bytes_before: how many numbers, and their bytes in float32.
      chosen: the option taken.
      options: all that were considered, smallest first.
    """

    component: str
    paths: tuple[str, ...]
    parameters: int
    bytes_before: int
    chosen: Option
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` decided.

    Attributes:
      rows: every component whose format was chosen.
      policy: gives each leaf its planned format.
      bytes_before: of all numbers in float32.
      bytes_after: of all arrays as planned.
      overhead: bytes that come on top on disk.
      target_ratio: what was asked for.
    """

    rows: tuple[Row, ...]
    policy: Policy
    bytes_before: int
    bytes_after: int
    overhead: int
    target_ratio: float

    @property
    def ratio(self) -> float:
        """Bytes in float32 over bytes as planned, overhead included."""
        return self.bytes_before / (self.bytes_after + self.overhead)

    @property
    def damage(self) -> float:
        return sum(row.chosen.damage for row in self.rows)

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        totals = ("bytes_before", "bytes_after", "overhead", "target_ratio", "ratio", "damage")
        return {"rows": rows, **{name: getattr(self, name) for name in totals}}


def plan(
    params: Tree,
    target_ratio: float,
    scheme: Scheme = Scheme("twn", "channel"),
    *,
    fixed: Rules = (),
    inputs: Sequence[tuple[str, int]] = (),
    formats: Sequence[str] = FORMATS,
    overhead: int = 0,
    damage: Callable[[str, str], float] | None = None,
) -> Plan:
    """Choose a format for every component so that the model is small enough and least damaged.

    minimise sum damage(component, format)  subject to  before / (sum bytes + overhead) >= target

    solved exactly, up to the thinning of very long fronts. Without ``damage`` it is predicted from
    the weights alone: the noise a matrix W adds to its output per unit of signal, were its inputs
    white, summed over a component's matrices. What a table gets wrong goes through every layer, so
    it counts once for each (for as many as the largest component has matrices):

    damage = n sum |W - Q(W)|^2 / |W|^2,  n = layers for a table, else 1

    Args:
      params: float variables of any network. Kernels and embedding tables are chosen for; vectors,
        and kernels of three axes or more that ``inputs`` does not tell about, are kept in float16;
        collections other than parameters as they are.
      target_ratio: float32 bytes over bytes as planned.
      scheme: of ternary kernels; a ternary table has the same rule with a scale a row.
      fixed: rules of a `Policy` that come first and are not chosen for.
      inputs: `Policy.inputs`.
      formats: that a kernel may take; a table may take float16 besides.
      overhead: bytes on disk besides the arrays.
      damage: (component, format) -> its damage, measured perhaps.

    Returns:
      `Plan`.

    Raises:
      BitnetError: if the target is no number above 0, or cannot be met: with the best ratio that
        can.

    >>> w = jax.random.normal(jax.random.key(0), (64, 64))
    >>> [r.chosen.format for r in plan({"a": {"kernel": w}, "b": {"embedding": 3 * w}}, 5).rows]
    ['int4', 'int4']
    """
    if not target_ratio > 0:
        raise BitnetError(f"target ratio {target_ratio}: give a number above 0, 8.2 say")
    told = Policy(tuple(fixed), tuple(inputs))  # pyright: ignore[reportArgumentType]
    leaves = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    groups: dict[str, list[tuple[str, jax.Array]]] = {}
    rest = 0
    for name, x in leaves:
        if _is_chosen(name, x, told):
            groups.setdefault(component(name), []).append((name, x))
        else:
            rest += _kept_bytes(name, x, told)
    layers = max(map(len, groups.values()), default=1)
    options = [
        _options(c, found, scheme, told, formats, damage, layers) for c, found in groups.items()
    ]
    before = 4 * sum(x.size for _, x in leaves)
    picked = _solve(options, before / target_ratio - overhead - rest)
    if picked is None:
        least = rest + overhead + sum(min(o.bytes for o in part) for part in options)
        raise BitnetError(
            f"{target_ratio:g}x smaller than float32 cannot be reached: the best is "
            f"{int(100 * before / least) / 100:.2f}x ({before:,} to {least:,} bytes, of which "
            f"{rest + overhead:,} are not to choose); lower the target to that"
        )
    rows = tuple(
        _row(c, found, part, i) for (c, found), part, i in zip(groups.items(), options, picked)
    )
    after = rest + sum(row.chosen.bytes for row in rows)
    rules = (*told.rules, *(_rule(row) for row in rows), _OTHERS, (".*", "float16"))
    return Plan(rows, Policy(rules, told.inputs), before, after, overhead, target_ratio)


def component(name: str) -> str:
    """A path without its leaf, numbers as ``*``.

    >>> component("backbone/layers_3/attention/w_q/kernel")
    'backbone/layers_*/attention/w_q'
    """
    return re.sub(r"(?<=_)\d+(?=/|$)|(?<=/)\d+(?=/|$)", "*", name.rpartition("/")[0] or name)


def _is_chosen(name: str, x: Any, told: Policy) -> bool:
    """Whether a leaf is a matrix whose format is open."""
    return not told.format_of(name) and is_matrix(name, x, told)


def is_matrix(name: str, x: Any, told: Policy) -> bool:
    """Whether a leaf is a kernel or a table that a format can be chosen for."""
    if re.search(_OTHERS[0], name) or not _floating(x):
        return False
    inputs = told.inputs_of(name, x.ndim)
    matrix = inputs is not None and inputs < x.ndim
    return matrix and (is_table(name) or name.rsplit("/", 1)[-1] == "kernel")


def rounded(name: str, x: jax.Array, policy: Policy, scheme: Scheme) -> jax.Array:
    """The values a matrix has in the format its policy gives it, as float32."""
    one = scheme_of(policy.format_of(name) or "ternary", name, scheme)
    return _rounded(x, one, policy.inputs_of(name, x.ndim))


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _kept_bytes(name: str, x: Any, told: Policy) -> int:
    """Bytes of a leaf that is not chosen for."""
    policy = Policy((*told.rules, _OTHERS, (".*", "float16")), told.inputs)
    if not _floating(x):
        return x.nbytes
    format = policy.format_of(name) or "float32"
    outgrown = format == "float16" and largest(x) > 65504
    return x.nbytes if outgrown else x.size * jnp.dtype(format).itemsize


def _options(
    part: str,
    leaves: list,
    scheme: Scheme,
    told: Policy,
    formats: Sequence[str],
    damage: Callable[[str, str], float] | None,
    layers: int,
) -> tuple[Option, ...]:
    table = is_table(leaves[0][0])
    found = []
    for format in dict.fromkeys((*formats, "float16") if table else formats):
        size, noise = 0, 0.0
        for name, x in leaves:
            if format == "float16":
                size += 2 * x.size
                continue
            one = scheme_of(format, name, scheme)
            inputs = told.inputs_of(name, x.ndim)
            packed = jax.eval_shape(functools.partial(_packed, scheme=one, inputs=inputs), x)
            size += sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(packed))
            noise += 0.0 if damage else float(_noise(x, one, inputs))
        noise = damage(part, format) if damage else noise * (layers if table else 1)
        found.append(Option(format, size, noise))
    return tuple(sorted(found, key=lambda o: o.bytes))


def _packed(x: jax.Array, scheme: Scheme, inputs: int | None):
    return pack_weight(quantize_kernel(x, scheme, inputs))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(x: jax.Array, scheme: Scheme, inputs: int | None) -> jax.Array:
    return dequantize(quantize_kernel(x.astype(jnp.float32), scheme, inputs))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(x: jax.Array, scheme: Scheme, inputs: int | None) -> jax.Array:
    x = x.astype(jnp.float32)
    difference = x - _rounded(x, scheme, inputs)
    return jnp.sum(difference**2) / jnp.maximum(jnp.sum(x**2), jnp.finfo(jnp.float32).tiny)


def _solve(options: list[tuple[Option, ...]], budget: float) -> list[int] | None:
    """Indices of the options with the least damage within the budget of bytes, or None.

    Fronts of (bytes, damage) are merged one component after another; a pair that another one beats
    in both is dropped.
    """
    size, harm = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for part in options:
        a = np.array([o.bytes for o in part], np.int64)
        b = np.array([o.damage for o in part])
        size, harm = (size[:, None] + a).ravel(), (harm[:, None] + b).ravel()
        kept = _front(size, harm)
        steps.append((kept // len(part), kept % len(part)))
        size, harm = size[kept], harm[kept]
    within = np.flatnonzero(size <= budget)
    if not len(within):
        return None
    at, picked = int(within[np.argmin(harm[within])]), []
    for before, option in reversed(steps):
        picked.append(int(option[at]))
        at = int(before[at])
    return picked[::-1]


def _front(size: np.ndarray, harm: np.ndarray) -> np.ndarray:
    """Indices of the pairs that none beats in both, by size; thinned if there are too many."""
    order = np.lexsort((harm, size))
    best = np.minimum.accumulate(harm[order])
    better = np.concatenate([[True], best[1:] < best[:-1]])
    front = order[better]
    if len(front) <= _POINTS:
        return front
    # Of those in one narrow range of bytes the last has the least damage; the smallest stays, so
    # that what can be met is not refused.
    width = (size[front[-1]] - size[front[0]]) / _POINTS
    cell = ((size[front] - size[front[0]]) / width).astype(np.int64)
    last = np.concatenate([cell[1:] != cell[:-1], [True]])
    last[0] = True
    return front[last]


def _row(part: str, leaves: list, options: tuple[Option, ...], chosen: int) -> Row:
    paths, count = tuple(name for name, _ in leaves), sum(x.size for _, x in leaves)
    return Row(part, paths, count, 4 * count, options[chosen], options)


def _rule(row: Row) -> tuple[str, str]:
    """One anchored pattern for a component."""
    pattern = r"\d+".join(re.escape(piece) for piece in row.component.split("*"))
    leaf = "embedding" if is_table(row.paths[0]) else "kernel"
    here = row.paths[0] == row.component  # a leaf at the top of its tree
    return (f"^{pattern}$" if here else f"^{pattern}/{leaf}$"), row.chosen.format


def table(plan: Plan) -> Table:
    """The plan for a person: what every component becomes, its bytes, its predicted damage."""
    found = Table(title="Plan", title_justify="left", box=rich.box.SIMPLE, padding=(0, 1, 0, 0))
    found.add_column("component", overflow="fold")
    found.add_column("format")
    for name in ("parameters", "float32 MB", "MB", "damage"):
        found.add_column(name, justify="right")
    mega = lambda size: f"{size / 1e6:.2f}"
    for row in plan.rows:
        numbers = (f"{row.parameters:,}", mega(row.bytes_before), mega(row.chosen.bytes))
        found.add_row(row.component, row.chosen.format, *numbers, f"{row.chosen.damage:.2g}")
    rest = plan.bytes_after - sum(row.chosen.bytes for row in plan.rows)
    count = plan.bytes_before // 4 - sum(row.parameters for row in plan.rows)
    found.add_row("vectors and buffers", "", f"{count:,}", mega(4 * count), mega(rest), "")
    if plan.overhead:
        found.add_row("tokenizer and manifest", "", "", "", mega(plan.overhead), "")
    found.add_section()
    before, after = plan.bytes_before, plan.bytes_after + plan.overhead
    totals = (f"{before // 4:,}", mega(before), mega(after), f"{plan.damage:.2g}")
    found.add_row(f"{plan.ratio:.2f}x smaller, asked {plan.target_ratio:g}x", "", *totals)
    return found
