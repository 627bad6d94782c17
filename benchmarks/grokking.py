"""Steps to grok x * y mod 97: Muon, MuGrokfast and AdamW; a float and a ternary transformer.

    python benchmarks/grokking.py --tune --out benchmarks/results/grokking_tuning.json
    python benchmarks/grokking.py --out benchmarks/results/grokking.json

The model has one block and reads "x op y =", answering at the last position only; the hidden
kernels of the ternary one are BitDense layers (absmean, one scale a tensor, int8 activations).
Half of the 97^2 products are trained on. The figure is the first of every 25 steps at which 95 %
of the others are answered right: steps, not seconds, so that a busy machine measures the same.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bitnet_jax import BitDense, Scheme
from bitnet_jax.optim import grokfast_ema, mugrokfast

P, WIDTH, HEADS, BATCH, EVERY, GOAL = 97, 128, 4, 512, 25, 0.95
WARMUP = 10


class Block(nn.Module):
    """One pre-norm transformer block, its query only at the last position; tokens to logits."""

    scheme: Scheme | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, 4) tokens to (batch, 97) logits."""
        dense = functools.partial(nn.Dense, use_bias=False)
        hidden = (
            dense
            if self.scheme is None
            else functools.partial(BitDense, use_bias=False, scheme=self.scheme)
        )
        init = nn.initializers.normal(0.02)
        x = nn.Embed(P + 2, WIDTH, embedding_init=init, name="embed")(tokens)
        x = x + self.param("position_embedding", init, (tokens.shape[1], WIDTH))
        y, last = nn.RMSNorm(name="norm_1")(x), x[:, -1]
        heads = lambda a: a.reshape(len(tokens), -1, HEADS, WIDTH // HEADS)
        query = heads(hidden(WIDTH, name="query")(y[:, -1:]))
        key, value = (heads(hidden(WIDTH, name=n)(y)) for n in ("key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(last.shape)
        last = last + hidden(WIDTH, name="out")(mixed)
        y = nn.gelu(hidden(4 * WIDTH, name="up")(nn.RMSNorm(name="norm_2")(last)))
        last = last + hidden(WIDTH, name="down")(y)
        return dense(P, name="head")(nn.RMSNorm(name="norm_3")(last))


def products(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Half of all (x, op, y, =) -> x y mod 97 to train on, and the other half."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(P), np.arange(P)))
    tokens = np.stack([x, np.full_like(x, P), y, np.full_like(x, P + 1)], 1).astype(np.int32)
    order = np.random.default_rng(seed).permutation(P * P)
    answers = (x * y % P).astype(np.int32)
    return tuple((tokens[i], answers[i]) for i in np.array_split(order, 2))


def _warm(rate: float) -> optax.Schedule:
    return optax.linear_schedule(rate / WARMUP, rate, WARMUP)


def _muon(rate: float, decay: float, adam: float, **options: Any):
    return mugrokfast(
        _warm(rate), adam_learning_rate=_warm(adam), weight_decay=decay, clip=np.inf, **options
    )


def _adamw(rate: float, decay: float, filter: optax.GradientTransformation | None = None):
    """The published baseline's betas; every leaf decays, as there."""
    rule = optax.adamw(_warm(rate), b1=0.9, b2=0.98, weight_decay=decay)
    return rule if filter is None else optax.chain(filter, rule)


def entrants(ternary: bool) -> Mapping[str, Callable[[], optax.GradientTransformation]]:
    """The optimizers by name; the rates of Muon and AdamW are the best of `candidates`."""
    muon = functools.partial(_muon, *MUON[ternary])
    rate, decay = TUNED[ternary]
    return {
        "Muon": muon,
        "NorMuon": functools.partial(muon, normuon=0.95),
        "MuGrokfast (.9, 1)": functools.partial(muon, alpha=0.9, lamb=1.0),
        "MuGrokfast (.98, 2)": functools.partial(muon, alpha=0.98, lamb=2.0),
        f"AdamW {rate:g}, decay {decay:g} (tuned)": functools.partial(_adamw, rate, decay),
        "AdamW 0.001, decay 1": functools.partial(_adamw, 1e-3, 1.0),
        "the same + Grokfast (.98, 2)": lambda: _adamw(1e-3, 1.0, grokfast_ema(0.98, 2.0)),
    }


def candidates(ternary: bool) -> Mapping[str, Callable[[], optax.GradientTransformation]]:
    """The grid the rates below were chosen from, on the first seed that does not race."""
    steps = ((0.01, 0.3), (0.01, 0.6), (0.01, 1.0), (0.02, 0.3), (0.02, 0.6))
    muons = [(rate, decay, adam) for rate, decay in steps for adam in (1e-3, 3e-3)]
    adams = [(2e-3, 1.0), (3e-3, 0.3), (3e-3, 1.0), (5e-3, 0.3), (5e-3, 1.0)]
    adams += [(5e-3, 2.0), (1e-2, 0.3), (1e-2, 0.6), (1e-2, 1.0), (2e-2, 0.3)]
    found: dict[str, Callable] = {}
    for m in muons:
        found[f"Muon {m[0]:g}, decay {m[1]:g}, Adam {m[2]:g}"] = functools.partial(_muon, *m)
    for a in adams:
        found[f"AdamW {a[0]:g}, decay {a[1]:g}"] = functools.partial(_adamw, *a)
    return found


# (Muon's rate, decay, Adam's rate) and AdamW's (rate, decay), by "is it ternary": the fewest steps
# in the grid, and of those that tie the lowest held-out loss.
MUON = {False: (0.01, 1.0, 3e-3), True: (0.01, 0.6, 3e-3)}
TUNED = {False: (0.01, 0.6), True: (0.01, 0.3)}


@dataclasses.dataclass(frozen=True)
class Race:
    """One run: step, losses and accuracies at every 25 steps; ``steps`` is None if it failed."""

    steps: int | None
    history: list[dict[str, float]]


def chunk(model: nn.Module, optimizer: optax.GradientTransformation) -> Callable:
    """A compiled function: 25 steps, then the loss and accuracy of both halves."""

    def loss(params, tokens, answers):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    def score(params, data):
        logits = model.apply(params, data[0])
        right = (logits.argmax(-1) == data[1]).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean(), right

    @jax.jit
    def run(params, state, key, train, held_out):
        def step(carry, key):
            params, state = carry
            pick = jax.random.randint(key, (BATCH,), 0, len(train[0]))
            grads = jax.grad(loss)(params, train[0][pick], train[1][pick])
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), jax.random.split(key, EVERY))
        return params, state, (*score(params, train), *score(params, held_out))

    return run


def race(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    cap: int = 1500,
    run: Callable | None = None,
    tick: Callable[[int], Any] = lambda steps: None,
) -> Race:
    """Train until 95 % of the held-out products are right, or ``cap`` steps.

    Args:
      model: tokens (batch, 4) to logits (batch, 97), such as `Block`.
      optimizer: an optax transformation.
      seed: of the split, the initial weights and the batches.
      cap: give up after so many steps.
      run: ``chunk(model, optimizer)``, to compile it once for several seeds.
      tick: called with the steps done, after every 25.

    Returns:
      The step that reached it, and losses and accuracies on the way.
    """
    run, (train, held_out) = run or chunk(model, optimizer), products(seed)
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, train[0][:1])
    state, history = optimizer.init(params), []
    names = ("train_loss", "train_accuracy", "loss", "accuracy")
    for step in range(EVERY, cap + 1, EVERY):
        params, state, scores = run(params, state, jax.random.fold_in(key, step), train, held_out)
        history.append({"step": step, **{n: round(float(x), 5) for n, x in zip(names, scores)}})
        tick(step)
        if history[-1]["accuracy"] >= GOAL:
            return Race(step, history)
    return Race(None, history)


def table(results: list[dict], seeds: list[int], cap: int) -> Table:
    """Rows of optimizers; columns of the median and each seed, float and ternary."""
    screen = Table(title=f"steps to {GOAL:.0%} on held-out products (x * y mod {P})")
    screen.add_column("optimizer")
    screen.add_column("model")
    for name in ("median", *(f"seed {s}" for s in seeds)):
        screen.add_column(name, justify="right")
    for row in results:
        steps = [r["steps"] for r in row["runs"]]
        middle = statistics.median([cap + 1 if s is None else s for s in steps])
        cells = [middle if middle <= cap else None, *steps]
        shown = (f"over {cap}" if s is None else f"{s:g}" for s in cells)
        screen.add_row(row["optimizer"], row["model"], *shown)
    return screen


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may be told on the command line.

    Attributes:
      out: JSON file for the result, losses included; the printed table goes beside it as .txt.
      seeds: runs of each.
      cap: most steps of a run.
      tune: run the grid the rates were chosen from instead, on one seed more.
    """

    out: Path | None = None
    seeds: int = 3
    cap: int = 1500
    tune: bool = False


def main(arguments: Arguments) -> list[dict]:
    """Run every optimizer on both models; print the table."""
    console, results, started = Console(width=100), [], time.perf_counter()
    seeds = [arguments.seeds] if arguments.tune else list(range(arguments.seeds))
    field, models = candidates if arguments.tune else entrants, (Block(), Block(Scheme()))
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        for model in models:
            kind = "float" if model.scheme is None else "ternary"
            for name, make in field(kind == "ternary").items():
                task = bar.add_task(f"{kind}, {name}", total=len(seeds) * arguments.cap)
                runs = _runs(
                    model, make(), seeds, arguments.cap, functools.partial(bar.update, task)
                )
                results.append({"model": kind, "optimizer": name, "runs": runs})
                bar.remove_task(task)
    shown = table(results, seeds, arguments.cap)
    console.print(shown)
    if arguments.out:
        _save(arguments, results, shown, time.perf_counter() - started)
    return results


def _runs(model, optimizer, seeds: list[int], cap: int, update: Callable) -> list[dict]:
    run, runs = chunk(model, optimizer), []
    for i, seed in enumerate(seeds):
        tick = lambda step, i=i: update(completed=i * cap + step)
        runs.append(dataclasses.asdict(race(model, optimizer, seed, cap, run, tick)))
    return runs


def _save(arguments: Arguments, results: list[dict], shown: Table, seconds: float) -> None:
    setup = {"p": P, "width": WIDTH, "heads": HEADS, "batch": BATCH, "every": EVERY, "goal": GOAL}
    setup |= {"seeds": arguments.seeds, "cap": arguments.cap, "ternary": "absmean, tensor"}
    setup |= {"muon": list(MUON.values()), "tuned": list(TUNED.values())}
    setup |= {"tune": arguments.tune, "jax": jax.__version__}
    data = {"setup": setup, "seconds": round(seconds), "results": results}
    arguments.out.write_text(json.dumps(data) + "\n")
    with arguments.out.with_suffix(".txt").open("w") as file:
        Console(file=file, width=100).print(shown)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
