from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeprune.bench.adaptive import AdaptiveResult, Run, RunGroup, RunSetting, mean_macs, summarise_runs
from edgeprune.bench.report import adaptive_table, report_notes, report_tables
from edgeprune.bench.result import Extras
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import AdaptiveInfo
from edgeprune.runtime.router import Trace
from tests.helpers.bench import summary

SLOTS = [16, 16]
CALIBRATION = {
    "data": "digits",
    "images": 100,
    "histograms": [],
    "curve": [],
    "stem_ms": 1.0,
    "dense_ms": 9.0,
    "expected_ms": 3.5,
    "overflow": 0.1,
    "batch": 1,
    "threads": 1,
    "cpu": "some",
}
BUCKETS = [
    {"capacities": [4, 4], "graph": "rest", "share": 0.75, "latency_ms": 2.0},
    {"capacities": [16, 16], "graph": "rest", "share": 0.25, "latency_ms": 4.0},
]


def info(form: str = "buckets", **fields: Any) -> AdaptiveInfo:
    given = {"buckets": BUCKETS, "calibration": CALIBRATION} if form == "buckets" else {}
    return AdaptiveInfo.model_validate({"form": form, **given, **fields})


def run(ms: float, *images: tuple[int, int], ran: Sequence[tuple[int, int]] | None = None, router_ms: float = 0) -> Run:
    """A run of (tokens kept at the first stage, bucket) per image; every image runs once unless `ran` says else."""
    kept, ended = np.array(images, np.int32).T
    trace = Trace(0.001, (ms - 1 - router_ms) / 1000, list(ran) if ran else [(int(b), 1) for b in ended])
    return Run(ms / 1000, trace, np.stack([kept, kept // 2], 1), ended)


def summarised(runs: Sequence[Run], form: str = "buckets", **setting: Any) -> AdaptiveResult:
    fields = {"runner": "pruned", "images": 4, "batch": 1, "threads": 1, "cpu": "some", **setting}
    return summarise_runs(info(form), SLOTS, runs, RunSetting(**fields))


FOUR = [run(3.0, (3, 0)), run(3.6, (4, 0)), run(3.3, (2, 0)), run(6.0, (9, 1))]


def test_buckets_have_a_row_each_beside_the_calibration() -> None:
    small, large = summarised(FOUR).groups
    assert (small.capacities, small.tokens, small.runs) == ([4, 4], (2, 4), 3)
    assert (small.share, small.calibration_share) == (0.75, 0.75)
    assert (small.median_ms, small.max_ms) == pytest.approx((3.3, 3.6))
    assert small.wall_ms == pytest.approx([3.0, 3.6, 3.3])
    assert (small.expected_ms, small.ratio) == pytest.approx((3.0, 1.1))
    assert (large.expected_ms, large.ratio) == pytest.approx((5.0, 1.2))


def test_tokens_and_times_are_means_over_all_runs() -> None:
    result = summarised(FOUR)
    assert (result.tokens, result.slots, result.runs) == ([4.5, 2.0], SLOTS, 4)
    assert result.mean_ms == pytest.approx(3.975)
    assert (result.expected_ms, result.expected_here_ms) == (3.5, 3.5)  # (3 * 3 + 5) / 4
    assert result.ratio == pytest.approx(3.975 / 3.5)


def test_percentiles_of_a_bucket_need_their_number_of_runs() -> None:
    (few, _), (many, _) = summarised(FOUR).groups, summarised([run(3.0, (3, 0))] * 64).groups
    assert (few.p90_ms.value, few.p90_ms.reason) == (None, "n/a (need 64, have 3)")
    assert many.p90_ms.value == pytest.approx(3.0)


def test_bucket_no_image_ended_in_is_empty() -> None:
    _, large = summarised([run(3.0, (3, 0))]).groups
    assert (large.runs, large.share, large.tokens, large.median_ms, large.ratio) == (0, 0.0, None, None, None)
    assert large.expected_ms == 5.0


def test_runs_of_several_buckets_are_mixed() -> None:
    small, large, mixed = summarised([run(5.0, (3, 0), (4, 0)), run(8.0, (4, 0), (9, 1))], batch=2).groups
    assert (small.runs, small.share) == (1, 0.75)
    assert (large.runs, large.share) == (0, 0.25)
    assert (mixed.name, mixed.runs, mixed.share, mixed.tokens) == ("mixed", 1, None, (4, 9))
    assert mixed.max_ms == pytest.approx(8.0)


def test_images_that_run_again_count_and_cost_twice() -> None:
    result = summarised([run(3.0, (3, 0)), run(9.0, (4, 1), ran=[(0, 1), (1, 1)])])
    assert result.ran_again == 0.5
    assert result.expected_here_ms == 5.0  # (1 + 2 + 1 + 2 + 4) / 2


def test_router_takes_what_is_neither_stem_nor_rest() -> None:
    result = summarised([run(4.0, (3, 0), router_ms=router) for router in (0.1, 0.2, 0.9)])
    assert result.router_us == pytest.approx(200)
    assert result.router_share == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"threads": 2}, "made with 1 thread(s), this run has 2"),
        ({"threads": 0}, "made with 1 thread(s), this run has all"),
        ({"cpu": "other"}, "made on some, this is other"),
        ({"batch": 2}, "made with batch 1, this run has 2"),
    ],
)
def test_calibration_of_another_kind_is_not_compared(setting: dict[str, Any], why: str) -> None:
    result = summarised(FOUR, **setting)
    assert result.differs == (why,)
    assert (result.ratio, result.expected_here_ms, result.groups[0].ratio) == (None, None, None)
    assert result.groups[0].expected_ms == 3.0


def test_buckets_without_calibration_are_measured_alone() -> None:
    bare = info(buckets=[{"capacities": b["capacities"], "graph": "rest"} for b in BUCKETS], calibration=None)
    result = summarise_runs(bare, SLOTS, FOUR, RunSetting("pruned", 4, 1, 1, "some"))
    assert (result.expected_ms, result.ratio, result.groups[0].expected_ms) == (None, None, None)
    assert result.groups[0].calibration_share is None
    assert result.ran_again == 0


def test_computed_form_has_quartiles_of_the_tokens_kept() -> None:
    result = summarised([run(float(n), (n, 0)) for n in range(2, 10)], "computed")
    assert [(g.name, g.tokens, g.share) for g in result.groups] == [
        ("1", (2, 3), 0.25),
        ("2", (4, 5), 0.25),
        ("3", (6, 7), 0.25),
        ("4", (8, 9), 0.25),
    ]
    assert (result.ran_again, result.router_us, result.expected_ms) == (None, None, None)


def test_equal_counts_leave_quartiles_out() -> None:
    (only,) = summarised([run(2.0, (5, 0))] * 4, "computed").groups
    assert (only.tokens, only.share, only.runs) == ((5, 5), 1.0, 4)


def test_slots_take_the_same_time_for_every_image() -> None:
    result = summarised(FOUR, "slots")
    assert (result.groups, result.tokens) == ([], [4.5, 2.0])


def test_no_runs_are_refused() -> None:
    with pytest.raises(InputError) as error:
        summarised([])
    assert error.value.code == "bench-samples"


def test_mean_macs_weigh_every_image() -> None:
    assert mean_macs([run(1.0, (4, 0), (4, 0)), run(1.0, (10, 1))], lambda counts: 100.0 * counts[0]) == 600.0


def test_table_shows_buckets_beside_the_calibration() -> None:
    small, large = adaptive_table(summarised(FOUR))
    assert (small["bucket"], small["slots"], small["tokens kept"]) == ("1", "4 4", "2-4")
    assert (small["images (%)"], small["calibration (%)"], small["measured / expected"]) == ("75.0", "75.0", "1.10")
    assert (large["tokens kept"], large["runs"]) == ("9", "1")


def test_table_shows_dashes_where_nothing_ran() -> None:
    large = adaptive_table(summarised([run(3.0, (3, 0))]))[1]
    assert (large["tokens kept"], large["median (ms)"], large["p90 (ms)"]) == ("-", "-", "-")


def bench(adaptive: AdaptiveResult) -> Any:
    return summary({"dense": 9.0, "pruned": 3.0}, adaptive={"form": "buckets"}, extras=Extras(adaptive))


def test_report_has_a_second_table_with_the_same_headings_everywhere() -> None:
    result = bench(summarised([*FOUR, run(8.0, (4, 0), (9, 1))]))
    titles, tables = zip(*report_tables(result), strict=True)
    assert titles == (None, "pruned, by bucket")
    assert len({tuple(row) for row in tables[1]}) == 1


def test_notes_set_the_mean_beside_what_was_expected() -> None:
    notes = report_notes(bench(summarised(FOUR)))
    assert any("noise keeps other numbers of tokens" in note for note in notes)
    assert any("expects 3.500 ms of its 100 images of digits, and 3.500 ms of these" in note for note in notes)


def test_notes_say_why_the_calibration_is_not_compared() -> None:
    notes = report_notes(bench(summarised(FOUR, threads=2)))
    assert "not compared with the calibration: made with 1 thread(s), this run has 2" in notes
    assert not any("measured / expected" in note for note in notes)


def test_groups_are_plain_data() -> None:
    fields = bench(summarised(FOUR)).to_dict()["adaptive"]
    assert fields["groups"][0].keys() == RunGroup.__dataclass_fields__.keys()
