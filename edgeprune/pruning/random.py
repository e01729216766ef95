"""Random pruning: constant positions, no scores. The upper bound of the speed of a schedule."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Constant, Context, Method, MethodOption, Reducer, Scorer, Stage, Where
from edgeprune.pruning.counts import DYNAMICVIT_RULE, StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class NoScorer(Scorer):
    """All tokens are alike."""

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return zeros [B, N]."""
        return context.tokens.new_zeros(context.tokens.shape[:2]).float()


def constant_selector(counts: StageCounts, seed: int) -> Constant:
    """Return a fixed draw of `counts.kept` positions without replacement, ascending."""
    return Constant(tuple(sorted(random.Random(seed).sample(range(counts.tokens_in), counts.kept))))


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage in front of each block."""
    return [
        Stage(block, Where.PRE_BLOCK, NoScorer(), constant_selector(c, options["seed"] + s), Reducer.DROP, c)
        for s, (block, c) in enumerate(zip(blocks, counts, strict=True))
    ]


METHOD = Method(
    name="random",
    summary="constant positions, no scores: the upper bound of the speed a schedule can reach",
    source="baseline of arXiv 2106.02034, table 4",
    rule=DYNAMICVIT_RULE,
    make_stages=make_stages,
    options=(MethodOption("seed", int, 0, "seed of the constant positions"),),
)
