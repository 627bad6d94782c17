"""The quality bench: recipes x seeds on real text and on digits, beside the float model continued.

    python -m experiments.quality.bench                       # what is missing, about 2 hours
    python -m experiments.quality.bench --seeds 1 --recipes plain default

Every result is kept in ``results/bench.json`` as soon as it is there: stop it and start it again.
Loss and accuracy are measured on 51,200 tokens of files that no training saw.
"""

import contextlib
import dataclasses
import fcntl
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.figure
from rich.console import Console
from rich.table import Table

from bitnet_jax import Scheme

HERE = Path(__file__).parent
ABSMEAN, TWN = Scheme("absmean"), Scheme("twn", "channel")
_PLAIN = {"scheme": ABSMEAN, "start": "rule", "distill": 0.0, "teacher": "source"}

# What each recipe changes of plain absmean STE: one part at a time, then parts together.
RECIPES: dict[str, dict] = {
    "plain": _PLAIN,
    "twn": _PLAIN | {"scheme": TWN},
    "default": {},  # plain, distilled from the float model continued
    "from data": _PLAIN | {"start": "data", "keep": 0.5},
    "warm-up": _PLAIN | {"warmup": 1 / 3},
    "learned scales": _PLAIN | {"learn_scales": True},
    "dead zone": _PLAIN | {"dead_zone": 1e-3},
    "two-stage": _PLAIN | {"schedule": "two-stage"},
    "relation": _PLAIN | {"relation": 100.0, "teacher": "continued"},
    "sub-norms": _PLAIN | {"sub_norms": True},
    "sherry": _PLAIN | {"scheme": Scheme("sherry", "channel")},
    "sherry + residual": _PLAIN | {"scheme": Scheme("sherry", "channel"), "residual": True},
    "default from data": {"keep": 0.5},
    "twn from data, taught": {
        "scheme": TWN, "keep": 0.5, "distill": 1.0, "learning_rate": 3e-3,
    },
}  # fmt: skip
# Conversions without training.
CONVERSIONS = {
    "absmean, tensor": {"scheme": ABSMEAN, "start": "rule"},
    "absmean, channel": {"scheme": Scheme("absmean", "channel"), "start": "rule"},
    "twn, channel": {"scheme": TWN, "start": "rule"},
    "by data, tensor": {"scheme": Scheme("twn", "tensor"), "start": "data"},
    "by data, channel": {"scheme": TWN, "start": "data"},
    "by data, groups of 32": {"scheme": Scheme("twn", 32), "start": "data"},
}
FLOAT = "float, continued"


class Results:
    """The figures on disk; several processes may add to them."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict]:
        with open(self.path, "a+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            rows = json.loads(f.read() or "{}")
            yield rows
            f.truncate(0)
            lines = ",\n".join(f'"{k}": {json.dumps(rows[k])}' for k in sorted(rows))
            f.write("{" + lines + "}\n")

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    @property
    def rows(self) -> dict:
        return json.loads(self.path.read_text() or "{}") if self.path.exists() else {}

    def add(self, key: str, row: dict) -> None:
        with self._open() as rows:
            rows[key] = row
        print(key, {k: v for k, v in row.items() if k != "curve"}, flush=True)


def text(kind: str, seed: int, recipes: list[str], results: Results, work: Path) -> None:
    """All that is missing of one model and seed."""
    from bitnet_jax import checkpoint
    from experiments.quality import texts

    key = lambda name: f"{kind}/{name}/{seed}"
    missing = [r for r in recipes if key(r) not in results]
    conversions = [c for c in CONVERSIONS if key(c) not in results]
    if not missing and not conversions and key(FLOAT) in results:
        return
    bed = texts.bed(kind, seed, work)
    plain = texts.settings(kind, seed)
    if key("float") not in results:
        scores = texts.evaluate(bed.source.model, bed.source.params, bed.held_out)
        results.add(key("float"), {k: scores[k] for k in ("loss", "accuracy")})
    for name in conversions:
        results.add(
            key(name), texts.converted(bed, texts.settings(kind, seed, **CONVERSIONS[name]))
        )
    path = work / f"{kind}-{seed}-continued"
    if key(FLOAT) not in results or not checkpoint.exists(path):
        params, row = texts.continued(bed, plain)
        checkpoint.save(path, params, overwrite=True)
        results.add(key(FLOAT), row)
    after = checkpoint.load(path).tree
    for name in missing:
        job = texts.settings(kind, seed, **RECIPES[name])
        teacher = after if job.teacher == "continued" else bed.source.params
        results.add(key(name), texts.tuned(bed, job, teacher))


def digits(seed: int, results: Results) -> None:
    """The task that is no language, for one seed."""
    from experiments.quality import digits as task

    if f"digits/float/{seed}" not in results:
        for name, accuracy in task.run(seed, TWN).items():
            results.add(f"digits/{name}/{seed}", {"accuracy": accuracy})


def table(rows: dict, kind: str) -> Table:
    """Mean and spread over seeds of everything measured on one model."""
    shown = Table(
        title=f"{kind}: held-out accuracy, mean ± standard deviation", title_justify="left"
    )
    shown.add_column("recipe")
    for name in ("seeds", "accuracy", "loss", "below float, continued", "s"):
        shown.add_column(name, justify="right")
    names = dict.fromkeys(k.split("/")[1] for k in rows if k.startswith(f"{kind}/"))
    order = {n: i for i, n in enumerate(["float", FLOAT, *CONVERSIONS, *RECIPES])}
    for name in sorted(names, key=lambda n: order.get(n, len(order))):
        found = seeds_of(rows, kind, name)
        values = [x["accuracy"] for x in found.values()]
        gaps = gaps_of(rows, kind, name)
        losses = [x["loss"] for x in found.values() if "loss" in x]
        seconds = [x["seconds"] for x in found.values() if "seconds" in x]
        shown.add_row(
            name,
            str(len(found)),
            f"{100 * statistics.mean(values):.2f} ± {100 * _spread(values):.2f} %",
            f"{statistics.mean(losses):.4f}" if losses else "",
            f"{100 * statistics.mean(gaps):+.2f} ± {100 * _spread(gaps):.2f} %" if gaps else "",
            f"{statistics.median(seconds):.0f}" if seconds else "",
        )
    return shown


def seeds_of(rows: dict, kind: str, name: str) -> dict[str, dict]:
    """A recipe's results by seed."""
    return {k.split("/")[2]: x for k, x in rows.items() if k.rsplit("/", 1)[0] == f"{kind}/{name}"}


def gaps_of(rows: dict, kind: str, name: str) -> list[float]:
    """1 - accuracy / accuracy of the float model continued, seed by seed."""
    yardstick = {s: x["accuracy"] for s, x in seeds_of(rows, kind, FLOAT).items()}
    found = seeds_of(rows, kind, name)
    return [1 - x["accuracy"] / yardstick[s] for s, x in found.items() if s in yardstick]


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(rows: dict, path: Path | None) -> matplotlib.figure.Figure:
    """Each recipe's distance to the float model continued, a point a seed and their mean.

    Args:
      rows: of the results.
      path: where to save the picture; None to give only the figure, for a notebook.
    """
    kinds = [k for k in ("demo", "bytes") if any(x.startswith(f"{k}/plain") for x in rows)]
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        names = [n for n in RECIPES if gaps_of(rows, kind, n)][::-1]
        for y, name in enumerate(names):
            gaps = [100 * g for g in gaps_of(rows, kind, name)]
            color = "tab:red" if name == "default" else "tab:blue"
            axes.plot(gaps, [y] * len(gaps), "o", color=color, alpha=0.4)
            axes.plot(statistics.mean(gaps), y, "|", color=color, markersize=18, markeredgewidth=2)
        axes.set_yticks(range(len(names)), names)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(title=f"{kind} model", xlabel="accuracy below the float model continued (%)")
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


@dataclasses.dataclass(frozen=True)
class Main:
    """Run what is missing of the grid, print the tables, draw the picture."""

    kinds: tuple[str, ...] = ("demo", "bytes", "digits")
    """Models."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Recipes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the language models; digits always has five."""
    work: Path = HERE / "work"
    """Where float models are kept."""
    out: Path = HERE / "results" / "bench.json"
    """The figures."""

    def __call__(self) -> None:
        results = Results(self.out)
        self.work.mkdir(exist_ok=True)
        for kind in self.kinds:
            for seed in range(5) if kind == "digits" else self.seeds:
                if kind == "digits":
                    digits(seed, results)
                else:
                    text(kind, seed, list(self.recipes), results, self.work)
        console = Console(width=100)
        for kind in ("demo", "bytes", "digits"):
            if any(k.startswith(f"{kind}/") for k in results.rows):
                console.print(table(results.rows, kind))
        plot(results.rows, self.out.with_suffix(".png"))


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(Main)())
