"""The main job: measure, plan, convert, fine-tune, pack, reload, verify, report."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from . import advice, checkpoint, report
from .calibrate import calibrate, latent_start
from .convert import (
    Converted,
    Report,
    check_finite,
    convert,
    pack,
    prequantize,
    ternarise,
    unpack,
)
from .convert import report as table_of
from .errors import BitnetError
from .half import exact_in_half
from .leaf import is_quantized
from .models.folder import ModelFolder, PythonModule, load_model, save_model
from .models.generate import Sampling, stream
from .objective import Objective, objective_of
from .optim import adamw, mugrokfast, two_stage
from .output import RESUME
from .policy import Policy
from .quantize import Scheme
from .recipe import DeadZone, LearnedScales, Part, Planned, Residual, WarmUp, finish
from .subnorm import insert_sub_norms
from .train.data import padded, steps_per_epoch
from .train.loop import Fit, fit
from .train.loss import compiled_logits
from .train.state import committed
from .train.watch import watch

Tree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the main job may be told; the defaults are what won on the bench (docs/results.md).

    Attributes:
      scheme: how latent weights become ternary.
      policy: which leaves become ternary and what the others are kept in.
      start: convert by what the text does to each matrix (`bitnet_jax.calibrate`), or by the
        scheme's rule alone.
      start_windows: windows of text the conversion looks at.
      keep: where training starts: 1 for the float weights, towards 0 for those that quantise to
        what was converted, see `bitnet_jax.calibrate.latent_start`. Under our budgets 1 won; what
        the conversion saves is what no training, or little of it, has to bring back.
      epochs: passes over the text of fine-tuning through the straight-through estimator; 0 to pack
        what was converted.
      batch: windows of text in memory at once.
      accumulate: batches whose gradients are averaged for one step.
      patience: epochs without a lower held-out loss after which a training stops; None for never.
      distill: weight of the float model's distribution in the loss of fine-tuning, 0..1.
      temperature: of both distributions then.
      teacher: which float model that is: as it came, or continued on the same tokens.
      relation: weight of the attention relations of ``relation_layer`` in the loss, see
        `bitnet_jax.train.relation`.
      relation_layer: counted from 0; None for the last but one of a `Decoder`.
      warmup: share of the steps in which quantisation sets in, see `bitnet_jax.recipe.WarmUp`.
      learn_scales: train the scales too, see `bitnet_jax.recipe.LearnedScales`.
      dead_zone: strength of `bitnet_jax.recipe.DeadZone`, which fades to 0.
      residual: add the fading float product of `bitnet_jax.recipe.Residual`.
      sub_norms: first put norms in front of the output projections; changes the function, see
        `bitnet_jax.subnorm`.
      schedule: cosine to zero, or the two stages of `bitnet_jax.optim.two_stage`.
      optimizer: AdamW by default: on the demo it came as far a step as Muon, in 0.6 of its time.
      learning_rate: peak for the ternary model; decays to zero.
      float_learning_rate: peak for the float model that is continued beside it.
      weight_decay: of the matrices.
      compare: also continue the float model on the same tokens, the honest yardstick.
      seed: fixes the order of the text and the sampling.
    """

    scheme: Scheme = Scheme("absmean")
    policy: Policy = Policy()
    start: Literal["data", "rule"] = "data"
    start_windows: int = 128
    keep: float = 1.0
    epochs: int = 3
    batch: int = 8
    accumulate: int = 1
    patience: int | None = None
    distill: float = 0.5
    temperature: float = 1.0
    teacher: Literal["source", "continued"] = "continued"
    relation: float = 0.0
    relation_layer: int | None = None
    warmup: float = 0.0
    learn_scales: bool = False
    dead_zone: float = 0.0
    residual: bool = False
    sub_norms: bool = False
    schedule: Literal["cosine", "two-stage"] = "cosine"
    optimizer: Literal["adamw", "mugrokfast"] = "adamw"
    learning_rate: float = 2e-3
    float_learning_rate: float = 1e-3
    weight_decay: float = 0.1
    compare: bool = True
    seed: int = 0


def fine_tuner(
    settings: Settings, rate: float, steps: int, variables: Tree = None
) -> optax.GradientTransformation:
    """The optimizer of fine-tuning, with a short warm-up and a schedule to zero.

    Of ``variables`` with several collections only ``params`` are trained: a long-term memory or
    running statistics are the network's own to change.
    """
    decay: Any = settings.weight_decay
    if settings.schedule == "two-stage":
        schedule, decay = two_stage(rate, max(steps, 2), weight_decay=decay)
    else:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 20, 1), max(steps, 2))
    make = {"adamw": adamw, "mugrokfast": mugrokfast}[settings.optimizer]
    return only_params(make(schedule, weight_decay=decay), variables)


def only_params(optimizer: optax.GradientTransformation, variables: Tree):
    """The optimizer for variables of which only the collection ``params`` is trained."""
    if set(variables or ()) <= {"params"} or "params" not in variables:
        return optimizer
    others = {k: k != "params" for k in variables}
    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), others))


def recipe_of(settings: Settings, steps: int, params: Tree = None) -> tuple[Part, ...]:
    """The parts the settings ask for, of a training of so many steps; () for the plain one.

    With the parameters it is known whether the policy keeps some in 8 or 4 bits: `Planned` then.
    """
    policy, scheme = settings.policy, settings.scheme
    parts: list[Part] = []
    if settings.learn_scales:
        parts.append(LearnedScales(policy, scheme))
    if settings.dead_zone:
        dead_zone = DeadZone(settings.dead_zone, steps, policy=policy, scheme=scheme)
        parts.append(dead_zone)
    if settings.residual:
        parts.append(Residual(steps, policy=policy))
    if settings.warmup:
        parts.append(WarmUp(max(round(settings.warmup * steps), 1), policy, scheme))
    planned = Planned(policy, scheme)
    if params is not None and planned.concerns(params):
        parts.append(planned)
    return tuple(parts)


def convert_source(
    source: ModelFolder, text: np.ndarray, settings: Settings, console: Console | None = None
) -> Converted:
    """The float model made ternary without training, by the start the settings ask for.

    Args:
      source: the float model.
      text: windows (n, length + 1); a number of them, spread evenly, are looked at.
    """
    if settings.start == "rule":
        return convert(source.params, settings.policy, settings.scheme)
    count = min(settings.start_windows, len(text)) // settings.batch * settings.batch
    chosen = text[:: max(len(text) // max(count, 1), 1)][:count, :-1]
    batches = [jnp.asarray(chosen[i : i + settings.batch]) for i in range(0, count, settings.batch)]
    stages = source.stages(settings.scheme)
    try:
        tree = calibrate(
            source.params, stages, batches, settings.policy, settings.scheme, console=console
        )
    except Exception as e:
        # A network of the user's may do what cannot be differentiated or mapped over.
        if isinstance(e, BitnetError) or not isinstance(source.config, PythonModule):
            raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        screen = console or Console(quiet=True)
        screen.print(f"[yellow]converted by the rule alone[/]: {reason}", highlight=False)
        return convert(source.params, settings.policy, settings.scheme)
    tree = pack(tree)
    return Converted(tree, table_of(source.params, tree, settings.policy))


def run(
    source: ModelFolder,
    text: np.ndarray,
    held_out: np.ndarray,
    out: Path,
    settings: Settings = Settings(),
    prompt: str = "def ",
    console: Console | None = None,
    history: list[dict] | None = None,
    sinks: Sequence[Callable[[dict], None]] = (),
) -> dict:
    """Turn a float language model into a packed ternary one, and say what that cost.

    Args:
      source: the float model (its ``scheme`` is None), a `Decoder` or a network of the user's.
      text: windows (n, length + 1) of tokens to fine-tune on.
      held_out: windows to measure on, of documents the model never trains on.
      out: an existing folder; gets ``packed/``, ``float32/``, ``latent/`` (the weights to train
        on from), ``metrics.jsonl`` and the report. A job that was killed goes on in its folder,
        with the same result, if it is run again with the same arguments.
      settings: see `Settings`.
      prompt: what the sample of generated text continues.
      console: where progress is shown; None for silence.
      history: entries of an earlier training, to be drawn in the same curves.
      sinks: called with every entry of the trainings, see `bitnet_jax.train.sinks`.

    Returns:
      The report as plain data; `bitnet_jax.report` documents its keys. The same is in
      ``out/report.json``.

    Raises:
      BitnetError: for weights with NaN or infinity, text too short for one batch, a loss that
        diverges, or files that cannot be written.
    """
    screen = console or Console(quiet=True)
    say, busy = screen.print, functools.partial(screen.status, spinner="line")
    started = time.perf_counter()
    check_finite(source.params)
    source = dataclasses.replace(source, params=committed(source.params))
    steps_per_epoch(text, settings.batch * settings.accumulate)
    float_model = source.config.build(None)
    student = source
    if settings.sub_norms:
        student = insert_sub_norms(source, text[:16], console=screen)
    objective = objective_of(source, student)
    ternary_model = student.config.build(settings.scheme)
    measure = lambda model, params: objective.judge(model, params, held_out, settings.batch)
    # Packed to be measured too: one program for all of them.
    rounded = lambda params: pack(ternarise(params, settings.policy, settings.scheme))
    size = sum(x.size for x in jax.tree.leaves(source.params))

    say("[bold]1 measure[/] the float model on held-out text")
    with busy("measuring"):
        scores = {"float": measure(float_model, source.params)}
    if not scores["float"]["accuracy"] and not objective.agreement:
        raise BitnetError("the float model guesses no token right; train it before converting it")

    say("[bold]2 plan and convert[/]")
    first = convert_source(student, text, settings, console)
    say(report.plan_table(first.report))
    with busy("measuring"):
        if settings.start == "data":
            scores["rounded"] = measure(ternary_model, rounded(student.params))
        scores["converted"] = measure(ternary_model, first.tree)
        others = {}
        integers = settings.scheme.rule in ("int8", "int4")
        if size < advice.SMALL and not integers and not objective.agreement:
            others = advice.alternatives(source, held_out, settings.policy, settings.batch)

    if settings.epochs:
        say(f"[bold]3 fine-tune[/], epochs: {settings.epochs}")
        latent = latent_start(student.params, unpack(first.tree), settings.scheme, settings.keep)
        begun = dataclasses.replace(student, params=latent)
        tuned, continued = _fine_tune(
            source, begun, objective, text, held_out, out, settings, console, sinks
        )
    else:
        tuned, continued = Fit(unpack(first.tree), [], 0.0), None
    for name, fitted in (("float_continued", continued), ("fine_tuned", tuned)):
        if fitted is None or not fitted.steps:
            continue
        ternary = fitted is tuned
        params = rounded(fitted.params) if ternary else fitted.params
        with busy("measuring"):
            scores[name] = measure(ternary_model if ternary else float_model, params)
    chosen = tuned
    away = lambda: scores["fine_tuned"]["kl"] > scores["converted"]["kl"]
    if objective.agreement and tuned.steps and away():
        # Nothing is gained from a training that leads away from the model to agree with.
        say("[yellow]fine-tuning led away from the float model: what was converted is packed[/]")
        chosen = Fit(unpack(first.tree), [], 0.0)

    say("[bold]4 pack, reload, verify[/]")
    with busy("packing and measuring"):
        conversion, reloaded, same = _pack(
            source, student, chosen.params, held_out, out, settings, exact=objective.agreement
        )
        scores["packed"] = measure(reloaded.model, reloaded.params)

    windows = tuned.steps * settings.batch * settings.accumulate
    result = {
        "scheme": dataclasses.asdict(settings.scheme),
        "parameters": size,
        "alternatives": others,
        "epochs": settings.epochs,
        "tokens": {
            "fine_tuning": windows * (text.shape[1] - 1),
            "held_out": scores["float"]["tokens"],
        },
        "scores": scores,
        **_accuracy_loss(scores),
        **({"disagreement": 1 - scores["packed"]["top1"]} if objective.agreement else {}),
        "packed_is": _origin(chosen),
        "packed_equals_memory": same,
        **_sizes(out),
        "conversion": conversion.as_dict(),
        "sample": "" if objective.agreement else sample(reloaded, prompt, seed=settings.seed),
        "seconds": _seconds(started, tuned, continued),
    }
    curves = (history or []) + tuned.history + (continued.history if continued else [])
    report.write(out, result, curves, chosen.params, reloaded.params)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    return result


def _pack(
    source: ModelFolder,
    student: ModelFolder,
    latent: Tree,
    held_out: np.ndarray,
    out: Path,
    settings: Settings,
    exact: bool,
) -> tuple[Report, ModelFolder, bool]:
    """Pack and save the tuned model, and the source in float32 beside it; reload and compare.

    Returns:
      What became of every leaf, the model as reloaded, and whether its logits are the same.
    """
    tree = ternarise(latent, settings.policy, settings.scheme)
    if exact:
        floats = lambda x, y: y if is_quantized(x) else x
        known = jax.tree.map(floats, latent, student.params, is_leaf=is_quantized)
        tree = exact_in_half(tree, known)
    tree = pack(tree)
    ternary = dataclasses.replace(student, scheme=settings.scheme, params=tree)
    save_model(out / "packed", ternary, overwrite=True)
    full = jax.tree.map(_float32, source.params)
    save_model(out / "float32", dataclasses.replace(source, params=full), overwrite=True)
    module = source.config if isinstance(source.config, PythonModule) else None
    reloaded = load_model(out / "packed", module)
    if not (same := _same_logits(ternary, reloaded, held_out, settings.batch)):
        raise BitnetError(f"{out / 'packed'}: reloaded, it gives other logits than in memory")
    return table_of(latent, tree, settings.policy), reloaded, same


def _origin(chosen: Fit) -> str:
    """Which weights were packed: as converted, or of the training's last or best epoch."""
    if not chosen.steps:
        return "converted"
    return "best" if chosen.stopped else "last"


def _seconds(started: float, tuned: Fit, continued: Fit | None) -> dict[str, float]:
    return {
        "fine_tuning": round(tuned.seconds, 1),
        "float_continued": round(continued.seconds, 1) if continued else 0.0,
        "job": round(time.perf_counter() - started, 1),
    }


def _fine_tune(
    source: ModelFolder,
    student: ModelFolder,
    objective: Objective,
    text: np.ndarray,
    held_out: np.ndarray,
    out: Path,
    settings: Settings,
    console: Console | None,
    sinks: Sequence[Callable[[dict], None]],
) -> tuple[Fit, Fit | None]:
    """The ternary model and, to compare or to teach, the float one: same tokens, same order."""
    steps = steps_per_epoch(text, settings.batch * settings.accumulate) * settings.epochs
    common: dict[str, Any] = {
        "epochs": settings.epochs,
        "batch": settings.batch,
        "accumulate": settings.accumulate,
        "patience": settings.patience,
        "seed": settings.seed,
        "held_out": held_out,
        "log": out / "metrics.jsonl",
        "sinks": sinks,
        "console": console,
    }
    continued = None
    if settings.compare or settings.teacher == "continued":
        continued = fit(
            objective_of(source).build(None),
            source.params,
            fine_tuner(settings, settings.float_learning_rate, steps, source.params),
            text,
            stage="continue float",
            loss=objective.plain,
            judge=objective.judge,
            keep=out / RESUME / "continued",
            resume=out / RESUME / "float",
            **common,
        )
        if continued.stopped:  # early: the last epochs were no better
            best = checkpoint.load(out / RESUME / "continued" / "best").tree
            continued = dataclasses.replace(continued, params=best)
    teacher = source.params
    if continued is not None and settings.teacher == "continued":
        teacher = continued.params
    recipe = recipe_of(settings, steps, student.params)
    once = lambda latent: prequantize(latent, settings.policy, settings.scheme)
    tuned = fit(
        objective.build(settings.scheme),
        student.params,
        fine_tuner(settings, settings.learning_rate, steps, student.params),
        text,
        stage="fine-tune ternary",
        judge=lambda m, p, data, batch: objective.judge(
            m, pack(ternarise(p, settings.policy, settings.scheme)), data, batch
        ),
        loss=objective.loss(settings, teacher),
        prequantize=once if settings.accumulate > 1 else None,
        recipe=recipe,
        watch=watch(settings.policy, settings.scheme, recipe),
        keep=out / "latent",
        resume=out / RESUME / "ternary",
        **common,
    )
    if tuned.stopped:
        best = checkpoint.load(out / "latent" / "best").tree
        tuned = dataclasses.replace(tuned, params=best)
    tuned = dataclasses.replace(tuned, params=finish(recipe, tuned.params))
    return tuned, continued if settings.compare else None


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _accuracy_loss(scores: dict[str, dict]) -> dict:
    """1 - accuracy of the packed model over that of a float one, for both yardsticks."""
    accuracy = {k: v["accuracy"] for k, v in scores.items()}
    # A model that was done learning loses a little when it is continued: the better one counts.
    name = max(("float", "float_continued"), key=lambda k: accuracy.get(k, 0.0))
    lost = lambda kept, of: 1 - accuracy[kept] / accuracy[of] if accuracy[of] else 0.0
    return {
        "yardstick": name,
        "relative_accuracy_loss": lost("packed", name),
        "relative_accuracy_loss_to_source": lost("packed", "float"),
        "relative_accuracy_loss_unturned": lost("converted", "float"),
    }


def _sizes(out: Path) -> dict:
    """Bytes on disk of the float32 and the packed folder, everything counted, and their ratio."""
    packed, full = (checkpoint.size_on_disk(out / name) for name in ("packed", "float32"))
    return {
        "bytes_on_disk": {"float32": full, "packed": packed},
        "ratio_on_disk": full / packed,
    }


def _same_logits(a: ModelFolder, b: ModelFolder, held_out: np.ndarray, batch: int) -> bool:
    """Whether two models give the same logits, bit for bit, on a batch of held-out text."""
    rows, _ = next(padded(held_out, batch))
    x, y = (np.asarray(compiled_logits(m.model, m.params, rows)) for m in (a, b))
    return bool((x.view(np.int32) == y.view(np.int32)).all())


def sample(
    source: ModelFolder, prompt: str, steps: int = 64, temperature: float = 0.7, seed: int = 0
) -> str:
    """The prompt and its continuation as text, drawn among the 40 likeliest tokens."""
    tokens = jnp.asarray([source.tokenizer.encode(prompt).ids])
    how = Sampling(temperature, top_k=40)
    new = stream(source.model, source.params, tokens, steps, jax.random.key(seed), how)
    return source.tokenizer.decode([*tokens[0].tolist(), *(int(t[0]) for t in new)])
