from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest

from edgeprune.export import ExportRequest
from edgeprune.search.accuracy import Judgement
from edgeprune.search.explore import Found, best_within, clearly_better, dominant, explore, frontier
from edgeprune.search.request import SearchRequest, check_request
from edgeprune.search.space import Candidate, make_space

IMAGES = 10_000
SPACE = make_space(check_request(SearchRequest(ExportRequest(model="vit_digits", method="dynamicvit"), "digits")))


def latency(candidate: Candidate) -> float:
    """The first stage saves most."""
    weights = (3, 1, 1)
    return 1 + sum(w * kept / 64 for w, (_, kept) in zip(weights, candidate.steps, strict=True))


def judge(candidate: Candidate) -> Judgement:
    """The last stage costs most accuracy, so that uniform schedules are far from the best."""
    lost = sum(w * (1 - kept / 64) ** 2 for w, (_, kept) in zip((0.05, 0.1, 0.5), candidate.steps, strict=True))
    return judgement(1 - lost)


def judgement(top1: float) -> Judgement:
    return Judgement(np.arange(IMAGES) < round(top1 * IMAGES), 1 - top1)


def everything() -> list[Found]:
    made = {
        Candidate(tuple(zip(SPACE.own, sorted(kept, reverse=True), strict=True)))
        for kept in combinations_with_replacement(range(4, 65, 4), 3)
    }
    return [Found(c, latency(c), judge(c)) for c in made]


@pytest.mark.parametrize("budget", [2.5, 3.0, 4.0])
def test_search_finds_the_known_optimum(budget: float) -> None:
    best = max((f for f in everything() if f.ms <= budget), key=lambda f: f.judgement.score)
    found = explore(SPACE.uniform(), SPACE.neighbours, latency, judge, evaluations=200, budget_ms=budget, seed=0)
    answer = best_within(found, budget)
    assert answer is not None and answer.ms <= budget
    assert answer.judgement.top1 == pytest.approx(best.judgement.top1, abs=0.004)
    uniform = max(f.judgement.top1 for f in found if f.label and f.ms <= budget)
    assert answer.judgement.top1 > uniform


def test_search_repeats_by_seed_and_keeps_to_its_number() -> None:
    def run(seed: int) -> list[Candidate]:
        found = explore(SPACE.uniform(), SPACE.neighbours, latency, judge, evaluations=60, budget_ms=None, seed=seed)
        return [f.candidate for f in found]

    assert run(1) == run(1) != run(2)
    assert len(run(1)) == len(set(run(1))) == 60


def test_uniform_schedules_are_all_judged() -> None:
    uniform = SPACE.uniform()
    found = explore(uniform, SPACE.neighbours, latency, judge, evaluations=1, budget_ms=None, seed=0)
    assert {f.candidate for f in found} == set(uniform.values())


def made(ms: float, top1: float, label: str | None = None) -> Found:
    return Found(Candidate(((1, round(ms * 100)),)), ms, judgement(top1), label)


def test_a_uniform_schedule_stays_unless_another_is_clearly_better() -> None:
    uniform = made(2, 0.9, "keep rate 0.7")
    assert best_within([uniform, made(1.9, 0.9001)], 2) is uniform  # one image in ten thousand
    better = made(1.9, 0.91)
    assert best_within([uniform, better], 2) is better
    assert best_within([uniform, better], 1.5) is None
    assert best_within([made(1.5, 0.9001, "keep rate 0.5"), uniform], 2) is uniform
    assert not clearly_better(uniform.judgement, uniform.judgement)


def test_frontier_is_at_least_as_accurate_as_every_uniform_schedule() -> None:
    found = explore(SPACE.uniform(), SPACE.neighbours, latency, judge, evaluations=120, budget_ms=None, seed=3)
    front = frontier(found)
    assert [f.ms for f in front] == sorted(f.ms for f in front)
    for uniform in (f for f in found if f.label):
        assert max(f.judgement.top1 for f in front if f.ms <= uniform.ms) >= uniform.judgement.top1
    assert all(
        a.judgement.score < b.judgement.score for a, b in zip(dominant(found), dominant(found)[1:], strict=False)
    )
