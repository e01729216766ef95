"""AS-ViT: learned thresholds on class attention, weighted by how much each head says about a token.

Source: Adaptive Sparse ViT (arXiv 2209.13802) section 3; written from the paper and a description of its code, which
has no licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.adaptive import Threshold
from edgeprune.pruning.base import Context, Method, MethodOption, Needs, Reducer, Scorer, Stage, Where, quarter_blocks
from edgeprune.pruning.counts import DYNAMICVIT_RULE, StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_EPS = 1e-8
INITIAL_THRESHOLD = 1e-3  # times the number of the stage, counted from 1
IMAGE, BATCH_MEAN = "image", "batch-mean"


@dataclass(frozen=True)
class HeadWeightedScorer(Scorer):
    """Mean over heads of the CLS query's attention, weighted by the length of each head's output for the token.

    The attention is that of the block in front of the stage; it is not normalised over the patches.

    Attributes:
        initial: value the threshold starts training from.
    """

    initial: float = INITIAL_THRESHOLD

    needs = frozenset({Needs.CLASS_ATTENTION, Needs.CONTEXT})

    def build(self, config: ViTConfig) -> nn.Module:
        """Return the module that holds the threshold, key as in the official code."""
        from edgeprune.pruning.threshold import KeepThreshold

        return KeepThreshold(self.initial)

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N]."""
        assert context.class_attention is not None and context.context is not None
        lengths = context.context.float().norm(dim=-1)
        weights = lengths / (lengths.sum(1, keepdim=True) + HEAD_EPS)
        return (weights * context.class_attention.float()).sum(1)


def default_blocks(config: ViTConfig, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return one block behind the usual places: 4, 7, 10 of 12 blocks; 5, 9, 13 of 16; 6, 11, 16 of 20."""
    return tuple(sorted({min(block + 1, config.depth - 1) for block in quarter_blocks(config.depth)}))


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage in front of each block."""
    batch_mean = options["count"] == BATCH_MEAN
    return [
        Stage(
            block,
            Where.PRE_BLOCK,
            HeadWeightedScorer(INITIAL_THRESHOLD * (s + 1)),
            Threshold(c.kept, batch_mean=batch_mean),
            Reducer.DROP,
            c,
        )
        for s, (block, c) in enumerate(zip(blocks, counts, strict=True))
    ]


METHOD = Method(
    name="asvit",
    summary="learned thresholds on head-weighted CLS attention in front of blocks 4, 7, 10; the image decides how many "
    "stay; a keep rate limits the slots",
    source="arXiv 2209.13802",
    rule=DYNAMICVIT_RULE,
    make_stages=make_stages,
    default_blocks=default_blocks,
    adaptive=lambda options: True,
    needs_class_token=True,
    options=(
        MethodOption(
            "count",
            str,
            IMAGE,
            "image: each image has its own count; batch-mean: all of a batch have the mean, as in published accuracies",
            (IMAGE, BATCH_MEAN),
        ),
    ),
    key_prefixes={"score_predictor.": "prune."},
    notes=(
        "count=image is what the official code does for a single image; count=batch-mean what it does for a batch, "
        "where an image's logits depend on its neighbours",
        "re-derived from the paper: the official code has no licence; none of it is used",
        "scores accumulated over blocks, an option of the official code, are not built",
    ),
)
