"""From candidate to candidate: mutate what is on the front, judge it, and say which of two is really better.

Pure functions of a space, a latency and a judgement, with a fixed number of judgements and a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from edgeprune.search.accuracy import Judgement
from edgeprune.search.space import Candidate

SIGNIFICANT = 2.0  # standard errors a candidate must be better by to take a uniform schedule's place
NEAR_BUDGET = 5  # schedules within the budget that are always worth mutating
SLACK = 1.02  # latency of candidates worth judging, over the budget
TRIES = 50
Latency = Callable[[Candidate], float]
Judging = Callable[[Candidate], Judgement]
Neighbours = Callable[[Candidate], Sequence[Candidate]]


@dataclass(frozen=True)
class Found:
    """A judged candidate.

    Attributes:
        ms: predicted latency.
        label: of a uniform schedule, None of another.
    """

    candidate: Candidate
    ms: float
    judgement: Judgement
    label: str | None = None


def explore(
    uniform: Mapping[str, Candidate],
    neighbours: Neighbours,
    latency: Latency,
    judge: Judging,
    *,
    evaluations: int,
    budget_ms: float | None,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[Found]:
    """Return every candidate that was judged: the uniform ones, then those that grew out of the best.

    Args:
        uniform: schedules by name; all are judged, whatever `evaluations` says.
        neighbours: of a candidate.
        latency: milliseconds.
        judge: on the images.
        evaluations: judgements in all.
        budget_ms: candidates that take much longer are not judged; None for all.
        seed: of the choices.
        report: called with the judgements so far.
    """
    rng, seen = Random(seed), dict[Candidate, Found]()
    for label, candidate in uniform.items():
        seen.setdefault(candidate, Found(candidate, latency(candidate), judge(candidate), label))
        report(len(seen))
    fruitless = 0
    while seen and len(seen) < evaluations and fruitless < TRIES:
        parent = rng.choice(_parents(list(seen.values()), budget_ms)).candidate
        for _ in range(rng.randint(1, 2)):  # sometimes two changes at once
            parent = rng.choice(list(neighbours(parent)) or [parent])
        if parent in seen or (budget_ms is not None and latency(parent) > SLACK * budget_ms):
            fruitless += 1
            continue
        fruitless = 0
        seen[parent] = Found(parent, latency(parent), judge(parent))
        report(len(seen))
    return list(seen.values())


def _parents(found: Sequence[Found], budget_ms: float | None) -> list[Found]:
    """Return what is worth mutating: the front, and with a budget the best within it."""
    front = dominant(found)
    if budget_ms is None:
        return front
    within = sorted((f for f in found if f.ms <= budget_ms), key=lambda f: f.judgement.score, reverse=True)
    return [*within[:NEAR_BUDGET], *(f for f in front if f.ms <= budget_ms)] or [min(found, key=lambda f: f.ms)]


def dominant(found: Iterable[Found]) -> list[Found]:
    """Return those that no other beats in both latency and score, the fastest first."""
    front: list[Found] = []
    for f in sorted(found, key=lambda f: (f.ms, tuple(-s for s in f.judgement.score))):
        if not front or f.judgement.score > front[-1].judgement.score:
            front.append(f)
    return front


def layers(found: Iterable[Found], count: int) -> list[Found]:
    """Return at least so many of the best: the front, then the front of the others, and so on."""
    rest, chosen = list(found), list[Found]()
    while rest and len(chosen) < count:
        front = dominant(rest)
        chosen += front
        rest = [f for f in rest if f not in front]
    return chosen


def clearly_better(one: Judgement, other: Judgement) -> bool:
    """Return whether a schedule is better than another on the same images by more than chance explains."""
    gain = one.right.astype(np.int64) - other.right.astype(np.int64)
    return float(gain.sum()) > SIGNIFICANT * float(np.sqrt((gain != 0).sum()))


def best_within(found: Sequence[Found], budget_ms: float) -> Found | None:
    """Return the schedule for a budget: the slowest uniform one within it, unless another is clearly better.

    Choosing the highest of many noisy accuracies would choose luck; where nothing tells schedules apart, the one that
    keeps most tokens is the safer one. None when all take longer.
    """
    within = [f for f in found if f.ms <= budget_ms]
    uniform = max((f for f in within if f.label is not None), key=lambda f: (f.ms, f.judgement.score), default=None)
    return _unless_better(within, uniform)


def frontier(found: Sequence[Found]) -> list[Found]:
    """Return the schedules worth having, the fastest first; each scores more than the last.

    A uniform one has its place unless another that is no slower is clearly better than the best uniform one.
    """
    chosen: list[Found] = []
    for limit in sorted({f.ms for f in found}):
        within = [f for f in found if f.ms <= limit]
        uniform = max((f for f in within if f.label is not None), key=lambda f: f.judgement.score, default=None)
        best = _unless_better(within, uniform)
        if best is not None and (not chosen or best.judgement.score > chosen[-1].judgement.score):
            chosen.append(best)
    return chosen


def _unless_better(within: Sequence[Found], uniform: Found | None) -> Found | None:
    """Return the uniform schedule unless the best of all is clearly better."""
    best = max(within, key=lambda f: f.judgement.score, default=None)
    if best is None or uniform is None or clearly_better(best.judgement, uniform.judgement):
        return best
    return uniform
