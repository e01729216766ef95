"""The masked forward pass of methods that learn what to drop: all tokens stay, a policy hides the dropped ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeprune.models.vit import add_best_token
from edgeprune.pruning.base import Stage, Where
from edgeprune.pruning.model import PrunedViT
from edgeprune.pruning.predictor import Predictor

# (stage, predictor logits [B, N, 2]) -> [B, N] in {0, 1}: the stage's own choice, earlier stages not considered
Decide = Callable[[Stage, Tensor], Tensor]

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

    def decide(stage: Stage, logits: Tensor) -> Tensor:
        noise = -(-uniform(*logits.shape[1:], tag=stage.index).clamp(min=SMALLEST).log()).log()
        soft = (logits.log_softmax(-1) + noise).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (hard - soft.detach() + soft)[..., 0]

    return decide


def masked_forward(model: PrunedViT, images: Tensor, decide: Decide | None = None) -> MaskedOutput:
    """Run a model whose stages stand in front of blocks and have predictors; drop nothing, mask instead.

    With the same choices the logits equal those of the gathering pass. Without stages it is the dense model.

    Args:
        model: every stage is `Where.PRE_BLOCK` with a `Predictor`.
        images: [B, C, H, W] normalised.
        decide: draws each stage's choice from its predictor's logits; only a model without stages can do without.
    """
    P = model.config.num_prefix_tokens
    at = {stage.block: stage for stage in model.stages if stage.where is Where.PRE_BLOCK}
    x = model.embed(images)
    keep, policy = x.new_ones(len(x), x.shape[1] - P), None
    decisions = []
    for i, block in enumerate(model.blocks):
        if i in at:
            predictor = model.scorer_module(at[i])
            assert isinstance(predictor, Predictor) and decide is not None
            keep = decide(at[i], predictor.logits(x[:, P:], keep)) * keep
            decisions.append(keep)
            policy = torch.cat([keep.new_ones(len(x), P), keep], 1)
        x = block(x, policy)
    features = model.fc_norm(model.norm(x))[:, P:]
    return _classify(model, x, keep, features, decisions)


def _classify(model: PrunedViT, x: Tensor, keep: Tensor, features: Tensor, decisions: list[Tensor]) -> MaskedOutput:
    """Classify x [B, P+N, D]; an average and the aux head's maximum run over the kept patches."""
    if not model.config.aux_head:
        logits = model.classify(x, keep)
        return MaskedOutput(logits, features, logits, decisions)
    class_logits, token_logits = model.class_and_token_logits(x)
    logits = add_best_token(class_logits, token_logits, keep)
    return MaskedOutput(logits, features, class_logits, decisions, token_logits)
