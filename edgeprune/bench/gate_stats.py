"""Rank tests and ratios of block values: pure functions, numpy only, so that a device needs no scipy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.bench import stats
from edgeprune.errors import InputError

Array = NDArray[np.float64]
RESAMPLES = 2_000


@dataclass(frozen=True)
class Evidence:
    """What the blocks of two sides say about head / base.

    Attributes:
        ratio: of the costs, above 1 when head is worse: the median of the paired ratios, or the ratio of the medians.
        low, high: 95 % bootstrap interval, None with too few blocks for one.
        worse, better: one-sided p-values of the rank test.
        blocks: of the smaller side.
    """

    ratio: float
    low: float | None
    high: float | None
    worse: float
    better: float
    blocks: int


def weigh_paired(base: Array, head: Array, *, seed: int = 0) -> Evidence:
    """Return the evidence of blocks in which both sides met the same state of the machine: Wilcoxon's signed ranks."""
    found = stats.paired_ratio(head, base, seed=seed, resamples=RESAMPLES)
    logs = np.log(head / base)
    return Evidence(found.estimate, found.low, found.high, signed_rank(logs), signed_rank(-logs), len(logs))


def weigh_apart(base: Array, head: Array, *, seed: int = 0) -> Evidence:
    """Return the evidence of blocks that were measured at different times: Mann and Whitney's U."""
    ratio = float(np.median(head) / np.median(base))
    low = high = None
    blocks = min(len(base), len(head))
    if blocks >= stats.MIN_BLOCKS:
        rng = np.random.default_rng(seed)
        top, bottom = (np.median(rng.choice(side, (RESAMPLES, len(side))), axis=1) for side in (head, base))
        low, high = map(float, np.quantile(top / bottom, [0.025, 0.975]))
    return Evidence(ratio, low, high, mann_whitney(head, base), mann_whitney(base, head), blocks)


def mann_whitney(greater: Array, less: Array) -> float:
    """Return the p-value against "`greater` is not greater": normal approximation with ties and continuity.

    Raises:
        InputError: `bench-samples` when a side is empty.
    """
    n, m = len(greater), len(less)
    if not n or not m:
        raise InputError("no blocks", code="bench-samples", expected="at least one block on both sides")
    ranks, ties = _ranks(np.concatenate([greater, less]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1))) if total > 1 else 0.0
    return _tail(u - n * m / 2, variance)


def signed_rank(differences: Array) -> float:
    """Return the p-value of Wilcoxon's test against "the differences are not above zero"; zeros are left out."""
    differences = differences[differences != 0]
    n = len(differences)
    ranks, ties = _ranks(np.abs(differences))
    w = ranks[differences > 0].sum()
    return _tail(w - n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24 - ties / 48)


def _ranks(values: Array) -> tuple[Array, float]:
    """Return the ranks from 1, equal values sharing their mean, and the sum of t^3 - t over groups of t equal ones."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group], float((counts.astype(float) ** 3 - counts).sum())


def _tail(excess: float, variance: float) -> float:
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((excess - 0.5) / math.sqrt(2 * variance))
