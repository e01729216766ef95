"""DynamicViT: small predictors score the tokens, a fixed share of the initial count stays.

Source: DynamicViT (arXiv 2106.02034) section 3; layout of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Context, Method, Needs, Reducer, Scorer, Stage, TopK, Where
from edgeprune.pruning.counts import DYNAMICVIT_RULE, StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn

PREDICTOR_NORM_EPS = 1e-5  # torch's default, unlike the backbone's 1e-6


@dataclass(frozen=True)
class PredictorScorer(Scorer):
    """Keep logit minus drop logit of the predictor.

    The official code ranks by the keep log-probability; the difference of the logits has the same order and does not
    saturate into ties.
    """

    needs = frozenset({Needs.TOKENS})

    def build(self, config: ViTConfig) -> nn.Module:
        """Return the predictor, keys as in the official checkpoints."""
        from edgeprune.pruning.predictor import Predictor

        return Predictor(config.embed_dim)

    def macs(self, config: ViTConfig, tokens: int) -> int:
        """N * (1.625 D^2 + D/2)."""
        D = config.embed_dim
        return tokens * (D * D + D * (D // 2) + (D // 2) * (D // 4) + (D // 4) * 2)

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N]."""
        from edgeprune.pruning.predictor import Predictor

        assert isinstance(module, Predictor)
        logits = module.logits(context.tokens, None if context.valid is None else context.valid.float())
        return (logits[..., 0] - logits[..., 1]).float()


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage in front of each block."""
    return [
        Stage(block, Where.PRE_BLOCK, PredictorScorer(), TopK(c.kept), Reducer.DROP, c)
        for block, c in zip(blocks, counts, strict=True)
    ]


METHOD = Method(
    name="dynamicvit",
    summary="learned predictors rank tokens; floor(N0 * r^s) stay in front of blocks 3, 6, 9",
    source="arXiv 2106.02034",
    rule=DYNAMICVIT_RULE,
    make_stages=make_stages,
    key_prefixes={"score_predictor.": "prune."},
)
