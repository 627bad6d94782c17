"""Phase 5's side of the hand-off: train on from the folder, pack again, hand on again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from . import handoff
from .convert import pack, ternarise, unpack
from .half import exact_in_half
from .leaf import is_quantized
from .objective import objective_of
from .optim import PRESETS, preset
from .output import write_json
from .phase4 import only_params
from .policy import Policy
from .quantize import Scheme
from .recipe import Planned, finish
from .train.data import steps_per_epoch
from .train.loop import fit
from .train.watch import watch

Tree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the next phase may be told.

    Attributes:
      epochs: passes over the text.
      batch: windows a step.
      learning_rate: peak of Muon's rate, which decays to zero; None for the preset's of phase 5.
      seed: fixes the order of the text.
    """

    epochs: int = 1
    batch: int = 8
    learning_rate: float | None = None
    seed: int = 0


def same_codes(latent: Tree, packed: Tree, policy: Policy, scheme: Scheme) -> bool:
    """Whether latent weights quantise to the codes of a packed tree, every one of them."""
    tree = exact_in_half(ternarise(latent, policy, scheme), latent)
    again = jax.tree.leaves(tree, is_leaf=is_quantized)
    wanted = jax.tree.leaves(unpack(packed), is_leaf=is_quantized)
    pairs = [(a, b) for a, b in zip(again, wanted) if is_quantized(b)]
    return all(bool(jnp.array_equal(a.codes, b.codes)) for a, b in pairs)


def run(
    folder: Path,
    text: np.ndarray,
    held_out: np.ndarray,
    out: Path,
    settings: Settings = Settings(),
    console: Console | None = None,
    sinks: Sequence[Callable[[dict], None]] = (),
) -> dict:
    """Train a handed-over model on, through the straight-through estimator, and pack it again.

    Args:
      folder: what `bitnet_jax.handoff.write` made.
      text: windows (n, length + 1) of tokens to train on.
      held_out: windows to measure on.
      out: an existing folder; gets ``metrics.jsonl``, ``report.json`` and ``phase5/``, a hand-off
        folder again, with the latent weights.
      settings: see `Settings`.
      console: where progress is shown; None for silence.
      sinks: called with every entry of the training.

    Returns:
      ``scores`` before and after (``handed_over``, ``packed``; of a Phase 3 network also how far it
      agrees with the model that was handed over), ``same_codes``, ``epochs``, ``steps``,
      ``seconds``, ``formats``.

    Raises:
      BitnetError: if the folder is damaged, the text too short, or the loss diverges.
    """
    screen = console or Console(quiet=True)
    packed, latent, policy = handoff.load(folder)
    scheme = packed.scheme
    assert scheme is not None  # load refuses a float model
    objective = objective_of(packed)
    same = same_codes(latent, packed.params, policy, scheme)
    measure = lambda model, params: objective.judge(model, params, held_out, settings.batch)
    with screen.status("measuring", spinner="line"):
        scores = {"handed_over": measure(packed.model, packed.params)}
    steps = steps_per_epoch(text, settings.batch) * settings.epochs
    peak = settings.learning_rate or PRESETS[5]["learning_rate"]
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), max(steps, 2))
    planned = Planned(policy, scheme)
    recipe = (planned,) if planned.concerns(latent) else ()
    fitted = fit(
        objective.build(scheme),
        jax.tree.map(_float32, latent),
        only_params(preset(5, learning_rate=rate), latent),
        text,
        epochs=settings.epochs,
        batch=settings.batch,
        seed=settings.seed,
        loss=objective.plain,
        recipe=recipe,
        watch=watch(policy, scheme, recipe),
        judge=lambda m, p, data, batch: objective.judge(
            m, ternarise(p, policy, scheme), data, batch
        ),
        held_out=held_out,
        stage="phase 5",
        log=out / "metrics.jsonl",
        sinks=sinks,
        console=console,
    )
    trained = finish(recipe, fitted.params)
    tree = exact_in_half(ternarise(trained, policy, scheme), trained)
    after = dataclasses.replace(packed, params=pack(tree))
    with screen.status("measuring", spinner="line"):
        scores["packed"] = measure(after.model, after.params)
    told = handoff.write(
        out / "phase5", after, policy, latent=trained, scores=scores,
        description=_description(folder), beside=folder,
    )  # fmt: skip
    result = {
        "scores": scores,
        "same_codes": same,
        "epochs": settings.epochs,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "formats": told["formats"],
    }
    write_json(out / "report.json", result)
    return result


def table(result: dict) -> Table:
    """The model before and after, for a person."""
    found = Table(title="Held-out text", title_justify="left")
    found.add_column("model")
    agreement = ("same token", "KL (nats)") if "top1" in result["scores"]["packed"] else ()
    for name in ("loss (nats)", "accuracy", *agreement):
        found.add_column(name, justify="right")
    for key, label in (("handed_over", "handed over"), ("packed", "trained on, packed")):
        x = result["scores"][key]
        agrees = [f"{100 * x['top1']:.2f} %", f"{x['kl']:.4f}"] if agreement else []
        found.add_row(label, f"{x['loss']:.4f}", f"{100 * x['accuracy']:.2f} %", *agrees)
    return found


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _description(folder: Path) -> dict:
    file = folder / "model.json"
    return json.loads(file.read_text()) if file.is_file() else {}
