"""How each method trains. A new method is a class here and a line in `ADAPTERS`.

An adapter turns one batch into named losses; everything else (data, schedule, optimiser, files) is the same for all.
Weights that belong to stages live under `prune.` in the model, which is all the loop knows of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Context, Method, Scorer, Stage, StageRequest, TopK, quarter_blocks
from edgeprune.pruning.model import PrunedViT
from edgeprune.training import losses
from edgeprune.training.masking import MaskedOutput, masked_forward
from edgeprune.training.recipes import Recipe


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        images: [B, C, H, W] float32 normalised.
        labels: [B] int64.
        epoch: epochs done so far, with the fraction of the current one.
    """

    images: Tensor
    labels: Tensor
    epoch: float


@dataclass(frozen=True)
class Setup:
    """What an adapter is built from.

    Attributes:
        options: the method's options, all of them.
        teacher: the dense model in eval mode, for methods that learn from one.
    """

    config: ViTConfig
    method: Method
    request: StageRequest
    options: Mapping[str, Any]
    recipe: Recipe
    teacher: PrunedViT | None = None

    def target_rates(self) -> tuple[float, ...]:
        """Return the keep rate of every stage, in the sense of the method's rule."""
        blocks = quarter_blocks(self.config.depth) if self.request.blocks is None else self.request.blocks
        return self.request.rates or self.method.rule.stage_rates(self.request.keep_rate, len(blocks))


class Adapter(Protocol):
    """How one method trains; built as `AdapterClass(setup)`."""

    needs_teacher: bool

    def losses(self, model: PrunedViT, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted parts of the loss by name; the loop minimises their sum."""
        ...


class HardGather:
    """The training pass is the one of inference: tokens are gathered, the loss is the classifier's (dense, EViT).

    The keep rate may fall from 1 to its target over some epochs.

    Source: EViT (arXiv 2202.07800) section 4 and the official schedule.
    """

    needs_teacher = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def stages(self, epoch: float) -> Sequence[Stage]:
        """Return the stages in force."""
        closed = closed_share(epoch, self.setup.recipe.keep_warmup)
        rates = tuple(1 - (1 - rate) * closed for rate in self.setup.target_rates())
        request = replace(self.setup.request, rates=rates)
        return self.setup.method.stages(self.setup.config, request, self.setup.options)

    def losses(self, model: PrunedViT, batch: Batch) -> dict[str, Tensor]:
        """Return the classification loss."""
        logits = with_stages(model, self.stages(batch.epoch))(batch.images)
        return {"classification": losses.classification(logits, batch.labels, self.setup.recipe.label_smoothing)}


class RandomGather(HardGather):
    """As `HardGather`, but every image keeps other tokens in every step, chosen at random."""

    def stages(self, epoch: float) -> Sequence[Stage]:
        """Return the stages in force, with random scores."""
        return [
            replace(stage, scorer=RandomScorer(), selector=TopK(stage.counts.kept)) for stage in super().stages(epoch)
        ]


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Fresh uniform scores from torch's generator."""

    def score(self, context: Context, module: torch.nn.Module | None) -> Tensor:
        """Return scores [B, N] in [0, 1)."""
        return torch.rand(context.tokens.shape[:2], device=context.tokens.device)


class GumbelPolicy:
    """All tokens stay in the sequence, masks drawn from the predictors hide some, a dense teacher keeps it on course.

    With an aux head the losses read CLS and the tokens apart, as the official code does; inference adds them up.

    Source: DynamicViT (arXiv 2106.02034) section 3.3.
    """

    needs_teacher = True

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def losses(self, model: PrunedViT, batch: Batch) -> dict[str, Tensor]:
        """Return the classification, ratio, distillation and token losses."""
        recipe, teacher = self.setup.recipe, self.setup.teacher
        assert teacher is not None
        out = masked_forward(model, batch.images)
        with torch.no_grad():
            dense = masked_forward(teacher, batch.images)
        rates = [self.setup.target_rates()[stage.index] for stage in model.stages]
        keep = out.decisions[-1].detach()
        return {
            "classification": losses.classification(out.class_logits, batch.labels, recipe.label_smoothing),
            "ratio": recipe.ratio_weight * losses.ratio(out.decisions, rates),
            "distillation": recipe.distill_weight * losses.distillation(out.class_logits, dense.class_logits),
            "tokens": recipe.token_weight * self.token_loss(out, dense, keep),
        }

    def token_loss(self, student: MaskedOutput, teacher: MaskedOutput, keep: Tensor) -> Tensor:
        """Return how far the kept tokens are from the teacher's: by class scores where every token has them."""
        if student.token_logits is None or teacher.token_logits is None:
            return losses.token_distillation(student.features, teacher.features, keep)
        return losses.token_class_distillation(student.token_logits, teacher.token_logits, keep)


ADAPTERS: dict[str, type[HardGather] | type[GumbelPolicy]] = {
    "dense": HardGather,
    "evit": HardGather,
    "random": RandomGather,
    "dynamicvit": GumbelPolicy,
}


def closed_share(epoch: float, keep_warmup: tuple[float, float]) -> float:
    """Return how much of the way from keep rate 1 to the target is done, from 0 to 1, as a cosine."""
    start, length = keep_warmup
    if epoch >= start + length:
        return 1.0
    return (1 - math.cos(math.pi * max(0.0, epoch - start) / length)) / 2


def with_stages(model: PrunedViT, stages: Sequence[Stage]) -> PrunedViT:
    """Return a view of the model with other stages; all weights are shared."""
    view = copy.copy(model)
    view.stages = tuple(stages)
    return view
