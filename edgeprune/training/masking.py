"""The masked forward pass of methods that learn what to drop: all tokens stay, a policy hides the dropped ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgeprune.models.vit import Block, add_best_token
from edgeprune.pruning.adaptive import NOT_KEPT
from edgeprune.pruning.base import Context, Stage, Where
from edgeprune.pruning.model import PrunedViT
from edgeprune.pruning.predictor import Predictor
from edgeprune.pruning.threshold import KeepThreshold

# (stage, what it sees, its weights, [B, N] tokens kept so far) -> [B, N] tokens kept from here on, in {0, 1}
Decide = Callable[[Stage, Context, nn.Module | None, Tensor], Tensor]

SMALLEST = 2.0**-25  # in place of a 0 that has no logarithm


@dataclass
class MaskedOutput:
    """Result of one masked pass.

    Attributes:
        logits: [B, classes].
        features: [B, N, D] patch features behind the last LayerNorm, of dropped tokens too.
        class_logits: [B, classes] that the classification losses read: those of CLS alone when the model has an aux
            head, else `logits`.
        decisions: per stage [B, N] in {0, 1}, each at most the one before.
        token_logits: [B, N, classes] of the aux head, of dropped tokens too; None without one.
    """

    logits: Tensor
    features: Tensor
    class_logits: Tensor
    decisions: list[Tensor] = field(default_factory=list)
    token_logits: Tensor | None = None


def gumbel_decision(uniform: Callable[..., Tensor]) -> Decide:
    """Return a choice that draws keep decisions at temperature 1, with the gradient of the soft sample.

    Args:
        uniform: gives numbers in [0, 1) as `edgeprune.training.adapters.Batch.uniform` does.

    Source: DynamicViT (arXiv 2106.02034) eq. 9; as in the official code the noise is added to log-probabilities.
    """

    def decide(stage: Stage, seen: Context, module: nn.Module | None, keep: Tensor) -> Tensor:
        assert isinstance(module, Predictor)
        logits = module.logits(seen.tokens, keep)
        noise = -(-uniform(*logits.shape[1:], tag=stage.index).clamp(min=SMALLEST).log()).log()
        soft = (logits.log_softmax(-1) + noise).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (hard - soft.detach() + soft)[..., 0] * keep

    return decide


def threshold_decision(temperature: float) -> Decide:
    """Return a choice of the scores above a learned threshold, with the gradient of a sigmoid of that temperature.

    A token that was dropped has next to no score and stays below any positive threshold.

    Source: AS-ViT (arXiv 2209.13802) section 3.3.
    """

    def decide(stage: Stage, seen: Context, module: nn.Module | None, keep: Tensor) -> Tensor:
        assert isinstance(module, KeepThreshold)
        margin = stage.scorer.score(seen, module) - module.keep_threshold
        soft = (margin / temperature).sigmoid()
        return (margin > 0).float() - soft.detach() + soft

    return decide


def selected(stage: Stage, seen: Context, module: nn.Module | None, keep: Tensor) -> Tensor:
    """Choose as inference does, by the stage's own selector; no gradient."""
    valid = keep > 0.5
    scores = stage.scorer.score(seen, module)
    chosen = stage.selector.select(scores.masked_fill(~valid, NOT_KEPT), valid, module)
    slots = torch.arange(chosen.positions.shape[1], device=keep.device)
    there = (slots < chosen.counts[:, None]).to(keep.dtype)
    return torch.zeros_like(keep).scatter(1, chosen.positions, there)


def masked_forward(model: PrunedViT, images: Tensor, decide: Decide | None = None) -> MaskedOutput:
    """Run a model; drop nothing, mask instead.

    With the same choices the logits equal those of the gathering pass. Without stages it is the dense model. What a
    stage inside a block drops is hidden from the next block on: within the block nobody reads it after the attention.

    Args:
        model: its stages drop tokens; they do not fuse, merge or stash them.
        images: [B, C, H, W] normalised.
        decide: makes the choice of each stage; only a model without stages can do without.
    """
    P = model.config.num_prefix_tokens
    at = {(stage.block, stage.where): stage for stage in model.stages}
    x = model.embed(images)
    keep, policy = x.new_ones(len(x), x.shape[1] - P), None
    decisions = []
    seen = Context(x)

    def drop(stage: Stage) -> None:
        nonlocal keep, policy
        assert decide is not None
        seen.tokens, seen.valid = x[:, P:], None if policy is None else keep > 0.5
        keep = decide(stage, seen, model.scorer_module(stage), keep)
        decisions.append(keep)
        policy = torch.cat([keep.new_ones(len(x), P), keep], 1)

    for i, block in enumerate(model.blocks):
        if before := at.get((i, Where.PRE_BLOCK)):
            drop(before)
        inside, ahead = at.get((i, Where.MID_BLOCK)), at.get((i + 1, Where.PRE_BLOCK))
        if any(stage is not None and stage.attention_block == i for stage in (inside, ahead)):
            x, seen = _attend(block, x, policy, P)
            x = block.add_mlp(x)
        else:
            x = block(x, policy)
        if inside is not None:
            drop(inside)
    features = model.fc_norm(model.norm(x))[:, P:]
    return _classify(model, x, keep, features, decisions)


def _attend(block: nn.Module, x: Tensor, policy: Tensor | None, prefix: int) -> tuple[Tensor, Context]:
    """Return x [B, P+N, D] plus the attention branch, and everything a scorer may read of the attention."""
    assert isinstance(block, Block)
    q, k, v = block.attn.heads(block.norm1(x))
    attention = block.attn.probabilities(q, k, policy)
    context = attention @ v
    asks = x.new_ones(x.shape[:2]) if policy is None else policy
    received = (asks[:, None] @ attention.mean(1))[:, 0] / asks.sum(1, keepdim=True)
    seen = Context(
        x,
        class_attention=attention[:, :, 0, prefix:],
        mean_attention=received[:, prefix:],
        keys=k[:, :, prefix:],
        values=v[:, :, prefix:],
        context=context[:, :, prefix:],
    )
    return block.add_attention(x, block.attn.merge(context)), seen


def _classify(model: PrunedViT, x: Tensor, keep: Tensor, features: Tensor, decisions: list[Tensor]) -> MaskedOutput:
    """Classify x [B, P+N, D]; an average and the aux head's maximum run over the kept patches."""
    if not model.config.aux_head:
        logits = model.classify(x, keep)
        return MaskedOutput(logits, features, logits, decisions)
    class_logits, token_logits = model.class_and_token_logits(x)
    logits = add_best_token(class_logits, token_logits, keep)
    return MaskedOutput(logits, features, class_logits, decisions, token_logits)
