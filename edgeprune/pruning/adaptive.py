"""Selectors whose number of tokens depends on the image, in a fixed number of slots.

An image keeps `counts` tokens; they fill the slots best first, and slots from there on hold tokens that every later
attention ignores. When the count exceeds the slots the best tokens stay and the image has overflowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgeprune.pruning.base import Selection, Selector, Stage
from edgeprune.pruning.counts import StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn

EDGE_FLOOR = 0.01
NOT_KEPT = -1e30  # below every threshold, above what NaN is ranked as


@dataclass(frozen=True)
class Slots(Selector):
    """`k` slots for as many tokens as an image keeps.

    Subclasses say how many in the terms of `TopKGather`: scores in which tokens that may not stay are `NOT_KEPT`, its
    mode and its threshold.

    Attributes:
        fill: slots past an image's count hold its next best tokens, which stay too: every image keeps `k` tokens. Its
            count still says how many the method wants.
    """

    k: int
    fill: bool = field(default=False, kw_only=True)

    adaptive = True
    mode = 1

    def prepare(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """Return scores [B, N] in which what may not stay is `NOT_KEPT`."""
        return scores if valid is None else scores.masked_fill(~valid, NOT_KEPT)

    def limit(self, module: nn.Module | None) -> float:
        """Return the threshold."""
        raise NotImplementedError

    def count(self, counts: Tensor) -> Tensor:
        """Return the counts [B] that hold for a batch, of those of its images."""
        return counts

    def select(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Selection:
        """Return the slots, best first, and the counts."""
        from edgeprune.pruning.ops import count_tokens, rank_tokens

        prepared = self.prepare(scores, valid)
        counts = self.count(count_tokens(prepared, self.k, self.mode, self.limit(module)).long())
        counts = counts if valid is None else counts.minimum(valid.sum(1))
        return Selection(rank_tokens(prepared)[:, : self.k], counts)

    def margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: the nearer of the count's own margin and that between the last token kept and the next."""
        counts = self.select(scores, valid, module).counts.clamp(min=self.k if self.fill else 0, max=self.k)
        margin = self.count_margin(scores if valid is None else scores.masked_fill(~valid, 0.0), valid, module)
        return margin.minimum(cut_margin(self.prepare(scores, valid), counts))

    def count_margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: how far the count is from another one, as a share of the scores next to it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Threshold(Slots):
    """Every score above a threshold.

    Attributes:
        threshold: the limit; None takes `keep_threshold` of the stage's module.
        least: tokens that stay at least.
        batch_mean: every image of a batch keeps as many as an image of the batch has above the threshold on average,
            rounded down; an image then depends on its batch.
    """

    threshold: float | None = None
    least: int = 0
    batch_mean: bool = False

    @property
    def exact_in_batch(self) -> bool:  # type: ignore[override]
        """Whether counts are those of the image itself."""
        return not self.batch_mean

    def limit(self, module: nn.Module | None) -> float:
        """Return the threshold."""
        if self.threshold is not None:
            return self.threshold
        from edgeprune.pruning.threshold import KeepThreshold

        assert isinstance(module, KeepThreshold)
        return float(module.keep_threshold.detach())

    def count(self, counts: Tensor) -> Tensor:
        """Return the counts with the least there may be, or their mean over the batch."""
        counts = counts.clamp(min=self.least)
        return counts if not self.batch_mean else (counts.sum() // len(counts)).expand_as(counts)

    def count_margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: between the threshold and the score nearest to it."""
        distance = (scores - self.limit(module)).abs()
        distance = distance if valid is None else distance.masked_fill(~valid, float("inf"))
        nearest, at = distance.min(1)
        return nearest / scale_at(scores, scores.gather(1, at[:, None])[:, 0])


@dataclass(frozen=True)
class Mass(Slots):
    """The fewest best tokens whose scores reach a share of the total; one at least.

    Attributes:
        mass: the share, of scores that sum to 1; from 1 up every token stays.
    """

    mass: float = 1.0

    @property
    def mode(self) -> int:  # type: ignore[override]
        """2, cumulative mass; 1 when everything stays."""
        return 2 if self.mass < 1 else 1

    def limit(self, module: nn.Module | None) -> float:
        """Return the mass, or a threshold that every token passes."""
        return self.mass if self.mass < 1 else NOT_KEPT / 10

    def count_margin(self, scores: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        """Return [B]: between the mass and the nearest cumulative sum, or neighbours in rank at the last kept token."""
        import torch

        if self.mass >= 1:
            return scores.new_full((len(scores),), torch.inf)
        ranked = scores.sort(1, descending=True).values
        distance = (ranked.cumsum(1) - self.mass).abs().amin(1)
        kept = (ranked.cumsum(1) - ranked < self.mass).sum(1, keepdim=True).clamp(1, scores.shape[1] - 1)
        gap = (ranked.gather(1, kept - 1) - ranked.gather(1, kept))[:, 0] / ranked[:, 0].clamp(min=1e-30)
        return distance.minimum(gap)


def with_capacities(stages: Sequence[Stage], capacities: Sequence[int], *, fill: bool = False) -> tuple[Stage, ...]:
    """Return adaptive stages with other numbers of slots; weights and scores are the same.

    Args:
        stages: in execution order, all adaptive.
        capacities: slots of each stage, none more than of the stage before.
        fill: slots an image does not need are filled with its next best tokens.
    """
    made, tokens = [], stages[0].counts.tokens_in
    for stage, capacity in zip(stages, capacities, strict=True):
        assert isinstance(stage.selector, Slots)
        selector = replace(stage.selector, k=capacity, fill=fill)
        made.append(replace(stage, selector=selector, counts=StageCounts(tokens, capacity)))
        tokens = capacity
    return tuple(made)


def rank_margin(scores: Tensor, k: int) -> Tensor:
    """Return [B]: between the k-th and the next score, as a share of `scale_at`; infinite when all stay."""
    import torch

    return cut_margin(scores, torch.full((len(scores),), k, device=scores.device))


def cut_margin(scores: Tensor, counts: Tensor) -> Tensor:
    """Return [B]: as `rank_margin`, behind as many scores [B, N] of an image as its count [B] says."""
    N = scores.shape[1]
    if N == 1:
        return scores.new_full((len(scores),), float("inf"))
    ranked = scores.sort(1, descending=True).values
    at = counts.clamp(1, N - 1).unsqueeze(1)
    kept, dropped = ranked.gather(1, at - 1)[:, 0], ranked.gather(1, at)[:, 0]
    gap = (kept - dropped) / scale_at(scores, kept)
    return gap.masked_fill((counts < 1) | (counts >= N), float("inf"))


def scale_at(scores: Tensor, edge: Tensor) -> Tensor:
    """Return [B]: how large scores [B, N] are where rounding could matter, next to a score `edge` [B].

    Rounding errors of attention are a share of each weight, so where no score is negative the edge itself counts, but
    no less than `EDGE_FLOOR` of the largest score; else the largest magnitude does.
    """
    there = scores.masked_fill(scores <= NOT_KEPT, 0.0)
    largest = there.abs().amax(1).clamp(min=1e-30)
    own = edge.abs().maximum(EDGE_FLOOR * largest)
    return own.where((there >= 0).all(1), largest)
