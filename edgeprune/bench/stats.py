"""Statistics of latency samples: pure functions of numbers, numpy only.

Nothing is clipped and nothing is guessed: a percentile or an interval that the samples cannot carry comes
back empty, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError

Values = Sequence[float] | NDArray[np.float64]

PERCENTILE_MIN_SAMPLES = {90: 64, 95: 130, 99: 662}  # MLPerf's early-stopping rule at 99 % confidence
MIN_BLOCKS = 6  # the range of n blocks covers the median with 1 - 2 * 0.5**n; 6 is the first n above 95 %
MAX_CV = 0.025
MAX_DRIFT = 0.03
MAX_CLOCK_RANGE = 0.03
MAX_OTHER_CORES = 0.25
MAX_STEAL = 0.02
OUTLIER_FACTOR = 3.0
RESAMPLES = 10_000


@dataclass(frozen=True)
class Percentile:
    """A percentile, or the reason why the samples do not carry it."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Ratio:
    """A paired ratio with its bootstrap interval.

    Attributes:
        estimate: median over the blocks of numerator / denominator.
        low, high: percentile bootstrap interval of that median; None with the reason in `note`.
        confidence: of the interval.
        blocks: pairs the ratio rests on.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    blocks: int
    note: str | None = None

    def scaled(self, factor: float) -> Ratio:
        """Return the ratio and its interval times a positive constant."""
        low, high = (None if x is None else x * factor for x in (self.low, self.high))
        return Ratio(self.estimate * factor, low, high, self.confidence, self.blocks, self.note)

    def complement(self) -> Ratio:
        """Return 1 - ratio with its interval."""
        low, high = (None if x is None else 1 - x for x in (self.high, self.low))
        return Ratio(1 - self.estimate, low, high, self.confidence, self.blocks, self.note)


def median(values: Values) -> float:
    """Return the median.

    Raises:
        InputError: `bench-samples` when there is no value.
    """
    return float(np.median(_array(values)))


def percentile(values: Values, q: int) -> Percentile:
    """Return the q-th percentile (linear interpolation), or the reason why n is too small for it.

    Args:
        values: samples in any unit.
        q: a key of `PERCENTILE_MIN_SAMPLES`.
    """
    need, have = PERCENTILE_MIN_SAMPLES[q], len(values)
    if have < need:
        return Percentile(None, f"n/a (need {need}, have {have})")
    return Percentile(float(np.percentile(_array(values), q)))


def coefficient_of_variation(values: Values) -> float:
    """Return the sample standard deviation divided by the mean; 0 for a single value."""
    array = _array(values)
    return float(array.std(ddof=1) / array.mean()) if len(array) > 1 else 0.0


def drift(values: Values) -> float:
    """Return the median of the second half over that of the first half, minus 1; 0 below four values."""
    array = _array(values)
    half = len(array) // 2
    return float(np.median(array[-half:]) / np.median(array[:half]) - 1) if len(array) >= 4 else 0.0


def count_outliers(values: Values) -> int:
    """Return how many values lie above three times the median."""
    array = _array(values)
    return int((array > OUTLIER_FACTOR * np.median(array)).sum())


def block_values(samples: Values, calls_per_visit: int) -> NDArray[np.float64]:
    """Return one value per ABBA block [blocks]: the mean over its two visits of the visit's median.

    The mean of the outward and the return visit cancels a linear drift of the machine.

    Args:
        samples: in the order they were taken; a visit is `calls_per_visit` samples, a block two visits.
        calls_per_visit: calls in a row of one runner.
    """
    array = _array(samples)
    return np.median(array.reshape(-1, 2, calls_per_visit), axis=2).mean(axis=1)


def paired_ratio(
    numerator: Values,
    denominator: Values,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """Return the median of the block-wise ratios and its percentile bootstrap interval.

    The two runners of a block met the same state of the machine, so what the machine did to both cancels.

    Args:
        numerator: one value per block.
        denominator: the same blocks in the same order.
        confidence: of the interval.
        resamples: bootstrap draws of whole blocks.
        seed: of the draws.

    Raises:
        InputError: `bench-samples` when the lengths differ or there is no block.
    """
    top, bottom = _array(numerator), _array(denominator)
    if len(top) != len(bottom):
        raise InputError(
            f"a paired ratio of {len(top)} and {len(bottom)} blocks",
            code="bench-samples",
            expected="the same number of blocks on both sides",
        )
    ratios = top / bottom
    estimate, n = float(np.median(ratios)), len(ratios)
    if n < MIN_BLOCKS:
        note = f"no interval (needs {MIN_BLOCKS} blocks, has {n})"
        return Ratio(estimate, None, None, confidence, n, note)
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(estimate, float(low), float(high), confidence, n)


def unstable_reasons(blocks: Values, *, what: str) -> list[str]:
    """Return why a runner's block values should not be trusted; empty when they are steady.

    Args:
        blocks: one value per block.
        what: what the values are, for the text.
    """
    reasons = []
    if (cv := coefficient_of_variation(blocks)) > MAX_CV:
        reasons.append(f"{what} varies by {cv:.1%} between blocks (limit {MAX_CV:.1%})")
    if abs(moved := drift(blocks)) > MAX_DRIFT:
        reasons.append(f"{what} drifted by {moved:+.1%} from the first to the second half (limit {MAX_DRIFT:.0%})")
    return reasons


def clock_reasons(mhz: Sequence[float]) -> list[str]:
    """Return why the processor's clock readings (MHz) speak against the run; empty when steady or unknown."""
    if len(mhz) < 2 or min(mhz) <= 0:
        return []
    spread = (max(mhz) - min(mhz)) / max(mhz)
    if spread <= MAX_CLOCK_RANGE:
        return []
    return [f"the clock ranged from {min(mhz):.0f} to {max(mhz):.0f} MHz (limit {MAX_CLOCK_RANGE:.0%})"]


def machine_reasons(other_cores: float | None, steal: float | None) -> list[str]:
    """Return why what else ran on the machine speaks against the run; empty when it was quiet or unknown.

    Args:
        other_cores: cores that work other than this process kept busy.
        steal: share of this machine's time that its host gave away.
    """
    reasons = []
    if other_cores is not None and other_cores > MAX_OTHER_CORES:
        reasons.append(f"other work kept {other_cores:.2f} cores busy (limit {MAX_OTHER_CORES:g})")
    if steal is not None and steal > MAX_STEAL:
        reasons.append(f"the host took {steal:.1%} of the machine's time (limit {MAX_STEAL:.0%})")
    return reasons


def _array(values: Values) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("no samples", code="bench-samples", expected="at least one measured run")
    return array
