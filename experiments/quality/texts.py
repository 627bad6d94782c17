"""The bench's language models: floats trained here, and what a recipe makes of them."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from bitnet_jax import checkpoint, demo, phase4, ternarise
from bitnet_jax.calibrate import latent_start
from bitnet_jax.convert import unpack
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.objective import objective_of
from bitnet_jax.optim import mugrokfast
from bitnet_jax.recipe import finish
from bitnet_jax.subnorm import insert_sub_norms
from bitnet_jax.train import data
from bitnet_jax.train.evaluate import evaluate
from bitnet_jax.train.loop import fit
from bitnet_jax.train.text import byte_tokenizer
from bitnet_jax.train.watch import watch


@dataclasses.dataclass(frozen=True)
class Kind:
    """A language model of the bench.

    Attributes:
      config: its shape.
      vocab_size: of a BPE trained on the text; 0 for bytes.
      float_steps: of its float training, 16 windows of 128 tokens each.
      tuning_steps: of one epoch of fine-tuning, 8 windows each, on text not seen before.
      float_rate: peak for the float model continued on that text, so that the yardstick is no straw
        man: on seed 0 2e-3 gave the demo 34.3 % against 33.9 % for 1e-3, and 3e-4 gave bytes 65.5 %
        against 65.0 %.
    """

    config: DecoderConfig
    vocab_size: int
    float_steps: int
    tuning_steps: int
    float_rate: float


KINDS = {
    # The demo's: far from converged, as a model of one's own often is.
    "demo": Kind(demo.DemoSettings().config, 512, 300, 240, 2e-3),
    # Trained for long: more text does little for it.
    "bytes": Kind(
        DecoderConfig(
            vocab_size=257, width=128, layers=4, heads=4, kv_heads=2, hidden=512, max_length=256
        ),
        0, 1500, 160, 3e-4,
    ),
}  # fmt: skip
_BATCH, _TUNING_BATCH, _LENGTH, _HELD_OUT = 16, 8, 128, 400


@dataclasses.dataclass(frozen=True)
class Bed:
    """A float model and its text."""

    source: ModelFolder
    train: np.ndarray
    held_out: np.ndarray


def bed(kind: str, seed: int, work: Path) -> Bed:
    """The float model of a seed, trained now or taken from ``work``, and the text to tune it on."""
    k = KINDS[kind]
    corpus = data.standard_library(6.0)
    tokenizer = byte_tokenizer()
    if k.vocab_size:
        tokenizer = data.train_tokenizer(corpus.train, k.vocab_size)
    train, held_out = (
        data.windows(data.encode(tokenizer, part), _LENGTH, corpus.name)
        for part in (corpus.train, corpus.held_out)
    )
    held_out = held_out[:: max(len(held_out) // _HELD_OUT, 1)][:_HELD_OUT]
    train = train[np.random.default_rng(seed).permutation(len(train))]
    cut = k.float_steps * _BATCH
    rest = train[cut : cut + k.tuning_steps * _TUNING_BATCH]
    path = work / f"{kind}-{seed}"
    if not checkpoint.exists(path):
        checkpoint.save(path, _train(k, train[:cut], seed))
    params = jax.tree.map(jax.numpy.asarray, checkpoint.load(path).tree)
    return Bed(ModelFolder(k.config, None, params, tokenizer), rest, held_out)


def _train(k: Kind, train: np.ndarray, seed: int) -> Any:
    """The float training of the demo, from this seed's first weights."""
    model = Decoder(k.config)
    params = model.init(jax.random.key(seed), train[:1, :-1])
    steps = len(train) // _BATCH
    rate = optax.warmup_cosine_decay_schedule(0.0, 8e-3, steps // 10, steps, 8e-4)
    optimizer = mugrokfast(rate, weight_decay=0.1)
    return fit(model, params, optimizer, train, epochs=1, batch=_BATCH, stage="float").params


def settings(kind: str, seed: int, **changes: Any) -> phase4.Settings:
    """The main job's settings for a recipe on one of the models."""
    common = {"batch": _TUNING_BATCH, "seed": seed, "float_learning_rate": KINDS[kind].float_rate}
    return phase4.Settings(**(common | changes))


def continued(bed: Bed, job: phase4.Settings) -> tuple[Any, dict]:
    """The float model trained on: its weights, and its scores."""
    steps = len(bed.train) // job.batch * job.epochs
    fitted = fit(
        Decoder(bed.source.config), bed.source.params,
        phase4.fine_tuner(job, job.float_learning_rate, steps), bed.train,
        epochs=job.epochs, batch=job.batch, seed=job.seed, stage="float continued",
    )  # fmt: skip
    scores = evaluate(Decoder(bed.source.config), fitted.params, bed.held_out)
    return fitted.params, _row(scores, fitted.seconds)


def converted(bed: Bed, job: phase4.Settings) -> dict:
    """Scores of the conversion without training, by the rule or by data."""
    began = time.perf_counter()
    tree = jax.block_until_ready(phase4.convert_source(bed.source, bed.train, job).tree)
    seconds = time.perf_counter() - began
    return _row(evaluate(bed.source.config.build(job.scheme), tree, bed.held_out), seconds)


def tuned(bed: Bed, job: phase4.Settings, teacher: Any) -> dict:
    """Scores after fine-tuning with a recipe, and what its codes did on the way."""
    student = bed.source
    if job.sub_norms:
        student = insert_sub_norms(student, bed.train[:16])
    params = student.params
    if job.start == "data":
        tree = unpack(phase4.convert_source(student, bed.train, job).tree)
        params = latent_start(params, tree, job.scheme, job.keep)
    steps = len(bed.train) // job.batch * job.epochs
    recipe = phase4.recipe_of(job, steps)
    model = student.config.build(job.scheme)
    loss = objective_of(bed.source).loss(job, teacher)
    fitted = fit(
        model, params, phase4.fine_tuner(job, job.learning_rate, steps), bed.train,
        epochs=job.epochs, batch=job.batch, seed=job.seed, loss=loss, recipe=recipe,
        watch=watch(job.policy, job.scheme, recipe), stage="ternary",
    )  # fmt: skip
    packed = ternarise(finish(recipe, fitted.params), job.policy, job.scheme)
    curve = [
        {k: round(x[k], 5) for k in ("step", "loss", "flips", "zeros", "latent")}
        for x in fitted.history[:: max(len(fitted.history) // 60, 1)]
    ]
    return _row(evaluate(model, packed, bed.held_out), fitted.seconds) | {"curve": curve}


def _row(scores: dict, seconds: float) -> dict:
    return {k: scores[k] for k in ("loss", "accuracy")} | {"seconds": round(seconds, 1)}
