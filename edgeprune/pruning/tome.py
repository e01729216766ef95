"""ToMe: inside every block the r most alike pairs of tokens are averaged; nothing is dropped.

Source: Token Merging (arXiv 2210.09461) section 3; re-derived from the paper; the official code is CC-BY-NC
and not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import (
    Context,
    Method,
    MethodOption,
    Needs,
    Reducer,
    Schedule,
    Scorer,
    Selection,
    Selector,
    Stage,
    StageRequest,
    Where,
)
from edgeprune.pruning.counts import StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn

CONSTANT, DECREASING = "constant", "decreasing"


@dataclass(frozen=True)
class KeyMetric(Scorer):
    """What tells how alike two tokens are: the mean key over heads, of length 1."""

    needs = frozenset({Needs.KEYS})

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return the metric [B, N, d]."""
        import torch.nn.functional as F

        assert context.keys is not None
        return F.normalize(context.keys.float().mean(1), dim=-1)


@dataclass
class Pairs:
    """Which tokens go where; positions count the patch tokens.

    Attributes:
        sources: [B, r] tokens that are averaged into another.
        destinations: [B, r] where each of them goes.
        stay: [B, N-r] the others in the order of the new sequence: sources that found no use, then destinations.
    """

    sources: Tensor
    destinations: Tensor
    stay: Tensor


@dataclass(frozen=True)
class Bipartite(Selector):
    """Tokens at even places of the sequence look for the one most like them at odd places; the r best pairs merge.

    Attributes:
        r: pairs.
        num_prefix_tokens: P, which places are counted from; the prefix never merges.
        weigh_keys: later attention counts a token as often as patches it stands for.
    """

    r: int
    num_prefix_tokens: int
    weigh_keys: bool = True

    @property
    def starts(self) -> tuple[int, int]:
        """The first patch token of the sources and of the destinations."""
        return self.num_prefix_tokens % 2, 1 - self.num_prefix_tokens % 2

    def similarity(self, metric: Tensor) -> Tensor:
        """Return [B, sources, destinations] cosine similarity of a metric [B, N, d]."""
        source, destination = self.starts
        return metric[:, source::2] @ metric[:, destination::2].transpose(1, 2)

    def pair(self, metric: Tensor) -> Pairs:
        """Return the pairs of a metric [B, N, d]."""
        import torch

        from edgeprune.pruning.ops import rank_tokens

        source, destination = self.starts
        alike = self.similarity(metric)
        order, best = rank_tokens(alike.amax(2)), alike.argmax(2)
        merged, alone = order[:, : self.r], order[:, self.r :].sort(1).values
        others = torch.arange(alike.shape[2], device=metric.device).expand(len(metric), -1)
        stay = torch.cat([2 * alone + source, 2 * others + destination], 1)
        return Pairs(2 * merged + source, 2 * best.gather(1, merged) + destination, stay)

    def select(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Selection:
        """Return the tokens that stay; `scores` is the metric."""
        stay = self.pair(scores).stay
        return Selection(stay, stay.new_full((len(stay),), stay.shape[1]))

    def margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: between the last pair and the next, and between best and second destination of merged tokens."""
        from edgeprune.pruning.adaptive import rank_margin

        alike = self.similarity(scores)
        margin = rank_margin(alike.amax(2), self.r)
        if alike.shape[2] > 1:
            best = alike.topk(2, dim=2).values
            gap = best[..., 0] - best[..., 1]
            merged = alike.amax(2) >= alike.amax(2).topk(self.r, dim=1).values[:, -1:]
            margin = margin.minimum(gap.masked_fill(~merged, float("inf")).amin(1))
        return margin


def merge_tokens(pairs: Pairs, patches: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shorter sequence and its sizes.

    Args:
        pairs: of the same tokens.
        patches: [B, N, D].
        size: [B, N] patches each token stands for.

    Returns:
        [B, N-r, D] means weighted by size; [B, N-r] sizes.
    """
    weighted = patches * size.unsqueeze(-1)
    at = pairs.destinations.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    moving = weighted.gather(1, pairs.sources.unsqueeze(-1).expand_as(at))
    weighted = weighted.scatter_add(1, at, moving)
    size = size.scatter_add(1, pairs.destinations, size.gather(1, pairs.sources))
    mean = weighted / size.unsqueeze(-1)
    return mean.gather(1, pairs.stay.unsqueeze(-1).expand(-1, -1, patches.shape[-1])), size.gather(1, pairs.stay)


def merge_counts(r: int, depth: int, schedule: str) -> list[int]:
    """Return the pairs wanted in each of `depth` blocks: always r, or from 2 r down to 0 with the same total.

    Source: arXiv 2210.09461 section 4.1, "constant" and "decreasing".
    """
    if schedule == CONSTANT or depth == 1:
        return [r] * depth
    return [int(2 * r - 2 * r / (depth - 1) * i) for i in range(depth)]


def schedule(config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> Schedule:
    """Return the blocks and counts; at most half of the tokens of a block can merge."""
    blocks, counts, tokens = METHOD.blocks(config, request, options), [], config.num_patches
    for r in merge_counts(options["r"], len(blocks), options["schedule"]):
        kept = tokens - min(r, tokens // 2)
        counts.append(StageCounts(tokens, kept))
        tokens = kept
    return blocks, tuple(counts)


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage inside each block, between attention and MLP."""
    P, weigh = config.num_prefix_tokens, options["prop_attn"]
    return [
        Stage(
            block,
            Where.MID_BLOCK,
            KeyMetric(),
            Bipartite(c.tokens_in - c.kept, P, weigh),
            Reducer.MERGE,
            c,
        )
        for block, c in zip(blocks, counts, strict=True)
    ]


METHOD = Method(
    name="tome",
    summary="inside every block the r most alike pairs of tokens are averaged; works without training",
    source="arXiv 2210.09461",
    rule=None,
    make_stages=make_stages,
    schedule=schedule,
    default_blocks=lambda config, options: tuple(range(config.depth)),
    options=(
        MethodOption("r", int, 8, "pairs merged in a block", least=0),
        MethodOption("schedule", str, CONSTANT, "r in every block, or from 2r down to 0", (CONSTANT, DECREASING)),
        MethodOption("prop_attn", bool, True, "attention counts a token as often as patches it stands for"),
    ),
    notes=(
        "re-derived from the paper; the official code and checkpoints are CC-BY-NC 4.0 and not used",
        "prop_attn=true suits supervised models used off the shelf, false MAE ones, as the paper says",
        "average pooling weights tokens by size",
    ),
)
