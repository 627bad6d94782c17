"""What a family of models is trained by and judged by: language models, and Phase 3 networks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from .errors import BitnetError
from .models.folder import ModelFolder
from .models.phase3 import Phase3Config
from .quantize import Scheme
from .train import evaluate, recursion
from .train.distill import distillation
from .train.loss import Loss, next_token
from .train.relation import relation

Tree = Any
Judge = Callable[[nn.Module, Tree, np.ndarray, int], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """How a model is trained and judged.

    Attributes:
      judge: (model, params, windows, batch) -> ``loss``, ``perplexity``, ``accuracy``, ``tokens``
        and, where agreement with the float model is the measure, ``top1`` and ``kl``.
      build: scheme -> the module that is trained; float for None.
      loss: (settings, the teacher's parameters) -> the loss.
      plain: the loss without a teacher.
      agreement: whether agreement with the float model is what counts, not the next token.
    """

    judge: Judge
    build: Callable[[Scheme | None], nn.Module]
    loss: Callable[[Any, Tree], Loss]
    plain: Loss
    agreement: bool = False


def evaluator(source: ModelFolder) -> Judge:
    """What measures this model by itself: the next token, or a Phase 3 network's own loss."""
    if isinstance(source.config, Phase3Config):
        return functools.partial(recursion.evaluate, source.config)
    return evaluate.evaluate


def objective_of(source: ModelFolder, student: ModelFolder | None = None) -> Objective:
    """The objective of a float model, and of a student of the same family that is made from it.

    Args:
      source: the float model: what teaches, and what a Phase 3 network should agree with.
      student: what is trained, if it has another shape.
    """
    config = source.config
    build = (student or source).config.build
    if not isinstance(config, Phase3Config):
        loss = functools.partial(_language, source)
        return Objective(evaluate.evaluate, build, loss, next_token)
    teacher = config.build(None)
    judge = functools.partial(recursion.judge, config, teacher, source.params)
    build = recursion.attached(config).build
    plain = recursion.deep_supervision(config, teacher, {}, mixing=0.0)
    return Objective(judge, build, functools.partial(_recursion, config), plain, agreement=True)


def _language(source: ModelFolder, settings: Any, teacher_params: Tree) -> Loss:
    """Cross entropy, distillation and attention relations, as the settings ask."""
    teacher = source.config.build(None)
    loss = distillation(
        teacher, teacher_params, temperature=settings.temperature, mixing=settings.distill
    )
    if not settings.relation:
        return loss
    layer = settings.relation_layer
    if layer is None:
        if (layers := getattr(source.config, "layers", None)) is None:
            raise BitnetError("relation: say of which layer, relation_layer=...")
        layer = max(layers - 2, 0)
    return relation(loss, teacher, teacher_params, layer=layer, weight=settings.relation)


def _recursion(config: Phase3Config, settings: Any, teacher_params: Tree) -> Loss:
    """Deep supervision and distillation at every step."""
    if settings.relation:
        raise BitnetError("relation: a Phase 3 network is distilled at every step instead")
    return recursion.deep_supervision(
        config,
        config.build(None),
        teacher_params,
        temperature=settings.temperature,
        mixing=settings.distill,
    )
