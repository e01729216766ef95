from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.bench.gate import Gate, Side, compare_results, decide, learn_floor
from edgeprune.bench.gate_output import to_github_action_benchmark, to_junit, to_markdown
from edgeprune.bench.gate_rules import FLOOR, parse_rule, parse_rules
from edgeprune.bench.gate_stats import Evidence, mann_whitney, signed_rank, weigh_paired
from edgeprune.bench.result import BenchResult
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import ParityInfo
from tests.helpers.bench import summary

NUMBERS = st.lists(st.integers(1, 30).map(float), min_size=2, max_size=40)


@given(NUMBERS, NUMBERS)
def test_mann_whitney_agrees_with_scipy(a: list[float], b: list[float]) -> None:
    found = pytest.importorskip("scipy.stats").mannwhitneyu(a, b, alternative="greater", method="asymptotic").pvalue
    ours = mann_whitney(np.array(a), np.array(b))
    assert ours == pytest.approx(1.0 if math.isnan(found) else found, abs=1e-9) or len({*a, *b}) == 1


@given(st.lists(st.integers(-20, 20).map(float), min_size=8, max_size=40).filter(any))
def test_signed_rank_agrees_with_scipy(d: list[float]) -> None:
    scipy = pytest.importorskip("scipy.stats")
    d = [x for x in d if x]
    found = scipy.wilcoxon(d, alternative="greater", method="approx", correction=True).pvalue
    excess = signed_rank(np.array(d))
    # scipy moves the statistic towards its mean from both sides, we only from above
    assert excess == pytest.approx(found, abs=0.02)
    assert (excess < 0.01) == (found < 0.01) or found == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("text", "stat", "limit", "seconds"),
    [
        ("median:5%", "median", 0.05, False),
        ("mean:0.002", "mean", 0.002, True),
        ("min:2ms", "min", 0.002, True),
        ("speedup:3%", "speedup", 0.03, False),
        ("top1:0.5%", "top1", 0.005, False),
        ("parity:0%", "parity", 0.0, False),
    ],
)
def test_rule_reads(text: str, stat: str, limit: float, seconds: bool) -> None:
    rule = parse_rule(text)
    assert (rule.stat, rule.limit, rule.seconds) == (stat, pytest.approx(limit), seconds)


@pytest.mark.parametrize(
    "text", ["median", "median:", "p99:5%", "median:-1%", "top1:2ms", "median:0%", "median:5%%", ""]
)
def test_rule_refuses(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rule(text)
    assert caught.value.code == "fail-on"
    assert caught.value.expected is not None


def test_a_stat_has_one_limit() -> None:
    with pytest.raises(InputError, match="second limit"):
        parse_rules(["median:5%", "median:2ms"])


def noisy(level: float, seed: int, blocks: int = 20) -> list[float]:
    return list(level * np.exp(0.01 * np.random.default_rng(seed).standard_normal(2 * blocks)))


def result(pruned: float, seed: int, dense: float = 20.0, **changes: Any) -> BenchResult:
    found = summary({"dense": noisy(dense, seed + 100, 20), "pruned": noisy(pruned, seed, 20)}, rounds=40)
    return replace(found, **changes)


def statuses(base: BenchResult, head: BenchResult, *rules: str, **options: Any) -> list[str]:
    found = compare_results(base, head, Gate(parse_rules(rules)), ("base.json", "head.json"), **options)
    return [outcome.status for outcome in found.outcomes]


@pytest.mark.parametrize(("head", "status"), [(10.0, "ok"), (11.0, "regressed"), (9.0, "improved"), (10.3, "ok")])
def test_stored_samples_are_judged(head: float, status: str) -> None:
    assert statuses(result(10, 1), result(head, 2), "median:5%") == [status]


def test_speedup_is_judged_apart_from_time() -> None:
    base, head = result(10, 1), result(11, 2, dense=22)
    assert statuses(base, head, "median:5%", "speedup:5%") == ["regressed", "ok"]
    assert statuses(base, result(10, 2, dense=18), "median:5%", "speedup:5%") == ["ok", "regressed"]


def test_seconds_are_a_limit_too() -> None:
    assert statuses(result(10, 1), result(10.6, 2), "median:0.4ms") == ["regressed"]
    assert statuses(result(10, 1), result(10.6, 2), "median:0.001") == ["ok"]


def test_floor_raises_the_limit() -> None:
    gate = Gate(parse_rules(["median:5%"]), floors={"median": 0.2})
    found = compare_results(result(10, 1), result(11, 2), gate, ("a", "b"))
    assert (found.status, found.outcomes[0].limit) == ("ok", 0.2)
    lower = Gate(parse_rules(["median:1%"]))
    assert compare_results(result(10, 1), result(10.2, 2), lower, ("a", "b")).outcomes[0].limit == FLOOR


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": {"cpu_model": "another"}},
        {"fingerprint": {"cpu_model": "some", "jetson": {"nvpmodel": "2 15W"}}},
        {"batch": 8},
        {"threads": 4},
        {"fingerprint": {"cpu_model": "some", "packages": {"tensorrt": "10.3.0"}}},
    ],
)
def test_other_machines_are_no_baseline(changes: dict[str, Any]) -> None:
    found = compare_results(result(10, 1), result(20, 2, **changes), Gate(parse_rules([])), ("a", "b"))
    assert {outcome.status for outcome in found.outcomes} == {"no-baseline"}
    assert all("other machine or setting" in (outcome.reason or "") for outcome in found.outcomes)
    assert found.failed() == []
    assert len(found.failed(require_baseline=True)) == 2


def test_few_blocks_decide_nothing() -> None:
    base, head = (summary({"pruned": [level] * 8}, rounds=8) for level in (10.0, 20.0))
    assert statuses(base, head, "median:5%") == ["unstable"]


def test_missing_dense_is_no_baseline() -> None:
    base, head = (summary({"pruned": noisy(10, seed)}, rounds=40) for seed in (1, 2))
    assert statuses(base, head, "median:5%", "speedup:5%") == ["ok", "no-baseline"]


def test_rank_test_must_agree() -> None:
    noise = Evidence(1.2, 0.9, 1.5, worse=0.2, better=0.8, blocks=20)
    assert decide(noise, 0.05, 0.01)[0] == "unstable"
    assert decide(replace(noise, worse=0.001), 0.05, 0.01)[0] == "regressed"


def test_rerun_must_agree() -> None:
    clear = Evidence(1.2, 1.1, 1.3, worse=1e-6, better=1.0, blocks=40)
    assert decide(clear, 0.05, 0.01, [1.18]) == ("regressed", None)
    status, reason = decide(clear, 0.05, 0.01, [1.0])
    assert (status, reason) == ("unstable", "the confirmation rerun does not agree")


def one(level: float, seed: int) -> Side:
    return Side("side", [{"pruned": np.array(noisy(level, seed, 20)).reshape(-1, 2, 1)}])


def test_only_what_looks_slower_is_measured_again() -> None:
    gate = Gate(parse_rules(["median:5%"]), paired=True)
    assert gate.suspects(one(10, 1), one(10.4, 2)) is True
    assert gate.suspects(one(10, 1), one(10.1, 2)) is False


def test_reruns_join_the_blocks() -> None:
    gate = Gate(parse_rules(["median:5%"]), paired=True)
    (outcome,) = gate.judge(one(10, 1), one(11, 2), [(one(10, 3), one(11, 4))])
    assert outcome.evidence is not None
    assert (outcome.status, outcome.evidence.blocks, len(outcome.reruns)) == ("regressed", 40, 1)


def test_accuracy_and_parity_are_shares() -> None:
    parity = ParityInfo(images=8, max_abs_error=0, max_rel_error=1e-6, top1_agreement=1.0, tolerance=1e-4)
    base, gate = Side("b", parity=parity, top1={"model": 0.9}), Gate(parse_rules(["top1:0.5%", "parity:0%"]))
    same = Side("h", parity=parity, top1={"model": 0.896})
    assert [o.status for o in gate.judge(base, same)] == ["ok", "ok"]
    worse = Side("h", parity=parity.model_copy(update={"max_rel_error": 0.1}), top1={"model": 0.89})
    assert [o.status for o in gate.judge(base, worse)] == ["regressed", "regressed"]
    assert [o.status for o in gate.judge(base, Side("h"))] == ["no-baseline", "no-baseline"]


def test_paired_blocks_cancel_what_both_sides_met() -> None:
    machine = np.exp(0.3 * np.random.default_rng(0).standard_normal(40))
    found = weigh_paired(10 * machine, 11 * machine)
    assert found.ratio == pytest.approx(1.1)
    assert found.worse < 1e-6


def test_floor_is_the_largest_change_between_equals() -> None:
    floors = learn_floor([{"median": r} for r in (1.0, 1.001, 0.999, 1.04)])
    assert floors == {"median": pytest.approx(0.04)}


@pytest.fixture
def regressed() -> Any:
    return compare_results(result(10, 1), result(11, 2), Gate(parse_rules([])), ("a|b.json", "head.json"))


def test_markdown_has_a_row_per_outcome(regressed: Any) -> None:
    text = to_markdown(regressed)
    assert text.startswith("### edgeprune compare: REGRESSED")
    assert sum(line.startswith("| pruned |") for line in text.splitlines()) == 2


def test_junit_counts_what_it_holds(regressed: Any) -> None:
    root = ElementTree.fromstring(to_junit(regressed).split("\n", 1)[1])
    assert (root.get("tests"), root.get("failures")) == ("2", str(len(root.findall(".//failure"))))
    assert root.get("failures") == "2"


def test_github_array_is_smaller_is_better(regressed: Any) -> None:
    entries = json.loads(to_github_action_benchmark(regressed))
    assert [set(entry) >= {"name", "unit", "value"} for entry in entries] == [True, True]
    better = compare_results(result(10, 1), result(9, 2), Gate(parse_rules([])), ("a", "b"))
    smaller = json.loads(to_github_action_benchmark(better))
    assert all(s["value"] < e["value"] for s, e in zip(smaller, entries, strict=True))


def test_simulation_reaches_its_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    simulation = pytest.importorskip("gate_simulation", exc_type=ImportError)
    monkeypatch.setattr("edgeprune.bench.gate_stats.RESAMPLES", 1)  # intervals decide nothing
    rows = simulation.simulate(
        simulation.recorded_noise(), changes=(0.0, 0.08), trials=1000, blocks=simulation.BLOCKS, paired=True, seed=1
    )
    assert rows[0]["regressed"]["estimate"] < 0.01
    assert rows[1]["regressed"]["estimate"] > 0.95
