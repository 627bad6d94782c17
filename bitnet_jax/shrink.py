"""Any weights, of a network we know or not: plan, convert, pack, reload, verify leaf by leaf."""

import dataclasses
import functools
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from . import checkpoint, report
from .convert import Report, check_finite, kernel_arguments, path_name
from .convert import report as table_of
from .errors import BitnetError
from .half import exact
from .leaf import Packed, is_quantized
from .models.folder import ModelFolder, save_model
from .packed import pack_weight, unpack_weight
from .policy import FLOATS, Policy, place
from .progress import counter
from .quantize import LEVELS, Scheme, dequantize, quantize_kernel
from .quantpack import quantize_packed

Tree = Any


def float32_bytes(tree: Tree) -> int:
    """What the numbers of a tree take at 4 bytes each: its float32 safetensors without the header.

    >>> float32_bytes({"up": {"kernel": jnp.ones((4, 4), "bfloat16")}})
    64
    """
    return 4 * sum(x.size for x in jax.tree.leaves(tree))


def run(
    source: Tree | ModelFolder,
    out: Path,
    policy: Policy,
    scheme: Scheme,
    console: Console | None = None,
) -> dict:
    """Convert by the rule, pack, reload and compare every leaf; nothing is trained.

    Args:
      source: float variables of any network; or a model folder, which is saved as one.
      out: an existing folder; gets ``packed/``, ``report.json`` and ``report.txt``.
      policy: what becomes of each leaf.
      scheme: of the ternary ones.
      console: where progress is shown; None for silence.

    Returns:
      ``bytes_on_disk`` (``float32``: 4 bytes a number; ``packed``: the folder, everything counted),
      ``ratio_on_disk``, ``packed_equals_memory``, ``conversion`` as in `bitnet_jax.report`,
      ``errors`` (path to |W - codes scale|^2 / |W|^2), ``seconds``.

    Raises:
      BitnetError: for NaN or infinite weights, or if what is reloaded is not what was packed.
    """
    began = time.perf_counter()
    params = source.params if isinstance(source, ModelFolder) else source
    tree, errors = _converted(params, policy, scheme, console)
    converted = time.perf_counter()
    folder = out / "packed"
    if isinstance(source, ModelFolder):
        save_model(folder, dataclasses.replace(source, scheme=scheme, params=tree))
    else:
        metadata = {"scheme": dataclasses.asdict(scheme), "policy": list(policy.rules)}
        checkpoint.save(folder, tree, metadata)
    verify(tree, checkpoint.load(folder).tree, folder)
    size, before = checkpoint.size_on_disk(folder), float32_bytes(params)
    result = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "scheme": dataclasses.asdict(scheme),
        "bytes_on_disk": {"float32": before, "packed": size},
        "ratio_on_disk": before / size,
        "packed_equals_memory": True,
        "conversion": _in_float32(table_of(params, tree, policy)).as_dict(),
        "errors": errors,
        "seconds": {
            "conversion": round(converted - began, 2),
            "job": round(time.perf_counter() - began, 2),
        },
    }
    _write(out, result)
    return result


def _in_float32(found: Report) -> Report:
    """Sizes before as they are in float32, whatever the file has."""
    sized = lambda x: dataclasses.replace(x, bytes_before=4 * math.prod(x.shape))
    return Report(tuple(sized(x) for x in found.leaves))


def _converted(
    params: Tree, policy: Policy, scheme: Scheme, console: Console | None
) -> tuple[Tree, dict[str, float]]:
    """The packed tree, and |W - codes scale|^2 / |W|^2 of every quantised leaf.

    Leaf by leaf: beside the float leaves that are given, memory holds the packed ones and what
    belongs to one leaf, no second float copy.
    """
    errors: dict[str, float] = {}
    with counter(console, "convert", len(jax.tree.leaves(params))) as done:

        def one(path, x):
            name = path_name(path)
            check_finite({name: x})
            format, _ = place(name, x, policy)
            if format is None or format in FLOATS:
                kept = jnp.asarray(x)  # as JAX holds it: int64 is int32 there
                leaf = kept if format is None else kept.astype(format)
            else:
                leaf, error = _quantised(x, *kernel_arguments(x, name, format, policy, scheme))
                errors[name] = float(error)
            done()
            return leaf

        return jax.tree_util.tree_map_with_path(one, params), errors


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantised(x: jax.Array, scheme: Scheme, inputs: int | None) -> tuple[Packed, jax.Array]:
    """A packed leaf whose values are exact in float16, and its error."""
    if scheme.rule in LEVELS:
        leaf = pack_weight(exact(quantize_kernel(x, scheme, inputs), x))
    else:
        leaf = exact(quantize_packed(x, scheme, inputs), x)
    x = x.astype(jnp.float32).ravel()
    off = x - dequantize(unpack_weight(leaf)).ravel()
    return leaf, off @ off / jnp.maximum(x @ x, jnp.finfo(jnp.float32).tiny)


def verify(tree: Tree, reloaded: Tree, folder: Path) -> None:
    """Raise `BitnetError` naming the first leaf that is not, bit for bit, what was saved."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized),
        jax.tree.leaves(reloaded, is_leaf=is_quantized),
        strict=True,
    )
    for (path, a), b in pairs:
        arrays = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        same = jax.tree.structure(a) == jax.tree.structure(b)
        if not same or not all(checkpoint.crc32(x) == checkpoint.crc32(y) for x, y in arrays):
            raise BitnetError(f"{folder}: {path_name(path)} reloaded is not what was packed")


def summary(result: dict) -> list[str]:
    """The sentences a reader takes away."""
    disk, leaves = result["bytes_on_disk"], result["conversion"]["leaves"]
    worst = max(result["errors"].items(), key=lambda x: x[1], default=None)
    most = f" The largest error is {worst[0]}'s, {100 * worst[1]:.1f} %." if worst else ""
    return [
        f"Size on disk: {disk['float32']:,} (float32) -> {disk['packed']:,} bytes, "
        f"{result['ratio_on_disk']:.2f}x smaller, everything counted.",
        f"{len(leaves)} leaves reloaded and compared, all equal bit for bit.",
        f"Error of a leaf: |W - codes scale|^2 / |W|^2.{most} Nothing was run or trained: "
        "what this costs in quality only text can tell (--data).",
    ]


def table(result: dict) -> Table:
    """Components with their formats, bytes and errors."""
    found = Table(title="Packed", title_justify="left", box=rich.box.SIMPLE)
    for name, justify in (("component", "left"), ("format", "left")):
        found.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for name in ("leaves", "bytes", "packed", "ratio", "error %"):
        found.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[dict]] = {}
    for x in result["conversion"]["leaves"]:
        groups.setdefault((report.component(x["path"]), x["format"]), []).append(x)
    for (name, format), leaves in groups.items():
        before, after = (sum(x[k] for x in leaves) for k in ("bytes_before", "bytes_after"))
        errors = [result["errors"][x["path"]] for x in leaves if x["path"] in result["errors"]]
        mean = f"{100 * np.mean(errors):.2f}" if errors else ""
        row = (f"{len(leaves)}", f"{before:,}", f"{after:,}", f"{before / max(after, 1):.2f}", mean)
        found.add_row(name, format, *row)
    return found


def _write(out: Path, result: dict) -> None:
    """``report.json`` and ``report.txt``, the text with every leaf."""

    console = Console(width=110, file=io.StringIO(), force_jupyter=False)
    for line in summary(result):
        console.print(line, highlight=False)
    console.print(table(result))
    console.print(report.leaf_table(result["conversion"]["leaves"]))
    try:
        (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
        text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        (out / "report.txt").write_text(text)
    except OSError as e:
        raise BitnetError(f"{out}: the report cannot be written ({e.strerror})") from e
