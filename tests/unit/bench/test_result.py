from __future__ import annotations

import json
from typing import Any

import pytest

from edgeprune.bench.report import report_notes, report_table
from edgeprune.bench.result import Extras, MachineResult
from tests.helpers.bench import MANIFEST, summary

FULL: dict[str, float | list[float]] = {"dense": 100.0, "pruned": 62.5, "random": 62.0, "naive": 110.0}


def test_summary_speedup_is_dense_over_pruned() -> None:
    speedup = summary(FULL).speedup
    assert speedup is not None
    assert (speedup.estimate, speedup.low, speedup.high, speedup.blocks) == (1.6, 1.6, 1.6, 10)


def test_summary_sets_macs_beside_the_measured_speedup() -> None:
    result = summary(FULL)
    assert result.macs is not None
    assert (result.macs.ratio, result.macs.ideal_speedup) == (1.5, 1.6)
    assert result.efficiency_nominal is not None
    assert result.efficiency_own is not None
    assert result.efficiency_nominal.estimate == pytest.approx(1.6 / 1.5)
    assert result.efficiency_own.estimate == pytest.approx(1.0)


def test_summary_selection_overhead_is_what_random_saves() -> None:
    overhead = summary(FULL).selection_overhead
    assert overhead is not None
    assert overhead.estimate == pytest.approx((62.5 - 62.0) / 62.5)


def test_summary_compares_with_the_naive_export() -> None:
    result = summary(FULL)
    assert result.naive_over_dense is not None
    assert result.naive_over_pruned is not None
    assert result.naive_over_dense.estimate == pytest.approx(1.1)
    assert result.naive_over_pruned.estimate == pytest.approx(110 / 62.5)


def test_summary_pairs_blocks_so_that_shared_slowness_cancels() -> None:
    slow = [1.0 if i < 10 else 2.0 for i in range(20)]
    result = summary({"dense": [100 * f for f in slow], "pruned": [50 * f for f in slow]})
    assert result.speedup is not None
    assert (result.speedup.low, result.speedup.high) == (2.0, 2.0)
    assert any("drifted" in reason for reason in result.unstable)


def test_summary_uses_the_clock_it_is_told() -> None:
    times: dict[str, float | list[float]] = {"dense": 100.0, "pruned": 50.0}
    result = summary(times, clock="wall", cpu_factor=0.5)
    assert result.runners[0].median_wall_ms == 100
    assert result.runners[0].median_cpu_ms == 50
    assert result.clock == "wall"


def test_summary_refuses_percentiles_of_few_samples() -> None:
    p90 = summary(FULL).runners[0].percentiles["p90"]
    assert (p90.value, p90.reason) == (None, "n/a (need 64, have 20)")
    assert summary(FULL, rounds=64).runners[0].percentiles["p90"].value == 100.0


def test_summary_keeps_every_sample() -> None:
    times = [100.0] * 19 + [5000.0]
    runner = summary({"dense": times}).runners[0]
    assert runner.wall_ms == times
    assert (runner.max_wall_ms, runner.outliers) == (5000.0, 1)


def test_summary_counts_images_of_a_batch() -> None:
    assert summary(FULL, batch=8).runners[0].images_per_s == pytest.approx(80)


def test_summary_marks_random_weights() -> None:
    assert summary(FULL).random_weights is True
    assert "random weights: the speed is real, accuracy is not measured" in report_notes(summary(FULL))
    trained = summary(FULL, weights={"source": "checkpoint", "file": "a.pth"})
    assert trained.random_weights is False
    assert not any("random weights" in note for note in report_notes(trained))


def test_summary_is_steady_when_nothing_moves() -> None:
    assert summary(FULL).unstable == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"warm": False}, "warm-up"),
        ({"machine": MachineResult(0.1, 0.2, 0.9, 0.0)}, "other work"),
        ({"machine": MachineResult(0.1, 0.2, 0.0, 0.0, [2000.0, 1500.0])}, "MHz"),
    ],
)
def test_summary_marks_unstable_runs(change: dict[str, Any], text: str) -> None:
    result = summary(FULL, **change)
    assert any(text in reason for reason in result.unstable)
    assert any(note.startswith("unstable: ") for note in report_notes(result))


def test_summary_of_a_dense_bundle_has_no_ratio() -> None:
    result = summary({"dense": 100.0})
    assert (result.speedup, result.macs, result.efficiency_nominal, result.selection_overhead) == (None,) * 4


def test_result_is_json_ready() -> None:
    fields = summary(FULL).to_dict()
    assert fields["schema"] == "edgeprune-bench/1"
    assert json.loads(json.dumps(fields))["runners"][0]["name"] == "dense"


def test_table_has_dense_first_and_the_same_headings_everywhere() -> None:
    rows = report_table(summary(FULL, batch=8, rounds=64))
    assert [row["graph"] for row in rows] == ["dense", "pruned", "random", "naive"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["median (ms, batch 8)"] == "100.000"


def test_table_shows_n_and_interval() -> None:
    row = report_table(summary(FULL))[1]
    assert row["n"] == "20"
    assert row["measured (x) [95 % CI]"] == "1.600 [1.600, 1.600]"
    assert (row["MACs ratio (x)"], row["ideal (x)"]) == ("1.50", "1.60")


def test_table_shows_no_interval_when_there_is_none() -> None:
    assert report_table(summary(FULL, rounds=4))[1]["measured (x) [95 % CI]"] == "1.600"


def test_notes_mark_quick_runs() -> None:
    assert any(note.startswith("quick run") for note in report_notes(summary(FULL, quick=True)))
    assert not any(note.startswith("quick run") for note in report_notes(summary(FULL)))


def test_notes_stay_short_when_much_is_unstable() -> None:
    wild = [100.0 if i % 4 < 2 else 200.0 for i in range(20)]
    result = summary(dict.fromkeys(FULL, wild))
    assert len(result.unstable) == 16  # spread and drift, both clocks, four graphs
    notes = [note for note in report_notes(result) if note.startswith("unstable: ")]
    assert notes[-1] == "unstable: 12 more reasons in the JSON result"
    assert len(notes) == 5


STAGE = MANIFEST["method"]["stages"][0]
DENSITIES = [
    {"keep_rate": 1.0, "graph": "dense", "stages": [], "macs": MANIFEST["macs"]},
    {"keep_rate": 0.7, "graph": "model", "stages": [STAGE], "macs": MANIFEST["macs"]},
    {
        "keep_rate": 0.5,
        "graph": "model",
        "stages": [{**STAGE, "kept": 98}],
        "macs": {"dense": 4_500, "pruned": 2_250, "dense_executed": 4_400, "pruned_executed": 2_200},
    },
]
SEVERAL: dict[str, float | list[float]] = {
    "dense": 100.0,
    "pruned at 0.7": 62.5,
    "pruned at 0.5": 50.0,
    "random": 60.0,
    "naive": 110.0,
}


def test_densities_have_ratio_and_efficiency_of_their_own_macs() -> None:
    result = summary(SEVERAL, densities=DENSITIES, extras=Extras(switch_us=0.25))
    dense, first, second = result.densities
    assert (dense.runner, dense.macs, dense.speedup) == ("dense", None, None)
    assert first.macs is not None
    assert second.macs is not None
    assert (first.macs.ratio, second.macs.ratio) == (1.5, 2.0)
    assert second.speedup is not None
    assert second.speedup.estimate == 2.0
    assert second.efficiency_own is not None
    assert second.efficiency_own.estimate == pytest.approx(1.0)
    assert result.switch_us == 0.25


def test_result_of_several_densities_describes_the_first_that_prunes() -> None:
    result = summary(SEVERAL, densities=DENSITIES)
    assert result.speedup == result.densities[1].speedup
    assert result.selection_overhead is not None
    assert result.selection_overhead.estimate == pytest.approx(0.04)
    notes = report_notes(result)
    assert "density 1 is the dense graph" in notes
    assert any("of the pruned run at 0.7" in note for note in notes)
    assert [note.split(":")[0] for note in notes if note.startswith("efficiency")] == [
        "efficiency pruned at 0.7",
        "efficiency pruned at 0.5",
    ]


def test_table_of_several_densities_has_the_macs_of_each() -> None:
    rows = {row["graph"]: row["MACs ratio (x)"] for row in report_table(summary(SEVERAL, densities=DENSITIES))}
    assert rows == {"dense": "1.00", "pruned at 0.7": "1.50", "pruned at 0.5": "2.00", "random": "", "naive": ""}


def test_macs_of_images_that_decide_are_their_mean() -> None:
    times: dict[str, float | list[float]] = {"dense": 100.0, "pruned": 50.0}
    result = summary(times, adaptive={"form": "computed"}, extras=Extras(mean_macs={"pruned": 1_500.0}))
    assert result.macs is not None
    assert (result.macs.ratio, result.macs.ideal_speedup) == (3.0, None)
    assert result.efficiency_nominal is not None
    assert result.efficiency_nominal.estimate == pytest.approx(2 / 3)
    assert result.efficiency_own is None
    assert report_table(result)[1]["ideal (x)"] == ""


def test_macs_of_images_that_decide_are_unknown_without_an_architecture() -> None:
    assert summary({"dense": 100.0, "pruned": 50.0}, adaptive={"form": "buckets"}).macs is None
    assert summary({"dense": 100.0, "pruned": 50.0}, adaptive={"form": "slots"}).macs is not None
