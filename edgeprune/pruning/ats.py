"""ATS: tokens are sampled from the cumulative distribution of their scores, inside a block.

Source: Adaptive Token Sampling (arXiv 2111.15667) section 3 and its official code. The two differ, and both are here:
`official` sorts the scores, stretches their sums to [0, 1] and takes one value norm per token; `paper` sums in the
order of the tokens and takes a value norm per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.adaptive import NOT_KEPT, Slots
from edgeprune.pruning.base import (
    Context,
    Method,
    MethodOption,
    Needs,
    Reducer,
    Schedule,
    Scorer,
    Stage,
    StageRequest,
    Where,
    quarter_blocks,
)
from edgeprune.pruning.counts import CountRule, StageCounts, resolve_counts

if TYPE_CHECKING:
    from torch import Tensor, nn

OFFICIAL, PAPER = "official", "paper"
RULES = {
    OFFICIAL: CountRule(base="initial", rounding="floor", cumulative=False),
    PAPER: CountRule(base="initial", rounding="floor", cumulative=True),
}


@dataclass(frozen=True)
class ValueScorer(Scorer):
    """Attention of the CLS query times the length of the value.

    Attributes:
        per_head: lengths are taken and multiplied head by head, then summed; else of the whole value and the summed
            attention.
    """

    per_head: bool

    needs = frozenset({Needs.CLASS_ATTENTION, Needs.VALUES})

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N], not normalised."""
        assert context.class_attention is not None and context.values is not None
        lengths = context.values.float().square().sum(-1)  # [B, H, N]
        attention = context.class_attention.float()
        if self.per_head:
            return (attention * lengths.sqrt()).sum(1)
        return attention.sum(1) * lengths.sum(1).sqrt()


@dataclass(frozen=True)
class CdfSampling(Slots):
    """Tokens nearest to equidistant points of the cumulative distribution of scores, each once, in sequence order.

    Where the distribution is of no use (one token, all scores zero or NaN) every token stays. The next best tokens are
    those with the highest scores.

    Attributes:
        points: how many; an image never keeps more tokens.
        stretched: as in the official code: scores are sorted, the sums are stretched so that the lowest token stands
            at 0 and the highest at 1, and points run from the second lowest to 1. The lowest token is never sampled.
            Else as in the paper: sums in sequence order, points at (2 i - 1) / (2 k).
    """

    points: int
    stretched: bool = True

    def shares(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """Return scores [B, N] with a sum of 1; 0 where there is no score or no token."""
        share = scores.float().nan_to_num(nan=0.0)
        share = share if valid is None else share.masked_fill(~valid, 0.0)
        return share / share.sum(1, keepdim=True).clamp(min=1e-30)

    def distribution(self, scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return positions, sums and points of the distribution.

        Returns:
            [B, N] int64 positions in the order of the sums; [B, N] sums, 10 where there is no token; [B, J] points;
            [B] bool, whether there is a distribution.
        """
        import torch

        B, N = scores.shape
        here = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        share = self.shares(scores, valid)
        any_mass = share.sum(1) > 0
        ramp = torch.arange(self.points, device=scores.device, dtype=torch.float32)
        if not self.stretched:
            sums = share.cumsum(1).masked_fill(~here, 10.0)
            points = ((2 * ramp + 1) / (2 * self.points)).expand(B, -1)
            return torch.arange(N, device=scores.device).expand(B, -1), sums, points, any_mass
        order = share.masked_fill(~here, -1.0).sort(dim=1, stable=True).indices
        share, here = share.gather(1, order), here.gather(1, order)
        sums = share.cumsum(1)
        lowest = sums.masked_fill(~here, 10.0).amin(1, keepdim=True)
        sums = (sums - lowest) / (sums[:, -1:] - lowest).clamp(min=1e-30)
        first = sums.masked_fill(~here | (sums <= 0), 10.0).amin(1, keepdim=True)
        points = first + ramp / max(self.points - 1, 1) * (1 - first)
        return order, sums.masked_fill(~here, 10.0), points, (first[:, 0] < 10) & any_mass

    def prepare(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """Return scores [B, N]: sampled tokens ranked by their place, 1 or more; the others by share, at most 0."""
        import torch

        order, sums, points, usable = self.distribution(scores, valid)
        nearest = (points[:, :, None] - sums[:, None, :]).abs().argmin(2)
        sampled = torch.zeros_like(sums, dtype=torch.bool).scatter(1, order.gather(1, nearest), True)
        kept = torch.where(usable[:, None], sampled, torch.ones_like(sampled) if valid is None else valid)
        places = torch.arange(scores.shape[1], 0, -1, device=scores.device, dtype=torch.float32)
        ranks = torch.where(kept, places, self.shares(scores, valid) - 1)
        return ranks if valid is None else ranks.masked_fill(~valid, NOT_KEPT)

    def limit(self, module: nn.Module | None) -> float:
        """Return a threshold between sampled tokens and others."""
        return 0.0

    def count_margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: how much nearer the sampled token is to its point than the next one, the least over points."""
        _, sums, points, usable = self.distribution(scores, valid)
        if scores.shape[1] == 1:
            return scores.new_full((len(scores),), float("inf"))
        nearest = (points[:, :, None] - sums[:, None, :]).abs().topk(2, dim=2, largest=False).values
        return (nearest[..., 1] - nearest[..., 0]).amin(1).masked_fill(~usable, float("inf"))


def schedule(config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> Schedule:
    """Return the blocks and, as slots, the number of sample points of each."""
    rule = RULES[options["variant"]]
    blocks = METHOD.blocks(config, request, options)
    rates = request.rates or rule.stage_rates(request.keep_rate, len(blocks))
    return blocks, resolve_counts(rule, config.num_patches, rates)


def default_blocks(config: ViTConfig, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return every block from the first quarter on, or for `paper` the usual three."""
    quarters = quarter_blocks(config.depth)
    return quarters if options["variant"] == PAPER else tuple(range(config.depth // 4, config.depth))


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage inside each block; query rows are gathered in front of the attention product."""
    official = options["variant"] == OFFICIAL
    return [
        Stage(block, Where.MID_BLOCK, ValueScorer(not official), CdfSampling(c.kept, c.kept, official), Reducer.DROP, c)
        for block, c in zip(blocks, counts, strict=True)
    ]


METHOD = Method(
    name="ats",
    summary="samples tokens from the distribution of CLS attention times value length; the image decides how many stay",
    source="arXiv 2111.15667",
    rule=RULES[PAPER],
    make_stages=make_stages,
    schedule=schedule,
    default_blocks=default_blocks,
    adaptive=lambda options: True,
    needs_class_token=True,
    options=(
        MethodOption("variant", str, OFFICIAL, "official: the released code; paper: the text", (OFFICIAL, PAPER)),
    ),
    training_keys=r"\.attn\.out_zero_mask$",
    notes=(
        "official follows the released code (Apache-2.0) for one image with dropped tokens removed; that code also "
        "masks its softmax with an epsilon of 1e-6 in every block, which is left out to keep the attention fusable",
        "official with a keep rate below 1 takes fewer sample points; the released code cannot, this is our extension",
        "paper: the sample points (2i-1)/(2K) and the value norm per head are our reading of the text",
    ),
)
