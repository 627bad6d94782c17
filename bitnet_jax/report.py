"""The report of the main job: JSON, text and pictures.

Keys of ``report.json``, stable from one version to the next (shares are in 0..1, not percent):

| key | meaning |
|---|---|
| ``relative_accuracy_loss`` | 1 - accuracy of the packed model / of ``yardstick``: the float model continued on the same tokens, or the source model if that is better or none was continued |
| ``relative_accuracy_loss_to_source`` | the same against the float model as it came |
| ``relative_accuracy_loss_unturned`` | the same for the converted model before fine-tuning, against the source |
| ``ratio_on_disk`` | bytes of the float32 checkpoint folder / bytes of the packed folder, everything in it counted |
| ``bytes_on_disk`` | ``float32`` and ``packed``, the two terms of that ratio |
| ``scores`` | for ``float``, ``rounded`` (ternary by the rule alone, where the conversion looked at data), ``converted``, ``float_continued``, ``fine_tuned``, ``packed``: ``loss`` (nats a token), ``perplexity``, ``accuracy``, ``tokens`` |
| ``disagreement`` | of a Phase 3 network, which looks both ways: 1 - ``top1`` of the packed model. Its scores have ``top1`` and ``kl`` besides (how far it says what the float model says), and ``loss`` and ``accuracy`` are of its own loss: every position asked for its own token |
| ``packed_is`` | which weights were packed: ``last`` or ``best`` of the fine-tuning's epochs (the files in ``latent/``), or ``converted``: without fine-tuning, or because it led a Phase 3 network away from the float model |
| ``packed_equals_memory`` | the model reloaded from disk gives the same logits as in memory, bit for bit |
| ``conversion`` | ``bytes_before``, ``bytes_after`` (arrays), ``codes`` (how many are -1, 0, +1), ``unmatched`` (matrices no rule fits), ``leaves`` |
| ``parameters``, ``alternatives`` | how many weights; for fewer than 5 million what ``int8`` and ``int4`` cost untrained: ``loss``, ``accuracy``, ``ratio`` (bytes of arrays) |
| ``scheme``, ``epochs``, ``tokens``, ``sample``, ``seconds`` | what was run, and the text it wrote |
"""  # noqa: E501

import io
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from . import advice
from .convert import Report, path_name
from .errors import BitnetError
from .leaf import PackedTernary, is_quantized
from .packed import unpack_weight

Tree = Any

# The steps of the job, in the order a reader meets them.
_ROWS = {
    "float": "float model",
    "rounded": "ternary, by the rule alone",
    "converted": "ternary, untuned",
    "float_continued": "float, continued",
    "fine_tuned": "ternary, fine-tuned",
    "packed": "ternary, reloaded",
}


def component(path: str) -> str:
    """The part of a model a leaf belongs to, for tables and pictures.

    >>> component("layer_3/attention/query/kernel"), component("layer_3/mlp_norm/scale")
    ('attention', 'norms and biases')
    >>> component("trm/refiner/mlp_0/kernel"), component("buffers/backbone/ltm/memory_state")
    ('recursion', 'buffers')
    """
    parts = path.split("/")
    if parts[0] == "buffers":
        return "buffers"
    if parts[-1] in ("bias", "scale") and "kernel" not in parts:
        return "norms and biases"
    return next((name for key, name in _PARTS.items() if any(key in p for p in parts)), "other")


# What of a path tells the part of a model, the first that is in it; the first three of Phase 3.
_PARTS = {
    "trm": "recursion",
    "ltm": "memory",
    "mag_gate": "memory",
    "act_head": "other",
    "attention": "attention",
    "mlp": "mlp",
    "embed": "embed",
    "head": "head",
}


def plan_table(plan: Report) -> Table:
    """What every component becomes: parameters, format, bytes before and after, zeros."""
    table = Table(title="Converted", title_justify="left")
    table.add_column("component")
    table.add_column("format")
    for name in ("parameters", "bytes", "after", "ratio", "zeros %"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list] = {}
    for leaf in plan.leaves:
        groups.setdefault((component(leaf.path), leaf.format), []).append(leaf)
    for (name, format), leaves in groups.items():
        before, after = sum(x.bytes_before for x in leaves), sum(x.bytes_after for x in leaves)
        size = sum(int(np.prod(x.shape)) for x in leaves)
        zeros = 100 * sum(x.zeros for x in leaves) / size
        shares = f"{zeros:.1f}" if format == "ternary" else ""
        ratio = f"{before / max(after, 1):.2f}"
        table.add_row(name, format, f"{size:,}", f"{before:,}", f"{after:,}", ratio, shares)
    before, after = plan.bytes_before, plan.bytes_after
    table.add_section()
    table.add_row("all", "", "", f"{before:,}", f"{after:,}", f"{before / max(after, 1):.2f}", "")
    for path in plan.unmatched:
        note = next(x.note for x in plan.leaves if x.path == path)
        table.add_row(f"[yellow]not converted: {path}", note)
    return table


def leaf_table(leaves: list[dict]) -> Table:
    """Every leaf: what it became, bytes, zeros, balance of -1 and +1.

    Args:
      leaves: dicts with ``path``, ``shape``, ``format``, ``minus``, ``zeros``, ``plus``, and
        ``bytes`` or both ``bytes_before`` and ``bytes_after``.
    """
    sizes = [k for k in ("bytes", "bytes_before", "bytes_after") if leaves and k in leaves[0]]
    table = Table(
        title="Every leaf", title_justify="left", box=rich.box.SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("leaf", overflow="fold")
    table.add_column("shape")
    table.add_column("format")
    for name in (*(k.replace("_", " ") for k in sizes), "zeros %", "-1 %", "+1 %"):
        table.add_column(name, justify="right")
    for x in leaves:
        total = x["minus"] + x["zeros"] + x["plus"]
        shares = [f"{100 * x[k] / total:.1f}" if total else "" for k in ("zeros", "minus", "plus")]
        table.add_row(
            x["path"],
            " x ".join(map(str, x["shape"])),
            f"{x['format']} {x.get('note', '')}".strip(),
            *(f"{x[k]:,}" for k in sizes),
            *shares,
        )
    return table


def score_table(result: dict) -> Table:
    """Loss, perplexity and accuracy of the model at every step of the job."""
    table = Table(title="Held-out text", title_justify="left")
    table.add_column("model")
    agreement = "top1" in result["scores"]["float"]
    last = ("same token", "KL (nats)") if agreement else ()
    for name in ("loss (nats)", *(() if agreement else ("perplexity",)), "accuracy", *last):
        table.add_column(name, justify="right")
    for key, label in _ROWS.items():
        if key in result["scores"]:
            x = result["scores"][key]
            row = [f"{x['loss']:.4f}", f"{x['perplexity']:.2f}", f"{100 * x['accuracy']:.2f} %"]
            if agreement:
                row = [row[0], row[2], f"{100 * x['top1']:.2f} %", f"{x['kl']:.4f}"]
            table.add_row(label, *row)
    return table


def summary(result: dict) -> list[str]:
    """The sentences a reader takes away."""
    disk, lost = result["bytes_on_disk"], result["relative_accuracy_loss"]
    continued = result["yardstick"] == "float_continued"
    yardstick = "continued on the same tokens" if continued else "it came from"
    equal = "the same logits, bit for bit" if result["packed_equals_memory"] else "OTHER LOGITS"
    quality = (
        f"Accuracy: the packed ternary model is {100 * lost:.2f} % (relative) below the float model"
        f" {yardstick} (before fine-tuning: "
        f"{100 * result['relative_accuracy_loss_unturned']:.1f} %)."
    )
    if "disagreement" in result:
        before, after = (result["scores"][k] for k in ("converted", "packed"))
        quality = (
            f"Agreement: the packed ternary model names the float model's token at "
            f"{100 * after['top1']:.2f} % of positions, KL {after['kl']:.4f} nats "
            f"(before fine-tuning: {100 * before['top1']:.2f} %, {before['kl']:.4f})."
        )
    return [
        quality,
        f"Size on disk: {disk['float32']:,} -> {disk['packed']:,} bytes, "
        f"{result['ratio_on_disk']:.2f}x smaller, everything counted.",
        f"Reloaded from disk it gives {equal}.",
        *filter(None, [advice.sentence(result)]),
    ]


def text(result: dict, width: int = 110, every_leaf: bool = False) -> str:
    """The report as plain text."""
    console = Console(width=width, file=io.StringIO(), force_jupyter=False)
    console.print(score_table(result))
    for line in summary(result):
        console.print(line, highlight=False)
    if result["sample"]:
        console.print("\nA sample of its text:", highlight=False)
        console.print(result["sample"], markup=False, highlight=False)
    if every_leaf:
        console.print(leaf_table(result["conversion"]["leaves"]))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def write(out: Path, result: dict, history: list[dict], latent: Tree, packed: Tree) -> None:
    """Write ``report.json``, ``report.txt`` and four pictures into a folder.

    Args:
      out: an existing folder.
      result: what the job returns.
      history: entries of every training, in the order of time.
      latent, packed: the same model before and after packing, for the histogram.

    Raises:
      BitnetError: if a file cannot be written.
    """
    try:
        (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
        (out / "report.txt").write_text(text(result, every_leaf=True))
        _save(out / "loss.png", lambda axes: _draw_losses(axes, history, result["scores"]))
        _save(out / "weights.png", lambda axes: _draw_weights(axes, latent, packed))
        _save(out / "codes.png", lambda axes: _draw_codes(axes, history))
        _save(out / "bytes.png", lambda axes: _draw_bytes(axes, result["conversion"]))
    except OSError as e:
        raise BitnetError(
            f"{out}: the report cannot be written ({e.strerror}); the model in packed/ is complete"
        ) from e


def _save(path: Path, draw) -> None:
    """Draw on one pair of axes without a display and without touching pyplot's state."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_losses(axes, history: list[dict], scores: dict) -> None:
    """Training loss over steps; both fine-tunings start where the float model stopped."""
    colors = {"train float": "0.4", "continue float": "C0", "fine-tune ternary": "C3"}
    stages = list(dict.fromkeys(x["stage"] for x in history))
    offset = sum("loss" in x for x in history if x["stage"] == "train float")
    for stage in stages:
        steps = [x for x in history if x["stage"] == stage and "loss" in x]
        held = [x for x in history if x["stage"] == stage and "held_out_loss" in x]
        shift = 0 if stage == "train float" else offset
        color = colors.get(stage, "C1")
        # Where another loss is mixed in, the part that all trainings have in common.
        loss = _smooth(np.array([x.get("cross_entropy", x["loss"]) for x in steps]))
        axes.plot([x["step"] + shift for x in steps], loss, color=color, label=stage, lw=1.2)
        points = [x["step"] + shift for x in held]
        axes.plot(points, [x["held_out_loss"] for x in held], "o", color=color, ms=5)
    axes.plot(offset, scores["converted"]["loss"], "v", color="C3", ms=8)
    axes.annotate(
        " converted, not yet fine-tuned", (offset, scores["converted"]["loss"]), va="center"
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title("Loss: lines on training text, points on held-out text", loc="left")
    if stages:
        axes.legend(frameon=False)


def _smooth(x: np.ndarray, share: float = 0.9) -> np.ndarray:
    """Exponential moving average, unbiased at the start."""
    out, total, weight = np.empty_like(x), 0.0, 0.0
    for i, value in enumerate(x):
        total, weight = share * total + value, share * weight + 1
        out[i] = total / weight
    return out


def _draw_weights(axes, latent: Tree, packed: Tree) -> None:
    """Latent weights in units of their channel's scale, coloured by the code they became."""
    old = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(latent)}
    values, codes = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_quantized):
        # Where a recipe chose the codes itself, there is no latent weight to show.
        if isinstance(leaf, PackedTernary) and not leaf.group and path_name(path) in old:
            weight = unpack_weight(leaf)
            values.append((np.asarray(old[path_name(path)]) / np.asarray(weight.scale)).ravel())
            codes.append(np.asarray(weight.codes).ravel())
    if not values:
        axes.set_title("No ternary weight with one scale a channel or tensor", loc="left")
        return
    value, code = np.concatenate(values), np.concatenate(codes)
    bins = np.linspace(-3, 3, 121)
    for c, color in ((-1, "C0"), (0, "0.7"), (1, "C3")):
        share = 100 * np.mean(code == c)
        axes.hist(value[code == c], bins, color=color, label=f"code {c}: {share:.1f} %")
    axes.set(xlabel="latent weight / scale", ylabel="weights")
    axes.set_title("Latent weights and the codes they become", loc="left")
    axes.legend(frameon=False)


def _draw_codes(axes, history: list[dict]) -> None:
    """Codes that a step changed, and codes that are 0, over the steps of the ternary training."""
    steps = [x for x in history if "flips" in x]
    flips = _smooth(np.array([100 * x["flips"] for x in steps]))
    axes.plot([x["step"] for x in steps], flips, color="C3", lw=1.2)
    axes.set(xlabel="step", ylabel="codes changed in a step (%)")
    axes.yaxis.label.set_color("C3")
    zeros = axes.twinx()
    zeros.plot([x["step"] for x in steps], [100 * x["zeros"] for x in steps], color="0.5", lw=1.2)
    zeros.set_ylabel("codes that are 0 (%)", color="0.5")
    axes.set_title("Codes while they are trained", loc="left")


def _draw_bytes(axes, conversion: dict) -> None:
    """Bytes of each component in float32 and packed."""
    names = list(dict.fromkeys(component(x["path"]) for x in conversion["leaves"]))
    sums = [
        [sum(x[k] for x in conversion["leaves"] if component(x["path"]) == n) / 1e6 for n in names]
        for k in ("bytes_before", "bytes_after")
    ]
    at = np.arange(len(names))
    for shift, megabytes, label, color in (
        (-0.2, sums[0], "float32", "0.7"),
        (0.2, sums[1], "packed", "C3"),
    ):
        bars = axes.bar(at + shift, megabytes, 0.4, label=label, color=color)
        axes.bar_label(bars, [f"{x:.2f}" for x in megabytes], fontsize=8)
    axes.set_xticks(at, names)
    axes.set(ylabel="MB")
    axes.set_title("Bytes by component", loc="left")
    axes.legend(frameon=False)
