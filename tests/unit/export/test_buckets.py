from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.export import buckets as bk
from edgeprune.export.buckets import Bucket, Buckets, Counts, FlatCurve


@dataclass(frozen=True)
class Linear:
    """A fixed part and a weight for each stage's capacity."""

    fixed: float
    weights: tuple[float, ...]

    def latency(self, capacities: Bucket) -> float:
        return self.fixed + float(np.dot(self.weights, capacities))


@dataclass(frozen=True)
class Problem:
    counts: Counts
    slots: Bucket
    latency: Linear


@st.composite
def problems(draw: st.DrawFn, stages: int | None = None, most: int = 9) -> Problem:
    depth = stages or draw(st.integers(1, 3))
    slots = sorted(draw(st.lists(st.integers(1, most), min_size=depth, max_size=depth)), reverse=True)
    row = st.lists(st.integers(0, most + 2), min_size=depth, max_size=depth).map(lambda r: sorted(r, reverse=True))
    counts = np.array(draw(st.lists(row, min_size=1, max_size=12)))
    weights = draw(st.lists(st.integers(1, 5), min_size=depth, max_size=depth))
    return Problem(counts, tuple(slots), Linear(float(draw(st.integers(0, 10))), tuple(map(float, weights))))


def routed(row: np.ndarray, buckets: Buckets) -> list[int]:
    """Return the buckets one image runs, in order, told one at a time."""
    wants = [min(n, k) for n, k in zip(row.tolist(), buckets[-1], strict=True)]
    runs = []
    for i, bucket in enumerate(buckets):
        if not runs and wants[0] > bucket[0]:
            continue
        runs.append(i)
        if all(n <= c for n, c in zip(wants, bucket, strict=True)):
            return runs
    raise AssertionError("the last bucket holds every image")


def slow_cost(counts: Counts, buckets: Buckets, latency: bk.LatencyModel) -> float:
    return sum(latency.latency(buckets[i]) for row in counts for i in routed(row, buckets)) / len(counts)


def up(n: int, multiple: int) -> int:
    return -(-max(n, 1) // multiple) * multiple


def rows_for(problem: Problem, firsts: list[int], q: float, multiple: int = 1) -> list[Bucket]:
    """Return the bucket of every first capacity, by the definition."""
    kept = np.minimum(problem.counts, problem.slots)
    rows: list[Bucket] = []
    for c in firsts:
        some = kept[kept[:, 0] <= c]
        later = [sorted(some[:, s])[int(np.ceil(q * (len(some) - 1)))] for s in range(1, len(problem.slots))]
        sizes = (c, *(min(up(n, multiple), c, k) for n, k in zip(later, problem.slots[1:], strict=True)))
        rows.append(tuple(map(max, sizes, rows[-1])) if rows else sizes)
    return rows


def bucket_lists(rows: list[Bucket], slots: Bucket, number: int) -> Iterator[Buckets]:
    partial = [row for row in rows if row != slots]
    for size in range(number):
        for some in combinations(partial, size):
            yield (*some, slots)


def assert_well_formed(buckets: Buckets, slots: Bucket) -> None:
    assert buckets[-1] == slots
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket[-1] >= 1
        assert all(a >= b for a, b in pairwise(bucket))
    for small, large in pairwise(buckets):
        assert all(a <= b for a, b in zip(small, large, strict=True))


def spread(n: int = 200, stages: int = 3, most: int = 16, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    return np.minimum.accumulate(rng.integers(1, most + 1, (n, stages)), axis=1)


# Simulation


@given(problems(), st.data())
def test_simulate_equals_a_loop_over_images(problem: Problem, data: st.DataObject) -> None:
    lists = st.lists(st.lists(st.integers(1, 9), min_size=len(problem.slots), max_size=len(problem.slots)), max_size=3)
    drawn = np.array([*data.draw(lists), [0] * len(problem.slots)])
    nested = np.minimum(np.maximum.accumulate(np.minimum.accumulate(drawn, axis=1), axis=0), problem.slots)
    buckets = tuple(sorted({tuple(row) for row in nested.tolist() if row[-1] > 0} | {problem.slots}))
    expectation = bk.simulate(problem.counts, buckets, problem.latency, stem_ms=2.0)
    runs = [routed(row, buckets) for row in problem.counts]
    ends = [sum(r[-1] == i for r in runs) / len(runs) for i in range(len(buckets))]
    assert expectation.expected_ms == pytest.approx(slow_cost(problem.counts, buckets, problem.latency) + 2)
    assert expectation.shares == pytest.approx(ends)
    assert expectation.overflow == pytest.approx(sum(len(r) > 1 for r in runs) / len(runs))
    assert expectation.bucket_ms == tuple(problem.latency.latency(b) for b in buckets)


def test_simulate_counts_every_wasted_run() -> None:
    buckets = ((2, 1), (4, 2), (8, 8))
    expectation = bk.simulate(np.array([[2, 1], [2, 2], [1, 1], [4, 4]]), buckets, Linear(0, (1, 0)), stem_ms=1)
    assert expectation == bk.Expectation(1 + (2 + (2 + 4) + 2 + (4 + 8)) / 4, (0.5, 0.25, 0.25), 0.5, (2, 4, 8))


def test_simulate_takes_counts_above_the_slots_as_the_slots() -> None:
    expectation = bk.simulate(np.array([[9, 9], [9, 1]]), ((4, 2), (4, 4)), Linear(1, (0, 0)))
    assert (expectation.shares, expectation.overflow) == ((0.5, 0.5), 0.5)


# Choice


@given(problems(stages=1), st.integers(1, 4))
def test_one_stage_is_optimal_among_all_bucket_lists(problem: Problem, number: int) -> None:
    chosen = bk.choose_buckets(problem.counts, problem.slots, number, problem.latency)
    every = bucket_lists([(c,) for c in range(1, problem.slots[0] + 1)], problem.slots, number)
    best = min(slow_cost(problem.counts, buckets, problem.latency) for buckets in every)
    assert slow_cost(problem.counts, chosen, problem.latency) == pytest.approx(best)


@given(problems(most=6), st.integers(1, 4), st.sampled_from([1.0, 0.8, 0.5]), st.integers(1, 3))
@settings(max_examples=60)
def test_several_stages_are_optimal_for_a_quantile_with_reruns(
    problem: Problem, number: int, q: float, multiple: int
) -> None:
    chosen = bk.choose_buckets(problem.counts, problem.slots, number, problem.latency, multiple=multiple, margins=(q,))
    kept = np.minimum(problem.counts, problem.slots)
    firsts = sorted({min(up(n, multiple), problem.slots[0]) for n in kept[:, 0].tolist()})
    costs = {
        buckets: slow_cost(problem.counts, buckets, problem.latency)
        for buckets in bucket_lists(rows_for(problem, firsts, q, multiple), problem.slots, number)
    }
    assert costs[chosen] == pytest.approx(min(costs.values()))
    assert len(chosen) == min(len(b) for b, cost in costs.items() if cost <= min(costs.values()) * (1 + 1e-9))


@given(problems(), st.integers(1, 5), st.integers(1, 4))
def test_chosen_buckets_are_nested_used_and_end_with_the_slots(problem: Problem, number: int, multiple: int) -> None:
    chosen = bk.choose_buckets(problem.counts, problem.slots, number, problem.latency, multiple=multiple)
    assert_well_formed(chosen, problem.slots)
    assert len(chosen) <= number
    assert all(share > 0 for share in bk.simulate(problem.counts, chosen, problem.latency).shares[:-1])
    for bucket in chosen:
        limits = np.minimum(problem.slots, bucket[0])
        assert all(c % multiple == 0 or c == k for c, k in zip(bucket, limits, strict=True))


@given(problems())
def test_more_buckets_or_quantiles_are_never_worse(problem: Problem) -> None:
    def cost(number: int, quantiles: tuple[float, ...]) -> float:
        chosen = bk.choose_buckets(problem.counts, problem.slots, number, problem.latency, margins=quantiles)
        return bk.simulate(problem.counts, chosen, problem.latency).expected_ms

    by_number = [cost(number, (1.0, 0.7)) for number in range(1, 6)]
    assert all(b <= a + 1e-9 for a, b in pairwise(by_number))
    assert cost(3, (1.0, 0.7)) <= min(cost(3, (1.0,)), cost(3, (0.7,))) + 1e-9


def test_the_quantile_trades_reruns_for_tight_capacities() -> None:
    counts = np.array([[8, 2]] * 99 + [[8, 8]])
    steep, late = Linear(0, (0, 1)), Linear(1000, (0, 1))
    assert bk.choose_buckets(counts, (8, 8), 4, steep) == ((8, 2), (8, 8))
    assert bk.choose_buckets(counts, (8, 8), 4, late) == ((8, 8),)


def test_buckets_stay_nested_where_the_quantile_falls() -> None:
    counts = np.array([[2, 2], [4, 1], [4, 1], [4, 1]])
    chosen = bk.choose_buckets(counts, (8, 8), 3, Linear(0, (1, 1)), margins=(0.5,))
    assert chosen == ((2, 2), (4, 2), (8, 8))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[8, 8]] * 5, ((8, 6),)),
        ([[1, 1]] * 5, ((1, 1), (8, 6))),
        ([[0, 0]] * 5, ((1, 1), (8, 6))),
        ([[3, 2]], ((3, 2), (8, 6))),
        ([[8, 1]], ((8, 1), (8, 6))),
        ([[2, 2], [5, 5]], ((2, 2), (5, 5), (8, 6))),
    ],
    ids=["all-kept", "one-kept", "none-kept", "one-image", "tight-later-stage", "two-distinct-counts"],
)
def test_at_most_as_many_buckets_as_distinct_images_and_the_full_one(
    counts: list[list[int]], expected: Buckets
) -> None:
    assert bk.choose_buckets(np.array(counts), (8, 6), 64, Linear(1, (1, 1))) == expected


def test_a_latency_that_does_not_depend_on_tokens_needs_one_bucket() -> None:
    assert bk.choose_buckets(spread(), (16, 16, 16), 4, Linear(3, (0, 0, 0))) == ((16, 16, 16),)


@pytest.mark.parametrize("number", [0, 65])
def test_the_number_of_buckets_has_limits(number: int) -> None:
    with pytest.raises(InputError, match="from 1 to 64") as error:
        bk.choose_buckets(spread(), (16, 16, 16), number, Linear(0, (1, 1, 1)))
    assert error.value.code == "buckets"


def test_capacities_are_multiples_of_at_least_one() -> None:
    with pytest.raises(InputError, match="multiples of 0") as error:
        bk.choose_buckets(spread(), (16, 16, 16), 2, Linear(0, (1, 1, 1)), multiple=0)
    assert error.value.code == "buckets"


@pytest.mark.parametrize(
    "counts",
    [np.zeros((0, 2), int), np.zeros((3, 1), int), np.zeros(2, int), np.array([[1, 2]]), np.array([[1, -1]])],
    ids=["no-images", "stages", "no-rows", "growing", "negative"],
)
def test_counts_that_are_none_are_refused(counts: Counts) -> None:
    calls: list[Callable[[], object]] = [
        lambda: bk.choose_buckets(counts, (4, 4), 2, Linear(0, (1, 1))),
        lambda: bk.simulate(counts, ((4, 4),), Linear(0, (1, 1))),
        lambda: bk.given_buckets([2], (4, 4), counts=counts, latency=Linear(0, (1, 1))),
    ]
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        assert error.value.code == "calibration"


# Given buckets


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ([4], ((4, 4), (8, 6))),
        ([2, 7], ((2, 2), (7, 6), (8, 6))),
        ([8], ((8, 6),)),
        ([np.int64(4), 8], ((4, 4), (8, 6))),
    ],
)
def test_given_buckets_never_overflow_when_not_calibrated(first: list[int], expected: Buckets) -> None:
    assert bk.given_buckets(first, (8, 6)) == expected


def test_given_buckets_are_calibrated() -> None:
    counts = np.array([[3, 1], [4, 2], [6, 3], [8, 6]])
    chosen = bk.given_buckets([4, 7], (8, 6), counts=counts, latency=Linear(1, (1, 1)))
    assert chosen == ((4, 2), (7, 3), (8, 6))


def test_given_buckets_that_are_full_have_the_slots() -> None:
    chosen = bk.given_buckets([8], (8, 6), counts=np.array([[8, 1]]), latency=Linear(0, (1, 1)))
    assert chosen == ((8, 6),)


def test_given_buckets_below_all_images_are_sized_for_the_nearest() -> None:
    counts = np.array([[4, 1], [6, 2]])
    assert bk.given_buckets([3, 6], (8, 8), counts=counts, latency=Linear(1, (1, 1))) == ((3, 1), (6, 2), (8, 8))


@given(problems(), st.data(), st.integers(1, 4))
def test_given_buckets_keep_the_first_capacities(problem: Problem, data: st.DataObject, multiple: int) -> None:
    first = sorted(data.draw(st.sets(st.integers(1, problem.slots[0]), min_size=1)))
    chosen = bk.given_buckets(first, problem.slots, counts=problem.counts, multiple=multiple, latency=problem.latency)
    loose = bk.given_buckets(first, problem.slots)
    for buckets in (chosen, loose):
        assert_well_formed(buckets, problem.slots)
        assert [b[0] for b in buckets] == sorted({*first, problem.slots[0]})
    assert bk.simulate(problem.counts, loose, problem.latency).overflow == 0


@pytest.mark.parametrize(
    ("first", "hint"),
    [
        ([], None),
        ([0, 4], "did you mean 4?"),
        ([4, 2], "did you mean 2, 4?"),
        ([4, 4], "did you mean 4?"),
        ([4, 9], "did you mean 4?"),
        ([2.5], None),
        ([True], None),
    ],
)
def test_given_buckets_say_what_was_expected(first: list[int], hint: str | None) -> None:
    with pytest.raises(InputError) as error:
        bk.given_buckets(first, (8, 6))
    assert error.value.code == "buckets"
    assert error.value.expected == "1 to 64 whole numbers, each larger than the one before, from 1 to 8"
    assert error.value.hint == hint


def test_given_buckets_are_64_at_most() -> None:
    assert len(bk.given_buckets(range(1, 65), (100,))) == 65
    with pytest.raises(InputError, match="1 to 64 whole numbers"):
        bk.given_buckets(range(1, 66), (100,))


# Cross-validation


def test_cross_validated_judges_by_the_other_half() -> None:
    counts = np.array([[2, 1], [2, 2], [2, 1], [2, 2], [2, 1]])
    latency = Linear(0, (1, 1))

    def choose(half: Counts) -> Buckets:
        return ((2, int(half[:, 1].max())), (4, 4))

    # two odd images overflow (2, 1) and end in (4, 4); three even ones fit (2, 2)
    assert bk.cross_validated(counts, choose, latency, 1.0) == bk.HeldOut(1 + (2 * (3 + 8) + 3 * 4) / 5, 2 / 5)


def test_cross_validated_is_the_expectation_when_the_choice_is_fixed() -> None:
    counts, latency, buckets = spread(31), Linear(1, (1, 2, 3)), ((8, 4, 2), (16, 16, 16))
    whole = bk.simulate(counts, buckets, latency, 0.5)
    held_out = bk.cross_validated(counts, lambda _: buckets, latency, 0.5)
    assert held_out.expected_ms == pytest.approx(whole.expected_ms)
    assert held_out.overflow == pytest.approx(whole.overflow)


def test_cross_validation_needs_two_images() -> None:
    with pytest.raises(InputError, match="at least two images") as error:
        bk.cross_validated(np.array([[1]]), lambda _: ((4,),), Linear(0, (1,)))
    assert error.value.code == "calibration"


# Histogram


def test_histogram_counts_images_per_stage() -> None:
    assert bk.histogram(np.array([[5, 2], [5, 0], [3, 2]])) == [[(3, 1), (5, 2)], [(0, 1), (2, 2)]]


# Latency curve


def test_curve_weighs_segments_by_their_blocks() -> None:
    curve = FlatCurve.measured([(8, 10.0), (2, 4.0)], [1, 3], (8, 8))
    assert curve.latency((8, 8)) == pytest.approx(10)
    assert curve.latency((8, 2)) == pytest.approx(10 / 4 + 4 * 3 / 4)
    assert curve.latency((5, 5)) == pytest.approx(7)


def test_curve_is_flat_below_and_straight_above_its_points() -> None:
    curve = FlatCurve.measured([(2, 4.0), (4, 5.0), (6, 7.0)], [1], (8,))
    assert [curve.latency((n,)) for n in (1, 8)] == [4.0, 9.0]


def test_curve_of_one_point_is_flat() -> None:
    curve = FlatCurve.measured([(4, 3.0)], [2, 1], (8, 8))
    assert [curve.latency(c) for c in ((1, 1), (8, 8))] == pytest.approx([3, 3])


def test_curve_takes_repeated_points_as_their_mean() -> None:
    curve = FlatCurve.measured([(4, 3.0), (8, 9.0), (4, 5.0)], [1], (8,))
    assert (curve.tokens, curve.ms) == ((4, 8), (4.0, 9.0))


def test_curve_pools_points_that_fall() -> None:
    curve = FlatCurve.measured([(1, 1.0), (2, 6.0), (3, 3.0), (3, 3.0), (4, 3.0), (5, 9.0)], [1], (8,))
    assert curve.ms == pytest.approx((1, 3.75, 3.75, 3.75, 9))


def test_curve_takes_points_above_the_slots_as_the_full_bucket() -> None:
    assert FlatCurve.measured([(8, 4.0), (99, 6.0)], [1], (8,)).ms == (5.0,)


def test_curve_survives_a_segment_without_blocks() -> None:
    curve = FlatCurve.measured([(2, 1.0), (4, 2.0), (8, 2.5)], [0, 2], (8, 4))
    assert curve.latency((8, 4)) == pytest.approx(2)
    assert curve.latency((8, 2)) == pytest.approx(1)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 100)), min_size=1, max_size=8, unique_by=lambda p: p[0]),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_curve_gives_back_what_was_measured(points: list[tuple[int, float]], stages: list[tuple[int, int]]) -> None:
    slots = (20, *sorted((k for _, k in stages[1:]), reverse=True))
    ms = sorted(value for _, value in points)
    rising = list(zip(sorted(n for n, _ in points), ms, strict=True))
    curve = FlatCurve.measured(rising, [b for b, _ in stages], slots)
    for n, value in rising:
        assert curve.latency(tuple(min(n, k) for k in slots)) == pytest.approx(value, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 100)), min_size=1, max_size=12))
def test_curve_never_falls(points: list[tuple[int, float]]) -> None:
    curve = FlatCurve.measured(points, [1, 2], (20, 10))
    ms = [curve.latency((n, min(n, 10))) for n in range(1, 25)]
    assert all(a <= b + 1e-9 for a, b in pairwise(ms))


@pytest.mark.parametrize("points", [[], [(4, float("nan"))], [(4, -1.0)], [(-4, 1.0)]])
def test_curve_refuses_points_that_are_no_measurements(points: list[tuple[int, float]]) -> None:
    with pytest.raises(InputError, match="at least one pair") as error:
        FlatCurve.measured(points, [1], (8,))
    assert error.value.code == "latency-curve"


@pytest.mark.parametrize("blocks", [[], [1], [0, 0], [2, -1]])
def test_curve_refuses_blocks_that_do_not_match(blocks: list[int]) -> None:
    with pytest.raises(InputError, match="2 adaptive stages") as error:
        FlatCurve.measured([(4, 1.0)], blocks, (8, 8))
    assert error.value.code == "latency-curve"


def test_curve_leads_to_buckets() -> None:
    curve = FlatCurve.measured([(4, 2.0), (8, 4.0), (16, 9.0)], [1, 1, 1], (16, 16, 16))
    counts = spread()
    chosen = bk.choose_buckets(counts, (16, 16, 16), 4, curve, multiple=2)
    assert len(chosen) == 4
    assert bk.simulate(counts, chosen, curve).expected_ms < 9.0
