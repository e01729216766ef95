"""Which schedules there are: the places a method may prune at, how many tokens may stay there, what is next to what.

No torch, no measurement. A candidate is data; only its space knows the stages and the options it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, Protocol

from edgeprune.errors import InputError
from edgeprune.export.request import Resolved
from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import Method, Stage, StageRequest, Where, format_stages
from edgeprune.pruning.counts import CountRule, check_keep_rate
from edgeprune.search.request import BY_OPTION

UNIFORM_RATES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
LEVELS = 16  # numbers of tokens a stage can keep, spread evenly
STEPS = (1, 2, 4)  # levels a neighbour is away
DIGITS = range(2, 7)  # of a keep rate; `format_stages` writes no more
MOST_FREE = 4  # stages of a method whose places are free, unless it has more of its own

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, order=True)
class Candidate:
    """A schedule.

    Attributes:
        steps: (block, patch tokens it keeps; of an adaptive method, at most), in the order of the blocks. Where stages
            have weights every trained one is listed, also one that keeps all.
        settings: method options that say how many tokens go, where a keep rate does not.
    """

    steps: tuple[tuple[int, int], ...] = ()
    settings: Settings = ()


@dataclass(frozen=True)
class Schedule:
    """A candidate as `ExportRequest` takes it."""

    stages: str | None
    options: dict[str, Any] = field(default_factory=dict)


class Space(Protocol):
    """The candidates of a method."""

    @property
    def own(self) -> tuple[int, ...]:
        """The places of the uniform schedules."""
        ...

    @property
    def places(self) -> tuple[int, ...]:
        """Every block a stage may stand at."""
        ...

    def uniform(self) -> dict[str, Candidate]:
        """Return the method's own schedules, one number each, by what a user calls them."""
        ...

    def schedule(self, candidate: Candidate) -> Schedule:
        """Return what an export is told."""
        ...

    def stages(self, candidate: Candidate) -> tuple[Stage, ...]:
        """Return the stages of a candidate."""
        ...

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Return the candidates one change away, in a fixed order."""
        ...

    def designs(self, count: int, rng: Random) -> list[Candidate]:
        """Return about so many candidates that together tell what every number of tokens costs."""
        ...


def make_space(resolved: Resolved, *, fixed: bool = False) -> Space:
    """Return the space of a request; its `stages`, without rates, are the places of the uniform schedules.

    Args:
        resolved: says the method, its options and the model.
        fixed: no stage may stand anywhere else.

    Raises:
        InputError: `stages` when they come with rates or do not fit.
    """
    request, text = resolved.request, resolved.request.stages
    if text is not None and ":" in text:
        raise InputError(
            f"--stages {text} says how much to prune, which is what is searched for",
            code="stages",
            expected="the blocks alone",
            hint="for example --stages 3,6,9",
        )
    blocks = None if text is None else tuple(int(part) for part in text.split(","))
    if request.method in BY_OPTION:
        return OptionSpace(resolved.config, resolved.method, resolved.options, blocks)
    return RateSpace(resolved.config, resolved.method, resolved.options, blocks, fixed)


@dataclass(frozen=True)
class RateSpace:
    """Candidates of a method that takes a keep rate for every stage.

    Attributes:
        blocks: places of the uniform schedules; None for the method's own.
        fixed: no stage may stand anywhere else.
    """

    config: ViTConfig
    method: Method
    options: Mapping[str, Any]
    blocks: tuple[int, ...] | None = None
    fixed: bool = False

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The places of the uniform schedules."""
        return self.method.blocks(self.config, StageRequest(1.0, self.blocks), self.options)

    @cached_property
    def weighted(self) -> bool:
        """Whether stages have weights, trained for their blocks, so that they cannot move."""
        return any(_has_weights(stage) for stage in self._every(self.own))

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Every block a stage may stand at; behind the attention of the last block nothing is left to save."""
        if self.weighted or self.fixed:
            return self.own
        (stage, *_) = self._every(self.own)
        depth = self.config.depth
        first = 1 if stage.where is Where.PRE_BLOCK else 0
        return tuple(sorted({*range(first, depth - (stage.where is Where.MID_BLOCK)), *self.own}))

    @cached_property
    def most(self) -> int:
        """The largest number of stages."""
        return len(self.own) if self.weighted else min(len(self.places), max(MOST_FREE, len(self.own)))

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Numbers of tokens a stage may keep, ascending; the last is all of them."""
        N = self.config.num_patches
        return tuple(sorted({max(1, round(N * i / LEVELS)) for i in range(1, LEVELS + 1)}))

    def uniform(self) -> dict[str, Candidate]:
        """Return the schedules of single keep rates at the method's own places."""
        found: dict[str, Candidate] = {}
        for rate in (1.0, *UNIFORM_RATES) if self.method.adaptive(self.options) else UNIFORM_RATES:
            try:
                stages = self.method.every_stage(self.config, StageRequest(rate, self.blocks), self.options)
            except InputError:  # leaves a stage without a token
                continue
            steps = tuple((stage.block, stage.counts.kept) for stage in stages)
            if len({Candidate(steps), *found.values()}) > len(found):
                found[f"keep rate {rate:g}"] = self._made(steps)
        return found

    def schedule(self, candidate: Candidate) -> Schedule:
        """Return blocks with a keep rate each, which give back exactly the candidate's counts."""
        blocks = [block for block, _ in candidate.steps]
        return Schedule(format_stages(blocks, self._rates(candidate)))

    def stages(self, candidate: Candidate) -> tuple[Stage, ...]:
        """Return the stages that keep as many tokens as the candidate says."""
        if not candidate.steps:
            return ()
        blocks = tuple(block for block, _ in candidate.steps)
        return self.method.stages(self.config, StageRequest(1.0, blocks, self._rates(candidate)), self.options)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Return what keeps a few levels more or less at a stage or at all, moves a stage, or has one more or less."""
        found: list[Candidate] = []
        steps = candidate.steps
        for i, (block, kept) in enumerate(steps):
            at = self._level(kept)
            changed = (at + sign * step for step in STEPS for sign in (-1, 1))
            found += [
                self._made((*steps[:i], (block, self.levels[level]), *steps[i + 1 :]))
                for level in changed
                if 0 <= level < len(self.levels)
            ]
            if not self.weighted:
                found.append(self._made((*steps[:i], *steps[i + 1 :])))
                others = [(b, kept) for b in self._free_around(steps, i)]
                found += [self._made((*steps[:i], other, *steps[i + 1 :])) for other in others]
        for change in (sign * step for step in STEPS[:2] for sign in (-1, 1)):
            moved = [(b, self.levels[min(max(self._level(k) + change, 0), len(self.levels) - 1)]) for b, k in steps]
            found.append(self._made(moved))
        if not self.weighted and len(steps) < self.most:
            taken = {block for block, _ in steps}
            for block in (b for b in self.places if b not in taken):
                before = min((k for b, k in steps if b < block), default=self.config.num_patches)
                behind = max((k for b, k in steps if b > block), default=1)
                middle = self.levels[(self._level(before) + self._level(behind)) // 2]
                found.append(self._made(sorted([*steps, (block, middle)])))
        return [c for c in dict.fromkeys(found) if c != candidate and self._prunes(c)]

    def designs(self, count: int, rng: Random) -> list[Candidate]:
        """Return every level alone at the earliest place, then random schedules."""
        N = self.config.num_patches
        first = self.places[0]
        alone = [
            self._made([(b, level if b >= first else N) for b in (self.own if self.weighted else (first,))])
            for level in self.levels[:-1]
        ]
        chosen = dict.fromkeys(_thin(alone, max(2, count // 2)))
        for _ in range(20 * count):
            if len(chosen) >= count:
                break
            blocks = self.own if self.weighted else sorted(rng.sample(self.places, rng.randint(1, self.most)))
            kept = sorted(rng.choices(self.levels, k=len(blocks)), reverse=True)
            made = self._made(list(zip(blocks, kept, strict=True)))
            if self._prunes(made):
                chosen[made] = None
        return list(chosen)

    def _every(self, blocks: tuple[int, ...]) -> tuple[Stage, ...]:
        """Return one stage for each block."""
        return self.method.every_stage(self.config, StageRequest(1.0, blocks), self.options)

    def _rates(self, candidate: Candidate) -> tuple[float, ...]:
        assert self.method.rule is not None
        N, rates = self.config.num_patches, list[float]()
        current, fuse = N, bool(self.options.get("fuse", False))
        for _, kept in candidate.steps:
            rates.append(rate_for(self.method.rule, kept, current, N))
            current = current if kept >= current else kept + fuse
        return tuple(rates)

    def _made(self, steps: Sequence[tuple[int, int]]) -> Candidate:
        """Return the candidate of some steps: none keeps more than the one before, none is there for nothing."""
        N, fuse = self.config.num_patches, bool(self.options.get("fuse", False))
        kept_all = self.weighted or self.method.adaptive(self.options)
        made, current = [], N
        for block, kept in steps:
            kept = min(kept, current)
            if kept < current or kept_all:
                made.append((block, kept))
            current = current if kept >= current else kept + fuse
        return Candidate(tuple(made))

    def _prunes(self, candidate: Candidate) -> bool:
        adaptive = self.method.adaptive(self.options)
        return bool(candidate.steps) and (adaptive or candidate.steps[-1][1] < self.config.num_patches)

    def _level(self, kept: int) -> int:
        """Return the level next to a number of tokens."""
        return min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - kept))

    def _free_around(self, steps: Sequence[tuple[int, int]], i: int) -> Iterator[int]:
        """Yield the places next to a stage's that no other stage has."""
        at = self.places.index(steps[i][0]) if steps[i][0] in self.places else None
        taken = {block for block, _ in steps}
        for j in () if at is None else (at - 1, at + 1):
            if 0 <= j < len(self.places) and self.places[j] not in taken:
                yield self.places[j]


@dataclass(frozen=True)
class OptionSpace:
    """Candidates of a method whose option says how many tokens go at every stage: ToMe's `r`, Cropr's R.

    The blocks of a candidate are the method's own without some of the first (ToMe, which has no weights) or of the last
    (Cropr, whose modules are trained for their blocks and counted from the first).
    """

    config: ViTConfig
    method: Method
    options: Mapping[str, Any]
    blocks: tuple[int, ...] | None = None

    @cached_property
    def name(self) -> str:
        """The option."""
        return BY_OPTION[self.method.name]

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The blocks of the method's own schedules."""
        return self.method.blocks(self.config, StageRequest(1.0, self.blocks), self.options)

    @property
    def places(self) -> tuple[int, ...]:
        """The same: stages go, but none moves."""
        return self.own

    @cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The blocks a candidate may have, all of them first."""
        own = self.own
        cuts = range(len(own)) if self.method.name == "tome" else range(len(own), 0, -1)
        return tuple(own[cut:] if self.method.name == "tome" else own[:cut] for cut in cuts)

    @cached_property
    def grid(self) -> dict[Candidate, tuple[int, int, int]]:
        """All candidates with their coordinates: blocks, schedule, number."""
        found = {}
        schedules = ("constant", "decreasing") if self.method.name == "tome" else (None,)
        for i, blocks in enumerate(self.runs):
            for j, schedule in enumerate(schedules):
                for number in range(1, self.config.num_patches // 2 + 1):
                    settings: Settings = ((self.name, number),)
                    settings += () if schedule is None else (("schedule", schedule),)
                    candidate = Candidate(tuple((b, 0) for b in blocks), settings)
                    if self._fits(candidate):
                        found[candidate] = (i, j, number)
        return found

    def uniform(self) -> dict[str, Candidate]:
        """Return the schedules that take as many tokens at each of the method's own blocks."""
        return {f"{self.name}={number}": c for c, (i, j, number) in self.grid.items() if i == j == 0}

    def schedule(self, candidate: Candidate) -> Schedule:
        """Return the blocks, where they are not the method's own, and the options."""
        blocks = tuple(block for block, _ in candidate.steps)
        default = self.method.default_blocks(self.config, self.options)
        return Schedule(None if blocks == default else format_stages(blocks), dict(candidate.settings))

    def stages(self, candidate: Candidate) -> tuple[Stage, ...]:
        """Return the stages of a candidate."""
        blocks = tuple(block for block, _ in candidate.steps)
        options = {**self.options, **dict(candidate.settings)}
        return self.method.stages(self.config, StageRequest(1.0, blocks), options) if blocks else ()

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Return what differs a little in one coordinate."""
        i, j, number = self.grid[candidate]
        near = {(i + d, j, number) for d in (-1, 1)} | {(i, 1 - j, number)}
        near |= {(i, j, number + sign * step) for step in STEPS for sign in (-1, 1)}
        near |= {(i + d, j, number - d) for d in (-1, 1)}
        return [c for c, place in self.grid.items() if place in near and c != candidate]

    def designs(self, count: int, rng: Random) -> list[Candidate]:
        """Return candidates spread over the grid, the method's own first."""
        own = _thin(list(self.uniform().values()), count // 2)
        others = [c for c in self.grid if c not in own]
        return [*own, *rng.sample(others, min(len(others), count - len(own)))]

    def _fits(self, candidate: Candidate) -> bool:
        """Return whether the number has its full effect somewhere and leaves a token everywhere."""
        number = candidate.settings[0][1]
        try:
            stages = self.stages(candidate)
        except InputError:
            return False
        tokens = [self.config.num_patches, *(stage.counts.kept for stage in stages)]
        return bool(stages) and max(a - b for a, b in pairwise(tokens)) >= number and tokens[-1] > 1


def rate_for(rule: CountRule, kept: int, current: int, initial: int) -> float:
    """Return the shortest keep rate that makes a rule keep exactly so many of the current tokens.

    Args:
        rule: of the method.
        kept: tokens to keep; all of them when it is not below `current`.
        current: tokens that reach the stage.
        initial: patch tokens of an image.

    Raises:
        InputError: `keep-rate` when no rate of six digits does.
    """
    base = initial if rule.base == "initial" else current
    if kept >= current and (rule.base == "current" or current >= initial):
        return 1.0
    kept = min(kept, current)
    floor = rule.rounding == "floor"
    for digits in DIGITS:
        scale = 10**digits
        nearest = (math.ceil if floor else math.floor)(kept / base * scale)
        for share in (
            nearest / scale,
            (nearest + (1 if floor else -1)) / scale,
        ):  # the second where rounding is in the way
            if 0 < share <= 1 and (math.floor if floor else math.ceil)(share * base) == kept:
                return check_keep_rate(share)
    raise InputError(
        f"no keep rate of six digits keeps {kept} of {base} tokens", code="keep-rate", expected="fewer patch tokens"
    )


def _has_weights(stage: Stage) -> bool:
    """Return whether a stage's scorer brings weights; asks the class, so that none are made."""
    from edgeprune.pruning.base import Scorer

    return type(stage.scorer).build is not Scorer.build


def _thin(items: list[Candidate], count: int) -> list[Candidate]:
    """Return so many of the items, spread evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
