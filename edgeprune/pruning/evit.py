"""EViT: the CLS token's attention ranks the tokens inside a block; the rest is fused into one token or dropped.

Source: EViT (arXiv 2202.07800) section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Context, Method, MethodOption, Needs, Reducer, Scorer, Stage, TopK, Where
from edgeprune.pruning.counts import EVIT_RULE, StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ClassAttentionScorer(Scorer):
    """Mean over heads of the CLS query's attention, from the block that prunes."""

    needs = frozenset({Needs.CLASS_ATTENTION})

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N]."""
        assert context.class_attention is not None
        return context.class_attention.mean(1).float()


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage inside each block, between attention and MLP."""
    reducer = Reducer.FUSE if options["fuse"] else Reducer.DROP
    return [
        Stage(block, Where.MID_BLOCK, ClassAttentionScorer(), TopK(c.kept), reducer, c)
        for block, c in zip(blocks, counts, strict=True)
    ]


METHOD = Method(
    name="evit",
    summary="CLS attention ranks tokens inside blocks 3, 6, 9; ceil(r * n) stay, the rest is fused into one",
    source="arXiv 2202.07800",
    rule=EVIT_RULE,
    make_stages=make_stages,
    needs_class_token=True,
    options=(MethodOption("fuse", bool, True, "fuse the dropped tokens into one; false drops them"),),
)
