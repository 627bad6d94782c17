"""The findings of a run, for a person: tables and a plot."""

from pathlib import Path

from rich.table import Table

from ..errors import BitnetError
from .run import OURS


def lines(row: dict) -> dict[str, dict]:
    """Ours and the peers of a row, by name, the fastest first."""
    every = {OURS: row} | row["peers"]
    return dict(sorted(every.items(), key=lambda x: x[1]["ms"]))


def render(result: dict) -> list:
    """A headline, and a table a row."""
    told = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    on = f"{result['device']}, {result['threads']} core(s), load {result['load']:.1f}"
    shown: list = [f"{told} on {on}", result["native"]]
    for row in result["rows"]:
        limit = row["floor"]
        table = Table(title=row["name"], title_justify="left")
        for name in ("", "ms", "10 % - 90 %", "x float32", "ours faster"):
            table.add_column(name, justify="right" if name else "left")
        for name, x in lines(row).items():
            style = "bold" if name == OURS else ""
            faster = "" if name == OURS else f"{x['ms'] / row['ms']:.2f}x"
            spread = f"{x['low']:.3f} - {x['high']:.3f}"
            cells = (name, f"{x['ms']:.3f}", spread, f"{x['speedup_vs_float32']:.2f}", faster)
            table.add_row(*cells, style=style)
        what = f"floor: {limit['what']}, {limit['rate']:,.0f} {limit['unit']}"
        table.add_row(what, f"{limit['ms']:.3f}", "", "", f"{row['floor_share']:.2f}x", style="dim")
        shown.append(table)
    return shown


def plot(result: dict, file: Path) -> None:
    """A bar for each call, with its spread and the machine's limit; the format is FILE's suffix.

    Raises:
      BitnetError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(8, 1.2 + 2.4 * len(rows)), layout="constrained")
    for axis, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        every = lines(row)
        ms = [x["ms"] for x in every.values()]
        low, high = ([abs(x[k] - x["ms"]) for x in every.values()] for k in ("low", "high"))
        colors = ["tab:blue" if name == OURS else "lightgrey" for name in every]
        axis.barh(list(every), ms, xerr=[low, high], color=colors, ecolor="grey")
        for y, x in enumerate(every.values()):
            axis.annotate(f" {x['ms']:.3g}", (x["high"], y), va="center", fontsize=8)
        limit = row["floor"]
        told = f"{limit['what']}: {limit['ms']:.3g} ms"
        axis.axvline(limit["ms"], color="tab:red", linestyle="--", label=told)
        axis.set_title(f"{row['name']}: {row['speedup_vs_float32']:.1f}x XLA float32", loc="left")
        axis.set_xlabel(
            "ms, median with 10th and 90th percentile; logarithmic; less is better", fontsize=8
        )
        axis.set_xscale("log")  # peers that are hundreds of times slower would hide the rest
        axis.set_xlim(min(row["floor"]["ms"], *ms) / 2, 3 * max(x["high"] for x in every.values()))
        axis.invert_yaxis()
        axis.legend(loc="upper right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise BitnetError(f"--plot {file}: cannot be written ({e})") from e
