"""Which static shapes the network behind the first adaptive stage is built for. Plain numpy, no torch, no onnx.

A bucket is a tuple of capacities, one per adaptive stage, non-increasing. Buckets are nested, and the last one is the
slots of the method, the most an image can keep. The stem tells what an image keeps at the first stage; the image runs
the first bucket that holds this, and the next one whenever a later stage turns out to keep more than its capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError

Bucket = tuple[int, ...]
Buckets = tuple[Bucket, ...]
Counts = NDArray[np.integer[Any]]

MAX_BUCKETS = 64
MARGINS = (1.0, 0.99, 0.95, 0.9, 1.05, 1.1, 1.2, math.inf)
TIE = 1e-12  # relative; sums of the same latencies in another order differ by less


@dataclass(frozen=True)
class Asked:
    """What a user wants: so many buckets, or buckets of these sizes; `count` is None for the latter."""

    count: int | None
    sizes: tuple[int, ...] = ()


def parse_buckets(text: str) -> Asked:
    """Return what --buckets says: "auto", "auto:4" or "48,96,144".

    Raises:
        InputError: `buckets` when it is none of these.
    """
    head, _, number = text.partition(":")
    try:
        if head == "auto":
            return Asked(int(number) if number else 4)
        return Asked(None, tuple(int(size) for size in text.split(",")))
    except ValueError:
        raise InputError(
            f"--buckets {text} cannot be read",
            code="buckets",
            expected="auto, auto:NUMBER, or numbers of patch tokens, ascending",
            hint="for example --buckets auto:4 or --buckets 48,96,144,196",
        ) from None


@dataclass(frozen=True)
class Expectation:
    """What a list of buckets costs on a set of images.

    Attributes:
        expected_ms: mean over the images: the stem and every run of the rest, wasted ones too.
        shares: share of the images that end in each bucket.
        overflow: share of the images that need more than one run of the rest.
        bucket_ms: one run of the rest in each bucket.
    """

    expected_ms: float
    shares: tuple[float, ...]
    overflow: float
    bucket_ms: tuple[float, ...]


@dataclass(frozen=True)
class HeldOut:
    """What a way of choosing buckets costs on images it has not seen; as in `Expectation`."""

    expected_ms: float
    overflow: float


class LatencyModel(Protocol):
    """Tells how long one run of the rest takes."""

    def latency(self, capacities: Bucket) -> float:
        """Return the milliseconds of one run with these capacities."""
        ...


@dataclass(frozen=True)
class FlatCurve:
    """A latency model from runs with one capacity at every stage.

    The segment between two adaptive stages takes its share of the blocks of f(its capacity). f is linear between the
    measured points, flat below them, where nothing shows that fewer tokens are faster, and goes on straight above.

    Attributes:
        tokens: capacities with a known f, ascending.
        ms: f there, non-decreasing.
        shares: share of the blocks that run with the tokens of each stage.
    """

    tokens: tuple[int, ...]
    ms: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def measured(cls, points: Sequence[tuple[int, float]], blocks: Sequence[int], slots: Bucket) -> FlatCurve:
        """Return the curve that gives back what was measured.

        Repeated points count as their mean. Points that fall with more tokens are pooled to their weighted mean (the
        least-squares monotone fit): a running maximum would hand one slow outlier on to every larger capacity.

        Args:
            points: (N, milliseconds of the rest with the capacities min(N, slots)), in any order.
            blocks: transformer blocks that run with the tokens of each stage.
            slots: capacities of the full bucket.

        Raises:
            InputError: `latency-curve` without points, for a point that is no measurement, or blocks that do not
                match the stages.
        """
        given = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        if not len(given) or not np.isfinite(given).all() or (given < 0).any():
            raise InputError(
                f"no latency curve can be made of the points {list(points)}",
                code="latency-curve",
                expected="at least one pair of tokens and milliseconds, none of them negative",
            )
        if len(blocks) != len(slots) or min(blocks) < 0 or not sum(blocks):
            raise InputError(
                f"blocks {list(blocks)} do not belong to {len(slots)} adaptive stages",
                code="latency-curve",
                expected="the number of blocks behind each adaptive stage, and at least one in all",
            )
        # Nothing grows above the slots of the first stage: such a point is one more run of the full bucket.
        tokens, place = np.unique(np.minimum(given[:, 0], slots[0]), return_inverse=True)
        repeats = np.bincount(place)
        ms = _non_decreasing(np.bincount(place, weights=given[:, 1]) / repeats, repeats)
        shares = np.asarray(blocks) / sum(blocks)
        # Between two points only the segments below their slots grew, so all of the difference is theirs.
        grown = np.diff(np.minimum.outer(tokens, np.asarray(slots)), axis=0) / np.diff(tokens)[:, None] @ shares
        rise = np.divide(np.diff(ms), grown, out=np.zeros(len(grown)), where=grown > 0)
        curve = np.cumsum(np.concatenate([ms[:1], rise]))
        return cls(tuple(tokens.astype(int).tolist()), tuple(curve.tolist()), tuple(shares.tolist()))

    def latency(self, capacities: Bucket) -> float:
        """Return the milliseconds of one run of the rest with these capacities."""
        wanted = np.asarray(capacities, dtype=np.float64)
        ms = np.interp(wanted, self.tokens, self.ms)
        if len(self.tokens) > 1:
            slope = (self.ms[-1] - self.ms[-2]) / (self.tokens[-1] - self.tokens[-2])
            ms = ms + slope * np.maximum(wanted - self.tokens[-1], 0)
        return float(np.dot(self.shares, ms))


def simulate(counts: Counts, buckets: Buckets, latency: LatencyModel, stem_ms: float = 0.0) -> Expectation:
    """Return what the buckets cost on these images.

    Args:
        counts: tokens that each image keeps at each stage [n, S]; those above the slots are taken as the slots.
        buckets: nested, the slots last.
        latency: of a run of the rest.
        stem_ms: what every image costs before it is routed.

    Raises:
        InputError: `calibration` when the counts are not such counts.
    """
    first, last = _route(buckets, _checked(counts, buckets[-1]))
    bucket_ms = [latency.latency(bucket) for bucket in buckets]
    until = np.concatenate([[0.0], np.cumsum(bucket_ms)])
    shares = np.bincount(last, minlength=len(buckets)) / len(last)
    return Expectation(
        expected_ms=float((until[last + 1] - until[first]).mean()) + stem_ms,
        shares=tuple(shares.tolist()),
        overflow=float((last > first).mean()),
        bucket_ms=tuple(bucket_ms),
    )


def choose_buckets(
    counts: Counts,
    slots: Bucket,
    number: int,
    latency: LatencyModel,
    *,
    multiple: int = 1,
    margins: Sequence[float] = MARGINS,
) -> Buckets:
    """Return the buckets with the least expected latency on these images; fewer when more do not help.

    First capacities are observed counts. Later ones are a quantile of what the images that fit the first one keep, or
    more than the most of it, by the same margin for all buckets; for each margin the choice is exact, runs that
    overflow included.

    Args:
        counts: tokens that each image keeps at each stage [n, S], non-increasing along a row.
        slots: capacities of the full bucket, at least 1 each, non-increasing.
        number: buckets at most, the full one included.
        latency: of a run of the rest.
        multiple: capacities are rounded up to it, up to the slots.
        margins: what to try for the later capacities; of equal ones the first wins. Up to 1 a quantile, above 1 so
            many times the most, infinite never overflows.

    Raises:
        InputError: `calibration` when the counts are not such counts, `buckets` when a number is out of range.
    """
    check_asked(Asked(number), slots)
    kept = _checked(counts, slots)
    firsts = np.unique(np.minimum(_round_up(kept[:, 0], multiple), slots[0]))
    options: list[tuple[float, Buckets]] = []
    for rows in _candidates(kept, firsts, slots, multiple, margins):
        options += [(cost, tuple(rows[j] for j in path)) for cost, path in _cheapest(kept, rows, number, latency)]
    limit = min(cost for cost, _ in options) * (1 + TIE)
    return min((buckets for cost, buckets in options if cost <= limit), key=len)


def check_asked(asked: Asked, slots: Bucket) -> None:
    """Raise InputError `buckets` when no such buckets can be built."""
    if asked.count is None:
        given_buckets(asked.sizes, slots)
    elif not 1 <= asked.count <= MAX_BUCKETS:
        raise InputError(
            f"{asked.count} buckets cannot be chosen",
            code="buckets",
            expected=f"a whole number of buckets, from 1 to {MAX_BUCKETS}",
            details={"number": asked.count},
        )


def given_buckets(
    first: Sequence[int],
    slots: Bucket,
    *,
    counts: Counts | None = None,
    multiple: int = 1,
    latency: LatencyModel | None = None,
    margins: Sequence[float] = MARGINS,
) -> Buckets:
    """Return the buckets with the first capacities a user asks for, and the full one behind them.

    Without both counts and latency no later stage is smaller than it has to be, and no run ever overflows.

    Args:
        first: capacities of the first stage, ascending.
        slots: capacities of the full bucket, at least 1 each, non-increasing.
        counts: tokens that each image keeps at each stage [n, S]; later capacities are then chosen for them.
        multiple: later capacities that are chosen are rounded up to it.
        latency: of a run of the rest.
        margins: as in `choose_buckets`.

    Raises:
        InputError: `buckets` when the first capacities are no such numbers, `calibration` for the counts.
    """
    whole = all(isinstance(c, (int, np.integer)) and not isinstance(c, bool) for c in first)
    if not (
        whole
        and 1 <= len(first) <= MAX_BUCKETS
        and first[0] >= 1
        and first[-1] <= slots[0]
        and all(a < b for a, b in pairwise(first))
    ):
        meant = sorted({c for c in first if 1 <= c <= slots[0]}) if whole else []
        raise InputError(
            f"no buckets can be built for the capacities {', '.join(map(str, first)) or '(none)'}",
            code="buckets",
            expected=f"1 to {MAX_BUCKETS} whole numbers, each larger than the one before, from 1 to {slots[0]}",
            hint=f"did you mean {', '.join(map(str, meant))}?" if 0 < len(meant) <= MAX_BUCKETS else None,
            details={"slots": slots[0]},
        )
    partial = [int(c) for c in first if c < slots[0]]
    if counts is None or latency is None:
        return (*(tuple(min(c, k) for k in slots) for c in partial), slots)
    if not partial:
        return (slots,)
    kept, model = _checked(counts, slots), latency
    options = _candidates(kept, np.asarray(partial), slots, multiple, margins)
    return min(options, key=lambda buckets: simulate(kept, buckets, model).expected_ms)


def cross_validated(
    counts: Counts, choose: Callable[[Counts], Buckets], latency: LatencyModel, stem_ms: float = 0.0
) -> HeldOut:
    """Return what to expect on new images: every image meets buckets that were chosen without it.

    Images at even places are judged by the buckets of those at odd places and the other way round. The two lists of
    buckets need not match, so there are no shares.

    Args:
        counts: tokens that each image keeps at each stage [n, S].
        choose: returns the buckets for some of the counts.
        latency: of a run of the rest.
        stem_ms: what every image costs before it is routed.

    Raises:
        InputError: `calibration` below two images.
    """
    if len(counts) < 2:
        raise InputError(
            f"{len(counts)} images cannot be split to cross-validate the buckets",
            code="calibration",
            expected="at least two images",
        )
    halves = counts[::2], counts[1::2]
    judged = [simulate(halves[1 - i], choose(halves[i]), latency, stem_ms) for i in range(2)]
    sizes = [len(halves[1]), len(halves[0])]
    return HeldOut(
        expected_ms=float(np.average([e.expected_ms for e in judged], weights=sizes)),
        overflow=float(np.average([e.overflow for e in judged], weights=sizes)),
    )


def histogram(counts: Counts) -> list[list[tuple[int, int]]]:
    """Return for each stage how many images keep how many tokens: (count, images), ascending.

    Args:
        counts: tokens that each image keeps at each stage [n, S].
    """
    stages = (np.unique(stage, return_counts=True) for stage in counts.T)
    return [list(zip(values.tolist(), images.tolist(), strict=True)) for values, images in stages]


def _checked(counts: Counts, slots: Bucket) -> NDArray[np.int64]:
    """Return the counts [n, S], at most the slots."""
    if counts.ndim != 2 or counts.shape[1] != len(slots) or not len(counts):
        raise InputError(
            f"counts of shape {list(counts.shape)} do not tell what images keep at {len(slots)} stages",
            code="calibration",
            expected=f"one row per image, at least one, of {len(slots)} counts each",
            hint="calibrate with at least one image",
        )
    if counts.min() < 0 or (np.diff(counts, axis=1) > 0).any():
        raise InputError(
            "the counts of an image are negative or grow from one stage to the next",
            code="calibration",
            expected="counts of 0 or more, of which a later stage keeps no more than an earlier one",
        )
    return np.minimum(counts.astype(np.int64), np.asarray(slots, dtype=np.int64))


def _route(rows: Buckets, kept: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return for each image the first of these nested buckets it runs and the one that holds it [n]."""
    limits = np.asarray(rows)
    # Nested: the first bucket that holds all stages is the last of those that hold one.
    holds = np.stack([np.searchsorted(limits[:, s], kept[:, s]) for s in range(kept.shape[1])])
    return holds[0], holds.max(axis=0)


def _round_up(tokens: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Return the least multiples that hold the tokens; never 0, which is no shape to build."""
    if multiple < 1:
        raise InputError(
            f"capacities cannot be multiples of {multiple}", code="buckets", expected="a whole number, at least 1"
        )
    return -(-np.maximum(tokens, 1) // multiple) * multiple


def _candidates(
    kept: NDArray[np.int64], firsts: NDArray[np.int64], slots: Bucket, multiple: int, margins: Sequence[float]
) -> Iterator[Buckets]:
    """Yield for each margin the nested buckets with these first capacities (ascending), then the full one."""
    # A first capacity below all images is sized for the nearest of them.
    within = [kept[kept[:, 0] <= max(c, kept[:, 0].min())] for c in firsts]
    shares, factors = np.minimum(margins, 1.0), np.clip(margins, 1.0, slots[0])
    wanted = np.stack([np.quantile(some, shares, axis=0, method="higher") for some in within], axis=1)
    wanted = np.ceil(np.maximum(wanted, 1) * factors[:, None, None]).astype(np.int64)
    sizes = np.minimum(_round_up(wanted, multiple), np.minimum.outer(firsts, np.asarray(slots)))
    sizes[..., 0] = firsts
    for nested in np.maximum.accumulate(sizes, axis=1).tolist():
        yield (*(tuple(row) for row in nested), slots)


def _cheapest(
    kept: NDArray[np.int64], rows: Buckets, number: int, latency: LatencyModel
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Yield for 1, 2, ... `number` buckets the mean ms of a run of the rest and which of the rows attain it.

    Bucket j behind bucket p is run by the images that bucket j is not too small for at the first stage and that p, and
    so all before it, does not hold. That depends on p and j alone, hence a shortest path.
    """
    size = len(rows)
    first, last = _route(rows, kept)
    fit = np.cumsum(np.bincount(first, minlength=size))
    held = np.concatenate([[0], np.cumsum(np.bincount(last, minlength=size))[:-1]])  # by no bucket, by row 0, ...
    ms = np.array([latency.latency(row) for row in rows])
    step = np.where(np.tri(size, dtype=bool).T, ms * (fit - held[:, None]) / len(kept), np.inf)
    cost = step[0]
    paths: list[tuple[int, ...]] = [(j,) for j in range(size)]
    yield float(cost[-1]), paths[-1]
    for _ in range(min(number, size) - 1):
        through = cost[:-1, None] + step[1:]
        before = through.argmin(axis=0)
        cost = through.min(axis=0)
        paths = [(*paths[p], j) for j, p in enumerate(before.tolist())]
        yield float(cost[-1]), paths[-1]


def _non_decreasing(values: NDArray[np.float64], weights: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the non-decreasing sequence nearest to the values in weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, int, int]] = []
    for mean, weight in zip(values.tolist(), weights.tolist(), strict=True):
        size = 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, size = weight + heavy, size + many
        pools.append((mean, weight, size))
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])
