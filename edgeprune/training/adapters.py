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
from edgeprune.models.macs import embed_macs, head_macs
from edgeprune.models.vit import Block
from edgeprune.pruning.base import Context, Method, Reducer, Scorer, Stage, StageRequest, TopK, Where
from edgeprune.pruning.counts import StageCounts
from edgeprune.pruning.cropr import QueryScorer
from edgeprune.pruning.cropr_module import CroprModule
from edgeprune.pruning.model import PrunedOutput, PrunedViT
from edgeprune.training import losses
from edgeprune.training.masking import MaskedOutput, gumbel_decision, masked_forward, threshold_decision
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

    @staticmethod
    def model_stages(stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the stages the model in training is built with; they may hold weights that only training reads."""
        ...

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the losses of one batch."""
        ...


class HardGather:
    """The training pass is the one of inference: tokens are gathered or merged, the loss is the classifier's.

    For dense, EViT, ATS and ToMe. The keep rate may fall from 1 to its target over some epochs.

    Source: EViT (arXiv 2202.07800) section 4 and the official schedule.
    """

    needs_teacher = False
    without_gradient: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @staticmethod
    def model_stages(stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the stages the model in training is built with; they may hold weights that only training reads."""
        return stages

    def stages(self, epoch: float) -> Sequence[Stage]:
        """Return the stages in force."""
        setup, request = self.setup, self.setup.request
        closed = closed_share(epoch, setup.recipe.keep_warmup)
        if closed < 1 and setup.method.rule is not None:
            request = replace(request, rates=tuple(1 - (1 - rate) * closed for rate in setup.target_rates()))
        return setup.method.stages(setup.config, request, setup.options)

    def batch_stages(self, batch: Batch) -> Sequence[Stage]:
        """Return the stages for one batch."""
        return self.stages(batch.epoch)

    def run(self, model: PrunedViT, batch: Batch, stages: Sequence[Stage]) -> tuple[PrunedOutput, StepResult]:
        """Return the pass with some stages, and the classification loss with what it kept."""
        out = with_stages(model, stages).run(batch.images, keep_inputs=True)
        loss = losses.classification(out.logits, batch.labels, self.setup.recipe.label_smoothing)
        left = [
            count.clamp(max=stage.counts.kept) + float(stage.counts.fused)
            for stage, count in zip(stages, out.counts, strict=True)
        ]
        kept = left[-1].mean() if left else float(model.config.num_patches)
        macs = torch.as_tensor(gmacs(model.config, stages, left)).mean()
        return out, StepResult({"classification": loss}, out.logits, kept, macs)

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification loss."""
        return self.run(model, batch, self.batch_stages(batch))[1]


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


class AuxiliaryHeads(HardGather):
    """Tokens are gathered as in inference; every stage's module also predicts the labels, which is what trains it.

    The number of tokens removed may grow from 0 to its target over some epochs, linearly.

    Source: Token Cropr (arXiv 2412.00965) section 3.
    """

    @staticmethod
    def model_stages(stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the stages with aggregators and auxiliary heads."""
        made = []
        for stage in stages:
            assert isinstance(stage.scorer, QueryScorer)
            made.append(replace(stage, scorer=replace(stage.scorer, training=True)))
        return made

    def stages(self, epoch: float) -> Sequence[Stage]:
        """Return the stages in force."""
        setup, (start, length) = self.setup, self.setup.recipe.keep_warmup
        share = min(1.0, max(0.0, epoch - start) / length) if length else 1.0
        options = {**setup.options, "tokens_per_block": int(setup.options["tokens_per_block"] * share)}
        return setup.method.stages(setup.config, setup.request, options)

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification loss and the sum of the auxiliary ones."""
        recipe, stages = self.setup.recipe, self.stages(batch.epoch)
        out, result = self.run(model, batch, stages)
        assert out.inputs is not None
        parts = []
        for stage, tokens in zip(stages, out.inputs, strict=True):
            module = model.scorer_module(stage)
            assert isinstance(module, CroprModule)
            parts.append(losses.classification(module.predict(tokens), batch.labels, recipe.label_smoothing))
        result.losses["auxiliary"] = recipe.aux_weight * torch.stack(parts).sum()
        return result


class DenseSparseEpochs(HardGather):
    """Dense and sparse epochs take turns; in both, token scores are drawn to the teacher's last class attention.

    Source: SaiT, claim 1 of US 12,299,960 B2 (odd epochs skip the sparsification, even ones prune); the form of the
    loss is our reading.
    """

    needs_teacher = True

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification, distillation and token score losses."""
        recipe, teacher = self.setup.recipe, self.setup.teacher
        assert teacher is not None
        stages = self.stages(batch.epoch)
        if int(batch.epoch) % 2 == 0:  # the first epoch is an odd one
            stages = [replace(s, selector=TopK(s.counts.tokens_in), counts=all_kept(s.counts)) for s in stages]
        out, result = self.run(model, batch, stages)
        with torch.no_grad():
            wanted, logits = last_class_attention(teacher, batch.images)
        result.losses["distillation"] = recipe.distill_weight * losses.distillation(out.logits, logits)
        result.losses["attention"] = recipe.attention_weight * losses.score_distillation(out.scores[0], wanted)
        return result


def all_kept(counts: StageCounts) -> StageCounts:
    """Return the counts of a stage that keeps every token."""
    return replace(counts, kept=counts.tokens_in, fused=0)


def last_class_attention(model: PrunedViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dense model's last CLS attention over the patches, mean over heads, sum 1: [B, N]; and its logits."""
    *front, last = model.blocks
    x = model.embed(images)
    for block in front:
        x = block(x)
    assert isinstance(last, Block)
    q, k, _ = last.attn.heads(last.norm1(x))
    received = last.attn.probabilities(q[:, :, :1], k)[:, :, 0, model.config.num_prefix_tokens :].mean(1)
    return received / received.sum(1, keepdim=True), model.classify(last(x))


class GumbelPolicy:
    """All tokens stay in the sequence, masks drawn from the predictors hide some, a dense teacher keeps it on course.

    With an aux head the losses read CLS and the tokens apart, as the official code does; inference adds them up.

    Source: DynamicViT (arXiv 2106.02034) section 3.3.
    """

    needs_teacher = True
    without_gradient: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @staticmethod
    def model_stages(stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the stages as they are."""
        return stages

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
        left = [decision.detach().sum(1) for decision in out.decisions]
        return StepResult(parts, out.logits, left[-1].mean(), gmacs(model.config, model.stages, left).mean())

    def token_loss(self, student: MaskedOutput, teacher: MaskedOutput, keep: Tensor) -> Tensor:
        """Return how far the kept tokens are from the teacher's: by class scores where every token has them."""
        if student.token_logits is None or teacher.token_logits is None:
            return losses.token_distillation(student.features, teacher.features, keep)
        return losses.token_class_distillation(student.token_logits, teacher.token_logits, keep)


class ThresholdPolicy:
    """All tokens stay in the sequence, learned thresholds on attention hide some; the operations have a budget.

    Source: AS-ViT (arXiv 2209.13802) section 3.3.
    """

    needs_teacher = True
    without_gradient: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @staticmethod
    def model_stages(stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the stages as they are."""
        return stages

    def losses(self, model: PrunedViT, batch: Batch) -> StepResult:
        """Return the classification, budget, distillation and, with an aux head, token losses."""
        recipe, teacher, config = self.setup.recipe, self.setup.teacher, model.config
        assert teacher is not None
        out = masked_forward(model, batch.images, threshold_decision(recipe.threshold_temperature))
        with torch.no_grad():
            dense = masked_forward(teacher, batch.images)
        left = [keep.sum(1) for keep in out.decisions]
        macs = gmacs(config, model.stages, left).mean()
        head = head_macs(config, config.num_patches) / 1e9  # the budget is of embedding and blocks
        parts = {
            "classification": losses.classification(out.class_logits, batch.labels, recipe.label_smoothing),
            "budget": recipe.budget_weight * losses.budget(macs - head, recipe.budget * reference_gmacs(config)),
            "distillation": recipe.distill_weight * losses.distillation(out.class_logits, dense.class_logits),
        }
        if out.token_logits is not None and dense.token_logits is not None:
            keep = out.decisions[-1].detach()
            parts["tokens"] = recipe.token_weight * losses.token_class_distillation(
                out.token_logits, dense.token_logits, keep
            )
        return StepResult(parts, out.logits, left[-1].detach().mean(), macs.detach())


ADAPTERS: dict[str, type[HardGather] | type[GumbelPolicy] | type[ThresholdPolicy]] = {
    "dense": HardGather,
    "evit": HardGather,
    "ats": HardGather,
    "tome": HardGather,
    "random": RandomGather,
    "cropr": AuxiliaryHeads,
    "sait": DenseSparseEpochs,
    "dynamicvit": GumbelPolicy,
    "asvit": ThresholdPolicy,
}


def reference_gmacs(config: ViTConfig) -> float:
    """Return 1e9 multiply-accumulates of the dense model as AS-ViT's budget counts: patch tokens, no classifier."""
    N, D = config.num_patches, config.embed_dim
    block = N * (4 * D * D + 2 * D * config.mlp_dim) + 2 * N * N * D
    return (embed_macs(config) + config.depth * block) / 1e9


def gmacs(config: ViTConfig, stages: Sequence[Stage], tokens_out: Sequence[Any]) -> Any:
    """Return 1e9 multiply-accumulates of one image that has `tokens_out[s]` patch tokens behind stage s.

    Counted as in `edgeprune.models.macs.dense_macs`, scorers left out; counts may be numbers or tensors.
    """
    P, at = config.num_prefix_tokens, {(stage.block, stage.where): s for s, stage in enumerate(stages)}
    D, tokens, total = config.embed_dim, config.num_patches + config.num_prefix_tokens, 0
    stashes = any(stage.reducer is Reducer.STASH for stage in stages)
    for block in range(config.depth):
        if stashes and block == config.depth - 1:
            tokens = config.num_patches + P
        for where in (Where.PRE_BLOCK, Where.MID_BLOCK):
            if (block, where) in at:
                tokens = P + tokens_out[at[block, where]]
            if where is Where.PRE_BLOCK:
                total = total + tokens * 4 * D * D + 2 * tokens * tokens * D
            else:
                total = total + tokens * 2 * D * config.mlp_dim
    return (total + embed_macs(config) + head_macs(config, tokens - P)) / 1e9


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
