from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import click
import pytest

from edgeprune.bench.html import GraphAccuracy, ReportInput, facts
from edgeprune.bench.report import format_ratio
from edgeprune.bench.result import BenchResult, MachineResult
from edgeprune.bench.scenarios import ScenarioResult
from edgeprune.bench.stats import Ratio
from edgeprune.cli.app import cli
from edgeprune.cli.ui import Ui
from tests.helpers.bench import summary
from tests.helpers.reports import accuracies, full, trained


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.01, 1.2, "faster"),
        (0.8, 0.99, "slower"),
        (0.99, 1.2, "no difference shown"),
        (1.0, 1.2, "no difference shown"),
        (None, None, "no interval"),
    ],
)
def test_verdict_needs_an_interval_on_one_side(low: float | None, high: float | None, verdict: str) -> None:
    assert facts.verdict_of(Ratio(1.1, low, high, 0.95, 10)) == verdict


def test_summary_says_what_the_table_says() -> None:
    result = trained()
    found = facts.summarise_result(result, accuracies(result))
    dense, pruned = result.runners[:2]
    assert result.speedup is not None
    assert f"{found.headline} {found.interval}" == format_ratio(result.speedup)
    assert f"{pruned.median_wall_ms:.3f} ms against {dense.median_wall_ms:.3f} ms" in found.sentences[0]
    assert found.sentences[-1] == "Top-1 accuracy is 97.00 %, 97.60 % dense (500 images of digits)."


@pytest.mark.parametrize(
    ("pruned", "words"),
    [
        ([120.0] * 20, "is slower than the dense graph: 0.833"),
        ([90.0, 120.0] * 10, "shows no difference in speed"),
        ([50.0] * 20, "runs 2.000 [2.000, 2.000] times as fast as the dense graph, 95 % CI over 10 paired blocks"),
    ],
)
def test_summary_is_as_honest_when_it_is_slower(pruned: list[float], words: str) -> None:
    if "no difference" in words:
        pruned = [90.0, 90.0, 120.0, 120.0] * 5  # whole blocks of each
    result = summary({"dense": [100.0] * 20, "pruned": pruned})
    assert words in facts.summarise_result(result, None).sentences[0]


def test_summary_of_few_blocks_says_that_there_is_no_interval() -> None:
    result = summary({"dense": 100.0, "pruned": 50.0}, rounds=4)
    found = facts.summarise_result(result, None)
    assert (found.verdict, found.interval) == ("no interval", None)
    assert "no interval (needs 6 blocks, has 2)" in found.sentences[0]


def test_summary_of_a_dense_bundle_compares_nothing() -> None:
    found = facts.summarise_result(summary({"dense": 100.0}), None)
    assert found.headline is None
    assert "There is no dense graph and pruned graph to compare." in found.sentences[0]


def test_random_weights_have_no_accuracy_in_the_summary() -> None:
    result = summary({"dense": 100.0, "pruned": 50.0})
    found = facts.summarise_result(result, accuracies(result))
    assert not any("accuracy" in sentence for sentence in found.sentences)


def caveats(result: Any, **fields: Any) -> list[str]:
    return [c.name for c in facts.caveats_of(result, accuracies(result, **fields))]


def trained_steady() -> BenchResult:
    return summary({"dense": 100.0, "pruned": 50.0}, weights={"source": "checkpoint", "file": "a.pth"})


def test_caveats_name_what_speaks_against_the_numbers() -> None:
    assert caveats(trained()) == ["unstable"]  # the outlier
    assert caveats(trained_steady()) == []
    noisy = summary({"dense": 100.0, "pruned": 50.0}, machine=MachineResult(0, 0, 1.5, 0.0), quick=True)
    assert caveats(noisy, emulated="no GPU here") == ["unstable", "random weights", "emulated", "quick"]
    assert caveats(summary({"dense": 1.0, "pruned": 1.0}, rounds=4))[-1] == "no interval"


def test_wilson_interval_holds_the_share_and_narrows() -> None:
    low, high = facts.wilson(GraphAccuracy(0.976, None, 500))
    assert (low, high) == (pytest.approx(0.9585, abs=2e-4), pytest.approx(0.9862, abs=2e-4))
    assert facts.wilson(GraphAccuracy(1.0, None, 10))[1] == pytest.approx(1.0)
    assert facts.wilson(GraphAccuracy(0.0, None, 10))[0] == pytest.approx(0.0)


def test_accuracy_rows_have_n_and_interval() -> None:
    result = trained()
    rows = facts.accuracy_rows(result, accuracies(result))
    assert [row["graph"] for row in rows] == ["dense", "pruned"]
    assert rows[1]["top-1 (%) [95 % CI]"] == "97.00 [95.11, 98.17]"
    assert rows[1]["n (images)"] == "500"


def test_part_rows_have_a_column_per_graph() -> None:
    assert facts.part_rows(full(trained()))[0] == {
        "part": "attention",
        "dense (ms)": "30.000 (60.0 %)",
        "pruned (ms)": "30.000 (60.0 %)",
    }


def test_accuracies_are_matched_by_the_identity_of_the_bundle() -> None:
    one, other = trained(), trained(target="ort-cpu-int8")
    own = accuracies(other)
    report = ReportInput(results=[one, other], accuracies=[own])
    assert report.accuracies_of(one) is None
    assert report.accuracies_of(other) is own
    assert report.unmatched() == []


def test_accuracies_without_identity_belong_to_a_single_result_only() -> None:
    one, other = trained(), trained(target="ort-cpu-int8")
    old = accuracies(one, identity=None)
    assert ReportInput(results=[one], accuracies=[old]).accuracies_of(one) is old
    both = ReportInput(results=[one, other], accuracies=[old])
    assert both.accuracies_of(one) is None
    assert [c.name for c in facts.report_caveats(both)] == ["not matched"]


def test_mixed_machines_are_told() -> None:
    one = trained()
    other = replace(one, fingerprint={"cpu_model": "another"})
    assert facts.mixed_machines([one, one]) is None
    assert facts.mixed_machines([one, other]) == "cpu model: another / some"
    (caveat,) = facts.report_caveats(ReportInput(results=[one, other]))
    assert caveat.name == "several machines"
    assert ("processor", ["some", "another"], True) in facts.fingerprint_rows([one, other], ["A", "B"])


def test_names_are_letters_only_where_there_are_several() -> None:
    assert facts.names_of([trained()]) == [""]
    assert facts.names_of([trained()] * 2) == ["A", "B"]
    assert facts.names_of([trained()] * 30)[-1] == "30"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["--checkpoint a.safetensors", "--keep-rate 0.7", "--against dense,random"]),
        ({"weights": {"source": "random", "seed": 3}}, ["--random-weights --seed 3"]),
        ({"quick": True}, ["--quick"]),
        ({"batch": 8}, ["--batch 8"]),
        ({"method": {"name": "evit", "keep_rate": 0.5, "options": {"fuse": False}}}, ["--method-option fuse=false"]),
    ],
)
def test_reproduce_lines_are_understood_by_the_command_line(fields: dict[str, Any], expected: list[str]) -> None:
    check_commands(trained(**fields), expected)


def test_reproduce_lines_name_the_scenario_and_the_layers() -> None:
    scenario = ScenarioResult("fixed-fps", "fixed-fps:30", "p90", 1, 30.0)
    check_commands(replace(full(trained()), scenario=scenario), ["--scenario fixed-fps:30", "--layers"])


def check_commands(result: BenchResult, expected: list[str]) -> None:
    """Parse the lines by the real command line and look for words in them."""
    lines = facts.reproduce(result, overlays=True, accuracies=accuracies(result))
    told = " ".join(" ".join(lines).replace("\\\n", " ").split())
    assert all(words in told for words in expected)
    verbs = []
    for line in lines:
        words = shlex.split(line.replace("\\\n", " ").partition(" > ")[0])
        assert words[0] == "edgeprune"
        with cli.make_context("edgeprune", words[1:], obj=Ui()) as context:
            name, command, rest = cli.resolve_command(context, words[1:])
            assert isinstance(command, click.Command)
            command.make_context(name, rest, parent=context)
        verbs.append(name)
    assert verbs == ["export", "bench", "evaluate", "report"]


def test_stage_words_tell_the_schedule() -> None:
    assert facts.stage_words(trained()) == "block 3: 138 of 196 patch tokens"
    assert facts.stage_words(trained(method={"name": "dense", "keep_rate": 1.0})) is None
