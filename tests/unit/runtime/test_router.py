"""Routing images to buckets, on backends made of numpy that imitate a method: an image says what it wants to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.runtime.manifest import TensorInfo
from edgeprune.runtime.router import OneByOne, Router, Trace, Whole, batch_of, stack

Bucket = tuple[int, ...]
PATCHES = 12  # of an image
ANY = -1


def make_images(wants: Sequence[Sequence[int]]) -> np.ndarray:
    """Return images [B, 1, 1, 1 + S]: a number that names the image, and what it wants to keep at every stage."""
    rows = [[100 + i, *want] for i, want in enumerate(wants)]
    return np.array(rows, np.float32)[:, None, None]


def effective(want: Sequence[int], capacities: Bucket, *, fill: bool = False) -> list[int]:
    """Return what the method counts: no more than the tokens that reach a stage."""
    counts, there = [], PATCHES
    for wish, capacity in zip(want, capacities, strict=True):
        counts.append(min(wish, there))
        there = capacity if fill else min(counts[-1], capacity)
    return counts


def tensor(name: str, batch: int, *sides: int) -> TensorInfo:
    return TensorInfo(name=name, dtype="float32", shape=[batch, *sides])


class Fake:
    """What all fakes share: batches they were run with, and the size they insist on."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, []
        self.inputs: list[TensorInfo] = []
        self.outputs: list[TensorInfo] = []

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    def note(self, feeds: Mapping[str, np.ndarray]) -> None:
        assert set(feeds) == {info.name for info in self.inputs}
        sizes = {len(value) for name, value in feeds.items() if name != "slots"}
        assert len(sizes) == 1
        assert self.batch in (ANY, *sizes)
        self.seen.append(sizes.pop())


class Stem(Fake):
    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.inputs = [tensor("images", batch, 1, 1, 2)]

    def run(self, feeds: Mapping[str, np.ndarray], keep: object = ()) -> dict[str, np.ndarray]:
        self.note(feeds)
        rows = feeds["images"][:, 0, 0]
        counts = np.minimum(rows[:, 1], PATCHES).astype(np.int32)
        ranks = np.tile(np.arange(PATCHES, dtype=np.int32), (len(rows), 1))
        return {"features": rows, "token_count": counts, "token_ranks": ranks, "unread": rows[:, :1]}


class Rest(Fake):
    """Static with capacities, or told them."""

    def __init__(self, batch: int, capacities: Bucket | None, *, fill: bool) -> None:
        super().__init__(batch)
        self.capacities, self.fill = capacities, fill
        self.inputs = [
            tensor("features", batch, 2),
            tensor("token_ranks", batch, PATCHES),
            TensorInfo(name="token_count", dtype="int32", shape=[batch]),
        ]
        if capacities is None:
            self.inputs.append(TensorInfo(name="slots", dtype="int64", shape=[2]))

    def run(self, feeds: Mapping[str, np.ndarray], keep: object = ()) -> dict[str, np.ndarray]:
        self.note(feeds)
        capacities = self.capacities
        if capacities is None:
            assert feeds["slots"].dtype == np.int64
            capacities = tuple(feeds["slots"].tolist())
        rows = feeds["features"]
        assert (feeds["token_count"] == np.minimum(rows[:, 1], PATCHES)).all()
        counts = [effective(row[1:].astype(int), capacities, fill=self.fill) for row in rows]
        out = {"logits": np.array([[row[0], sum(capacities), *own] for row, own in zip(rows, counts, strict=True)])}
        for s, capacity in enumerate(capacities):
            kept = [[p if p < own[s] or self.fill else -1 for p in range(capacity)] for own in counts]
            out[f"kept_indices_{s}"] = np.array(kept, np.int32).reshape(len(rows), capacity)
        out["kept_counts"] = np.array(counts, np.int32)
        return out


@dataclass
class Case:
    """Buckets, what images want, and the batches the graphs are made for."""

    buckets: tuple[Bucket, ...]
    wants: list[list[int]]
    stem_batch: int = ANY
    rest_batch: int = ANY
    told: bool = False
    fill: bool = False
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        self.stem = Stem(self.stem_batch)
        if self.told:
            self.rests = [Rest(self.rest_batch, None, fill=self.fill)] * len(self.buckets)
        else:
            self.rests = [Rest(self.rest_batch, bucket, fill=self.fill) for bucket in self.buckets]
        self.router = Router(self.stem, self.rests, self.buckets, fill=self.fill)

    def run(self, order: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        images = make_images(self.wants)
        return self.router.run(images if order is None else images[list(order)], self.trace)

    def visits(self, want: Sequence[int]) -> list[int]:
        """Return the buckets an image runs in, by the documented rule."""
        slots = self.buckets[-1]
        visited: list[int] = []
        for i, bucket in enumerate(self.buckets):
            if not visited and min(want[0], PATCHES, slots[0]) > bucket[0]:
                continue
            visited.append(i)
            counts = effective(want, bucket, fill=self.fill)
            if all(min(c, k) <= b for c, k, b in zip(counts, slots, bucket, strict=True)):
                return visited
        raise AssertionError("the last bucket holds every image")


@st.composite
def bucket_lists(draw: st.DrawFn) -> tuple[Bucket, ...]:
    """Nested buckets of 1 to 3 stages; capacities fall along a bucket."""
    stages = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.integers(1, PATCHES), min_size=stages, max_size=stages), min_size=1, max_size=5))
    nested = np.maximum.accumulate(np.minimum.accumulate(np.array(rows), 1), 0)
    return tuple(tuple(row) for row in nested.tolist())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    buckets = draw(bucket_lists())
    want = st.lists(st.integers(0, PATCHES), min_size=len(buckets[0]), max_size=len(buckets[0]))
    return Case(
        buckets,
        draw(st.lists(want, min_size=1, max_size=12)),
        stem_batch=draw(st.sampled_from([ANY, 1, 2, 3, 8])),
        rest_batch=draw(st.sampled_from([ANY, 1, 2, 3, 8])),
        told=draw(st.booleans()),
        fill=draw(st.booleans()),
    )


# ------------------------------------------------------------------------------------------------ any case


@given(cases())
def test_every_image_gets_its_own_result_in_its_bucket(case: Case) -> None:
    out = case.run()
    slots = case.buckets[-1]
    for i, want in enumerate(case.wants):
        bucket = case.visits(want)[-1]
        capacities = case.buckets[bucket]
        counts = effective(want, capacities, fill=case.fill)
        assert out["bucket"][i] == bucket
        assert out["logits"][i].tolist() == [100 + i, sum(capacities), *counts]
        assert out["overflow"][i] == any(c > k for c, k in zip(counts, slots, strict=True))
        assert out["kept_counts"][i].tolist() == (
            [max(c, k) for c, k in zip(counts, capacities, strict=True)] if case.fill else counts
        )
        for s, capacity in enumerate(capacities):
            kept = out[f"kept_indices_{s}"][i].tolist()
            assert len(kept) == slots[s]
            assert sum(k != -1 for k in kept) == (capacity if case.fill else min(counts[s], capacity))
    assert all(len(value) == len(case.wants) for value in out.values())
    types = {name: out[name].dtype for name in ("bucket", "overflow", "kept_counts", "kept_indices_0")}
    assert set(types.values()) == {np.dtype(np.int32)}


@given(cases())
def test_masked_slots_give_what_the_full_bucket_gives(case: Case) -> None:
    """Exactness: the counts of an image are those it has with all the slots there are."""
    masked = Case(case.buckets, case.wants, case.stem_batch, case.rest_batch, case.told)
    out = masked.run()
    assert out["kept_counts"].tolist() == [effective(want, case.buckets[-1]) for want in case.wants]


@given(cases(), st.randoms(use_true_random=False))
def test_neighbours_do_not_matter(case: Case, random: object) -> None:
    out = case.run()
    order = list(range(len(case.wants)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = case.run(order)
    for name in out:
        np.testing.assert_array_equal(shuffled[name], out[name][order], err_msg=name)
    for i in order[:3]:
        alone = case.run([i])
        for name in out:
            np.testing.assert_array_equal(alone[name][0], out[name][i], err_msg=name)


@given(cases())
def test_runs_are_as_few_as_the_groups_allow(case: Case) -> None:
    case.run()
    visits = [case.visits(want) for want in case.wants]
    runs: dict[int, list[int]] = {}
    for bucket, images in case.trace.runs:
        runs.setdefault(bucket, []).append(images)
    for bucket in range(len(case.buckets)):
        there = sum(bucket in own for own in visits)
        size = there if case.rest_batch == ANY else case.rest_batch
        assert sum(runs.get(bucket, [])) == there
        assert len(runs.get(bucket, [])) == (math.ceil(there / size) if there else 0)
    assert [bucket for bucket, _ in case.trace.runs] == sorted(bucket for bucket, _ in case.trace.runs)
    images = len(case.wants)
    expected = 1 if case.stem_batch == ANY else math.ceil(images / case.stem_batch)
    assert len(case.stem.seen) == expected
    assert case.trace.stem_s >= 0 and case.trace.rest_s >= 0


@given(bucket_lists(), st.booleans())
def test_warmup_runs_every_graph(buckets: tuple[Bucket, ...], told: bool) -> None:
    case = Case(buckets, [[1] * len(buckets[0])], rest_batch=2, stem_batch=2, told=told)
    case.router.warmup(make_images(case.wants))
    assert case.stem.seen == [2]
    assert sum(len(rest.seen) for rest in ({id(r): r for r in case.rests}.values())) == len(buckets)


# ------------------------------------------------------------------------------------------------ single cases


def test_overflow_climbs_bucket_by_bucket() -> None:
    buckets = ((4, 1), (5, 2), (6, 3), (8, 8))
    case = Case(buckets, [[4, 4], [4, 1], [6, 2], [8, 0]])
    out = case.run()
    assert out["bucket"].tolist() == [3, 0, 2, 3]
    assert case.trace.runs == [(0, 2), (1, 1), (2, 2), (3, 2)]
    assert out["overflow"].tolist() == [0, 0, 0, 0]


def test_bucket_is_skipped_when_the_first_stage_says_so() -> None:
    case = Case(((2,), (4,), (8,)), [[3], [2], [5], [0]])
    assert case.run()["bucket"].tolist() == [1, 0, 2, 0]
    assert case.trace.runs == [(0, 2), (1, 1), (2, 1)]


@pytest.mark.parametrize("fill", [False, True])
def test_counts_above_the_slots_end_in_the_last_bucket_and_say_so(fill: bool) -> None:
    case = Case(((2, 2), (6, 3)), [[12, 1], [6, 5], [6, 3], [2, 2]], fill=fill)
    out = case.run()
    assert out["overflow"].tolist() == [1, 1, 0, 0]
    assert out["bucket"].tolist() == [1, 1, 1, 0]
    assert out["kept_counts"][0, 0] == 12


def test_capacity_below_the_slots_is_no_overflow() -> None:
    """Only the method's own slots count: an image that ran again is whole."""
    out = Case(((3, 1), (9, 9)), [[3, 3]]).run()
    assert (out["bucket"].tolist(), out["overflow"].tolist()) == ([1], [0])
    assert out["kept_counts"].tolist() == [[3, 3]]


def test_filled_slots_count_as_kept() -> None:
    case = Case(((4, 2), (8, 8)), [[3, 1], [5, 5]], fill=True)
    out = case.run()
    assert out["kept_counts"].tolist() == [[4, 2], [8, 8]]
    assert out["kept_indices_0"][0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert out["overflow"].tolist() == [0, 0]


def test_zero_and_all_tokens() -> None:
    case = Case(((1,), (PATCHES,)), [[0], [PATCHES], [0]])
    out = case.run()
    assert out["bucket"].tolist() == [0, 1, 0]
    assert out["kept_counts"].tolist() == [[0], [PATCHES], [0]]
    assert (out["kept_indices_0"][0] == -1).all()


@pytest.mark.parametrize("rest_batch", [ANY, 2, 4])
def test_padding_is_dropped(rest_batch: int) -> None:
    case = Case(((4,), (8,)), [[1], [8], [2], [3], [7]], stem_batch=4, rest_batch=rest_batch)
    out = case.run()
    assert out["logits"][:, 0].tolist() == [100, 101, 102, 103, 104]
    assert case.stem.seen == [4, 4]
    assert [rest.seen for rest in case.rests] == {ANY: [[3], [2]], 2: [[2, 2], [2]], 4: [[4], [4]]}[rest_batch]
    assert sum(images for _, images in case.trace.runs) == 5  # copies are not images


def test_stages_may_end_with_equal_capacities() -> None:
    """Nested does not mean different in every place."""
    out = Case(((4, 1), (4, 2), (4, 4)), [[4, 2], [4, 0], [4, 4], [1, 1]]).run()
    assert out["bucket"].tolist() == [1, 0, 2, 0]


def test_trace_is_added_to() -> None:
    case = Case(((2,), (8,)), [[1], [5]])
    case.run()
    first = (case.trace.stem_s, case.trace.rest_s)
    case.run()
    assert len(case.trace.runs) == 4
    assert case.trace.stem_s > first[0] > 0 and case.trace.rest_s > first[1] > 0


def test_failure_of_a_graph_is_not_hidden() -> None:
    case = Case(((2,), (8,)), [[1], [5]])

    def fail(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise RuntimeError("broken")

    case.rests[1].run = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        case.run()


# ------------------------------------------------------------------------------------------------ other runners


class Single(Fake):
    """A graph for one image whose shapes follow it."""

    def __init__(self, slots: Bucket, batch: int = 1) -> None:
        super().__init__(batch)
        self.slots = slots
        self.inputs = [tensor("images", batch, 1, 1, 3)]

    def run(self, feeds: Mapping[str, np.ndarray], keep: object = ()) -> dict[str, np.ndarray]:
        self.note(feeds)
        ((name, *want),) = feeds["images"][:, 0, 0].astype(int).tolist()
        counts = effective(want, self.slots)
        out = {"logits": np.array([[float(name)]]), "kept_counts": np.array([counts], np.int32)}
        out["overflow"] = np.array([any(c > k for c, k in zip(counts, self.slots, strict=True))], np.int32)
        for s, count in enumerate(counts):
            kept = np.arange(min(count, self.slots[s]), dtype=np.int32)
            out[f"kept_indices_{s}"] = kept[None]
        return out


@given(st.lists(st.tuples(st.integers(0, PATCHES), st.integers(0, PATCHES)), min_size=1, max_size=6))
def test_one_by_one_pads_to_the_slots(wants: list[tuple[int, int]]) -> None:
    slots = (8, 5)
    backend = Single(slots)
    out = OneByOne(backend, slots).run(make_images(wants))
    assert backend.seen == [1] * len(wants)
    for i, want in enumerate(wants):
        counts = effective(want, slots)
        assert out["logits"][i] == 100 + i
        assert out["kept_counts"][i].tolist() == counts
        assert out["overflow"][i] == any(c > k for c, k in zip(counts, slots, strict=True))
        for s, width in enumerate(slots):
            there = min(counts[s], width)
            assert out[f"kept_indices_{s}"][i].tolist() == [*range(there), *[-1] * (width - there)]
            assert out[f"kept_indices_{s}"].dtype == np.int32


def test_one_by_one_warms_up_with_one_image() -> None:
    backend = Single((4, 4))
    OneByOne(backend, (4, 4)).warmup(make_images([[1, 1], [2, 2]]))
    assert backend.seen == [1]


@given(st.data())
@settings(max_examples=50)
def test_stack_keeps_the_order_and_pads_what_is_kept(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=11))  # kept_indices_10 is not kept_indices_1
    results = []
    for i in range(data.draw(st.integers(1, 4))):
        widths = [data.draw(st.integers(0, slot)) for slot in slots]
        kept = {f"kept_indices_{s}": np.full((1, w), i, np.int32) for s, w in enumerate(widths)}
        results.append({"logits": np.full((1, 2), i, np.float32), **kept})
    out = stack(results, slots)
    assert out["logits"].tolist() == [[i, i] for i in range(len(results))]
    for s, slot in enumerate(slots):
        for i, result in enumerate(results):
            width = result[f"kept_indices_{s}"].shape[1]
            assert out[f"kept_indices_{s}"][i].tolist() == [*[i] * width, *[-1] * (slot - width)]


def test_whole_tells_the_slots_only_where_they_are_given() -> None:
    class Echo(Fake):
        def run(self, feeds: Mapping[str, np.ndarray], keep: object = ()) -> dict[str, np.ndarray]:
            return dict(feeds)

    images = make_images([[1, 1]])
    assert set(Whole(Echo(ANY)).run(images)) == {"images"}
    told = Whole(Echo(ANY), [7, 3]).run(images)
    assert (told["slots"].tolist(), told["slots"].dtype) == ([7, 3], np.int64)


@pytest.mark.parametrize(("batch", "expected"), [(ANY, None), (1, 1), (4, 4)])
def test_batch_of_a_graph(batch: int, expected: int | None) -> None:
    assert batch_of(Stem(batch)) == expected
    assert batch_of(Rest(batch, (2,), fill=False)) == expected
