from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.bench import stats
from edgeprune.errors import InputError

POSITIVE = st.floats(0.1, 1e4)


def simulated_blocks(rng: np.random.Generator, n: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Two runners that meet the same machine: shared noise of 10 %, 1 % of their own."""
    machine = rng.normal(100, 10, n)
    return machine * factor * rng.normal(1, 0.01, n), machine * rng.normal(1, 0.01, n)


@given(st.lists(POSITIVE, min_size=1, max_size=50))
def test_median_equals_numpy(values: list[float]) -> None:
    assert stats.median(values) == np.median(values)


def test_median_of_even_count_is_the_middle() -> None:
    assert stats.median([4.0, 1.0, 2.0, 100.0]) == 3.0


def test_median_refuses_no_samples() -> None:
    with pytest.raises(InputError) as error:
        stats.median([])
    assert error.value.code == "bench-samples"


@pytest.mark.parametrize(("q", "need"), [(90, 64), (95, 130), (99, 662)])
def test_percentile_needs_its_number_of_samples(q: int, need: int) -> None:
    values = list(range(1, need + 1))
    assert stats.percentile(values[:-1], q) == stats.Percentile(None, f"n/a (need {need}, have {need - 1})")
    assert stats.percentile(values, q).value == pytest.approx(1 + (need - 1) * q / 100)


def test_coefficient_of_variation_equals_hand_computed() -> None:
    assert stats.coefficient_of_variation([9.0, 10.0, 11.0]) == pytest.approx(0.1)


def test_coefficient_of_variation_is_zero_when_alone() -> None:
    assert stats.coefficient_of_variation([5.0]) == 0.0


def test_drift_compares_the_halves() -> None:
    assert stats.drift([1.0, 1.0, 9.0, 1.1, 1.1]) == pytest.approx(0.1)


def test_count_outliers_counts_above_three_medians() -> None:
    assert stats.count_outliers([1.0, 1.0, 1.0, 3.0, 3.01]) == 1


def test_block_values_equal_hand_computed() -> None:
    first, second = [1.0, 2.0, 9.0, 4.0, 4.0, 5.0], [10.0, 10.0, 10.0, 20.0, 20.0, 20.0]
    assert stats.block_values(first + second, 3).tolist() == [3.0, 15.0]


def test_block_values_cancel_linear_drift() -> None:
    # A B B A with a machine that slows down by one per call
    a, b = stats.block_values([10.0, 13.0], 1), stats.block_values([11.0, 12.0], 1)
    assert a.tolist() == b.tolist()


def test_paired_ratio_is_the_median_of_block_ratios() -> None:
    ratio = stats.paired_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert ratio.estimate == 3.0


def test_paired_ratio_gives_no_interval_when_blocks_are_few() -> None:
    ratio = stats.paired_ratio([1.0] * 5, [1.0] * 5)
    assert (ratio.low, ratio.high, ratio.note) == (None, None, "no interval (needs 6 blocks, has 5)")


def test_paired_ratio_repeats_with_its_seed() -> None:
    a, b = simulated_blocks(np.random.default_rng(0), 12)
    ratios = [stats.paired_ratio(a, b, resamples=30, seed=seed) for seed in (3, 3, 4)]
    assert ratios[0] == ratios[1]
    assert ratios[0] != ratios[2]


def test_paired_ratio_interval_equals_numpy_quantiles_of_medians() -> None:
    a, b = simulated_blocks(np.random.default_rng(1), 9)
    draws = np.random.default_rng(5).integers(0, 9, size=(1000, 9))
    expected = np.quantile(np.median((a / b)[draws], axis=1), [0.05, 0.95])
    ratio = stats.paired_ratio(a, b, confidence=0.9, resamples=1000, seed=5)
    assert [ratio.low, ratio.high] == pytest.approx(expected.tolist())


def test_paired_ratio_interval_covers_one_for_equal_runners() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        ratio = stats.paired_ratio(*simulated_blocks(rng, 20), resamples=500)
        assert ratio.low is not None
        assert ratio.high is not None
        covered += ratio.low <= 1 <= ratio.high
    assert covered >= 180  # 95 % asked for, 90 % demanded of 200 draws


@pytest.mark.parametrize("blocks", [6, 20])
def test_paired_ratio_interval_excludes_one_when_eight_percent_slower(blocks: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        ratio = stats.paired_ratio(*simulated_blocks(rng, blocks, 1.08), resamples=500)
        assert ratio.low is not None
        assert ratio.low > 1


def test_paired_ratio_refuses_blocks_that_do_not_pair() -> None:
    with pytest.raises(InputError) as error:
        stats.paired_ratio([1.0, 2.0], [1.0])
    assert error.value.code == "bench-samples"


def test_ratio_scaled_scales_the_interval() -> None:
    assert stats.Ratio(1.5, 1.2, 1.8, 0.95, 9).scaled(2) == stats.Ratio(3.0, 2.4, 3.6, 0.95, 9)


def test_ratio_complement_turns_the_interval_around() -> None:
    turned = stats.Ratio(0.75, 0.5, 0.875, 0.95, 9).complement()
    assert (turned.estimate, turned.low, turned.high) == (0.25, 0.125, 0.5)


def test_ratio_without_interval_stays_without_one() -> None:
    ratio = stats.Ratio(2.0, None, None, 0.95, 2, "why")
    assert ratio.scaled(2) == stats.Ratio(4.0, None, None, 0.95, 2, "why")
    assert ratio.complement() == stats.Ratio(-1.0, None, None, 0.95, 2, "why")


def test_unstable_reasons_are_empty_when_steady() -> None:
    assert stats.unstable_reasons([10.0, 10.1, 9.9, 10.0], what="wall time") == []


def test_unstable_reasons_name_the_spread() -> None:
    (reason,) = stats.unstable_reasons([10.0, 11.0, 10.0, 11.0], what="wall time of dense")
    assert reason == "wall time of dense varies by 5.5% between blocks (limit 2.5%)"


def test_unstable_reasons_name_the_drift() -> None:
    reasons = stats.unstable_reasons([10.0, 10.0, 10.4, 10.4], what="wall time")
    assert reasons == ["wall time drifted by +4.0% from the first to the second half (limit 3%)"]


@pytest.mark.parametrize(("mhz", "count"), [([], 0), ([2000.0], 0), ([2000.0, 1950.0], 0), ([2000.0, 1900.0], 1)])
def test_clock_reasons_depend_on_the_range(mhz: list[float], count: int) -> None:
    assert len(stats.clock_reasons(mhz)) == count


@pytest.mark.parametrize(
    ("other", "steal", "count"),
    [(None, None, 0), (0.2, 0.01, 0), (0.3, 0.0, 1), (0.0, 0.03, 1), (1.0, 0.5, 2)],
)
def test_machine_reasons_depend_on_other_work(other: float | None, steal: float | None, count: int) -> None:
    assert len(stats.machine_reasons(other, steal)) == count
