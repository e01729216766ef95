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

import numpy as np
import torch
from torch import Tensor

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Context, Method, Scorer, Stage, StageRequest, TopK, Where
from edgeprune.pruning.model import PrunedViT
from edgeprune.training import losses
from edgeprune.training.masking import MaskedOutput, gumbel_decision, masked_forward
from edgeprune.training.recipes import Recipe

PER_TICK = 8  # numbers of 32 bits that one count of the Philox generator gives


@dataclass(frozen=True)
class Batch:
    """One process's share of one step's data.

    Attributes:
        images: [B, C, H, W] float32 normalised.
        labels: [B] int64, or [B, classes] float32 once images are mixed.
        epoch: epochs done so far, with the fraction of the current one.
        seed: of the training.
        step: optimiser steps done before this one.
        first_row: the place of the first image in the batch all processes work on together.
    """

    images: Tensor
    labels: Tensor
    epoch: float
    seed: int = 0
    step: int = 0
    first_row: int = 0

    def uniform(self, *shape: int, tag: int = 0) -> Tensor:
        """Return [B, *shape] float32 in [0, 1), a function of the seed, the step, `tag` and the row alone.

        A row gets the same numbers in whichever process it is, and no generator's state is needed to resume.
        """
        rows, size = len(self.images), math.prod(shape)
        ticks = -(-size // PER_TICK)
        key = np.random.SeedSequence((self.seed, self.step, tag)).generate_state(2, np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=self.first_row * ticks))
        numbers = generator.random((rows, ticks * PER_TICK), dtype=np.float32)[:, :size]
        return torch.from_numpy(numbers.reshape(rows, *shape)).to(self.images.device)


@dataclass
class StepResult:
    """What an adapter makes of one batch.

    Attributes:
        losses: the weighted parts of the loss, scalars; the loop minimises their sum.
        logits: [B, classes], for the accuracy.
        kept: mean number of patch tokens behind the last stage; None when it is not known.
        macs: mean multiply-accumulates of an image, in units of 1e9; None when they are not known.
    """

    losses: dict[str, Tensor]
    logits: Tensor
    kept: Tensor | float | None = None
    macs: Tensor | float | None = None


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
        return self.method.rates(self.config, self.request, self.options)


class Adapter(Protocol):
    """How one method trains; built as `AdapterClass(setup)`.

    Attributes:
        needs_teacher: it reads `Setup.teacher`.
        without_gradient: beginnings of the names of parameters that may go without a gradient in a step; any other
            that does is an error.
    """

    needs_teacher: bool
    without_gradient: tuple[str, ...]

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the losses of one batch."""
        ...


class HardGather:
    """The training pass is the one of inference: tokens are gathered, the loss is the classifier's (dense, EViT).

    The keep rate may fall from 1 to its target over some epochs.

    Source: EViT (arXiv 2202.07800) section 4 and the official schedule.
    """

    needs_teacher = False
    without_gradient: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def stages(self, epoch: float) -> Sequence[Stage]:
        """Return the stages in force."""
        closed = closed_share(epoch, self.setup.recipe.keep_warmup)
        rates = tuple(1 - (1 - rate) * closed for rate in self.setup.target_rates())
        request = replace(self.setup.request, rates=rates)
        return self.setup.method.stages(self.setup.config, request, self.setup.options)

    def batch_stages(self, batch: Batch) -> Sequence[Stage]:
        """Return the stages for one batch."""
        return self.stages(batch.epoch)

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification loss."""
        stages = self.batch_stages(batch)
        logits = with_stages(model, stages)(batch.images)
        loss = losses.classification(logits, batch.labels, self.setup.recipe.label_smoothing)
        kept = float(stages[-1].counts.tokens_out if stages else model.config.num_patches)
        outs = [stage.counts.tokens_out for stage in stages]
        return StepResult({"classification": loss}, logits, kept, gmacs(model.config, stages, outs))


class RandomGather(HardGather):
    """As `HardGather`, but every image keeps other tokens in every step, chosen at random."""

    def batch_stages(self, batch: Batch) -> Sequence[Stage]:
        """Return the stages for one batch, with random scores."""
        return [
            replace(stage, scorer=RandomScorer(batch, stage.index), selector=TopK(stage.counts.kept))
            for stage in self.stages(batch.epoch)
        ]


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Fresh uniform scores for every image of a batch and every stage."""

    batch: Batch
    tag: int

    def score(self, context: Context, module: torch.nn.Module | None) -> Tensor:
        """Return scores [B, N] in [0, 1)."""
        return self.batch.uniform(context.tokens.shape[1], tag=self.tag)


class GumbelPolicy:
    """All tokens stay in the sequence, masks drawn from the predictors hide some, a dense teacher keeps it on course.

    With an aux head the losses read CLS and the tokens apart, as the official code does; inference adds them up.

    Source: DynamicViT (arXiv 2106.02034) section 3.3.
    """

    needs_teacher = True
    without_gradient: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification, ratio, distillation and token losses."""
        recipe, teacher = self.setup.recipe, self.setup.teacher
        assert teacher is not None
        out = masked_forward(model, batch.images, gumbel_decision(batch.uniform))
        with torch.no_grad():
            dense = masked_forward(teacher, batch.images)
        rates = [self.setup.target_rates()[stage.index] for stage in model.stages]
        keep = out.decisions[-1].detach()
        parts = {
            "classification": losses.classification(out.class_logits, batch.labels, recipe.label_smoothing),
            "ratio": recipe.ratio_weight * losses.ratio(out.decisions, rates),
            "distillation": recipe.distill_weight * losses.distillation(out.class_logits, dense.class_logits),
            "tokens": recipe.token_weight * self.token_loss(out, dense, keep),
        }
        outs = [decision.detach().sum(1).mean() for decision in out.decisions]
        return StepResult(parts, out.logits, outs[-1], gmacs(model.config, model.stages, outs))

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


def gmacs(config: ViTConfig, stages: Sequence[Stage], tokens_out: Sequence[Any]) -> Any:
    """Return 1e9 multiply-accumulates of one image that has `tokens_out[s]` patch tokens behind stage s.

    Counted as in `edgeprune.models.macs.dense_macs`, scorers left out; counts may be numbers or tensors.
    """
    P, at = config.num_prefix_tokens, {(stage.block, stage.where): s for s, stage in enumerate(stages)}
    D, tokens, total = config.embed_dim, config.num_patches + config.num_prefix_tokens, 0
    for block in range(config.depth):
        for where in (Where.PRE_BLOCK, Where.MID_BLOCK):
            if (block, where) in at:
                tokens = P + tokens_out[at[block, where]]
            if where is Where.PRE_BLOCK:
                total = total + tokens * 4 * D * D + 2 * tokens * tokens * D
            else:
                total = total + tokens * 2 * D * config.mlp_dim
    patch = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return (total + config.num_patches * patch * D + config.num_head_tokens * config.num_classes * D) / 1e9


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
