"""The gate: is HEAD slower or worse than BASE, beyond noise? Pure functions of two sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from edgeprune.bench.gate_rules import TIMES, Rule, floor_of
from edgeprune.bench.gate_stats import Array, Evidence, weigh_apart, weigh_paired
from edgeprune.bench.result import BenchResult, RatioClock
from edgeprune.bench.stats import MIN_BLOCKS
from edgeprune.runtime.manifest import ParityInfo

SCHEMA = "edgeprune-compare/1"
ALPHA = 0.01
Status = Literal["ok", "regressed", "improved", "no-baseline", "unstable"]
_REDUCE: dict[str, Callable[..., Any]] = {"median": np.median, "mean": np.mean, "min": np.min}
_CLASS_FIELDS = (
    *("cpu_model", "cpu_flags", "architecture", "logical_cores", "usable_cores", "threads_per_core", "governor"),
)
_BOARD_FIELDS = ("l4t", "nvpmodel", "jetson_clocks")


@dataclass(frozen=True)
class Side:
    """What is known of BASE or HEAD.

    Attributes:
        name: for people.
        segments: runner -> samples [blocks, 2, calls] in milliseconds, one mapping per stretch of measuring.
        unstable: why its times should not be trusted.
        parity: agreement of the graph with PyTorch, of a bundle.
        top1: graph -> share of images classified right, where it was evaluated.
    """

    name: str
    segments: list[dict[str, Array]] = field(default_factory=list)
    unstable: Sequence[str] = ()
    parity: ParityInfo | None = None
    top1: Mapping[str, float] = field(default_factory=dict)

    def runners(self) -> list[str]:
        """Return the names of the graphs the gate looks at: the pruned ones, or the dense one of a dense bundle."""
        names = list(self.segments[0]) if self.segments else []
        pruned = [name for name in names if name.startswith("pruned")]
        return pruned or [name for name in names if name == "dense"]

    def times(self, runner: str, stat: str) -> Array:
        """Return a value per block [blocks]: the mean over its two visits of the visit's median, mean or minimum."""
        reduce = _REDUCE[stat]
        return np.concatenate([reduce(segment[runner], axis=2).mean(axis=1) for segment in self.segments])

    def cost(self, runner: str, stat: str) -> Array | None:
        """Return what is to stay small [blocks]: times, or for speedup pruned / dense; None where not measured."""
        if not self.segments or runner not in self.segments[0]:
            return None
        if stat != "speedup":
            return self.times(runner, stat)
        if runner == "dense" or "dense" not in self.segments[0]:
            return None
        return self.times(runner, "median") / self.times("dense", "median")

    def joined(self, other: Side) -> Side:
        """Return a side with the blocks of both."""
        return replace(self, segments=[*self.segments, *other.segments])


@dataclass(frozen=True)
class Outcome:
    """What the gate says of one rule and one graph.

    Attributes:
        stat, runner: what was compared.
        status: of it.
        base, head: milliseconds, times faster, or shares, by `unit`; None where missing.
        unit: "ms", "x" or "share".
        limit: smallest change that counts as one: the rule's, or the floor where that is larger.
        evidence: of all blocks together; None where nothing is timed.
        reruns: ratio of each confirmation rerun.
        reason: why the status is not simply read off; None when it is.
    """

    stat: str
    runner: str
    status: Status
    base: float | None
    head: float | None
    unit: Literal["ms", "x", "share"]
    limit: float
    evidence: Evidence | None = None
    reruns: tuple[float, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole gate.

    Attributes:
        measured: "head to head" in this process, or "stored" samples.
        clock: the times are of.
        outcomes: one per rule and graph.
        warnings: for people.
    """

    base: str
    head: str
    measured: Literal["head to head", "stored"]
    clock: RatioClock | None
    alpha: float
    outcomes: list[Outcome]
    warnings: list[str] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """The worst: regressed, then no-baseline, unstable, improved, ok."""
        order: tuple[Status, ...] = ("regressed", "no-baseline", "unstable", "improved")
        return next((s for s in order if any(o.status == s for o in self.outcomes)), "ok")

    def failed(self, *, require_baseline: bool = False) -> list[Outcome]:
        """Return the outcomes the command fails for."""
        bad = {"regressed", "no-baseline"} if require_baseline else {"regressed"}
        return [outcome for outcome in self.outcomes if outcome.status in bad]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {"schema": SCHEMA, "status": self.status, **asdict(self)}


@dataclass(frozen=True)
class Gate:
    """What a regression is.

    Attributes:
        rules: to check.
        alpha: largest p-value of the rank test.
        floors: stat -> change that measuring the same thing twice has shown.
        paired: blocks of both sides were measured in turns.
    """

    rules: Sequence[Rule]
    alpha: float = ALPHA
    floors: Mapping[str, float] = field(default_factory=dict)
    paired: bool = False

    def judge(self, base: Side, head: Side, reruns: Sequence[tuple[Side, Side]] = ()) -> list[Outcome]:
        """Return an outcome per rule and graph.

        Args:
            base: side that is the measure.
            head: side in question.
            reruns: both sides measured again.
        """
        return [outcome for rule in self.rules for outcome in self._judge_rule(rule, base, head, reruns)]

    def suspects(self, base: Side, head: Side) -> bool:
        """Return whether a rerun could matter: some ratio lies above half of its limit."""
        found = [outcome for outcome in self.judge(base, head) if outcome.evidence is not None]
        return any(o.evidence.ratio > 1 + o.limit / 2 for o in found if o.evidence is not None)

    def _judge_rule(self, rule: Rule, base: Side, head: Side, reruns: Sequence[tuple[Side, Side]]) -> Iterator[Outcome]:
        if rule.stat == "parity":
            yield _judge_parity(rule, base, head)
        elif rule.stat == "top1":
            yield from _judge_top1(rule, base, head)
        else:
            for mine, theirs in _match(base, head):
                yield self._judge_cost(rule, base, head, mine, theirs, reruns)

    def _judge_cost(
        self,
        rule: Rule,
        base: Side,
        head: Side,
        mine: str,
        theirs: str,
        reruns: Sequence[tuple[Side, Side]],
    ) -> Outcome:
        all_base, all_head = base, head
        for again_base, again_head in reruns:
            all_base, all_head = all_base.joined(again_base), all_head.joined(again_head)
        old, new = all_base.cost(mine, rule.stat), all_head.cost(theirs, rule.stat)
        unit: Literal["ms", "x"] = "x" if rule.stat == "speedup" else "ms"
        if old is None or new is None:
            why = "no dense graph was measured" if rule.stat == "speedup" else f"{mine} was not measured"
            side = base if old is None else head
            one, two = (None if cost is None else _shown(cost, unit) for cost in (old, new))
            reason = f"{why} in {side.name}"
            return Outcome(rule.stat, theirs, "no-baseline", one, two, unit, rule.limit, reason=reason)
        limit = max(rule.share(float(np.median(old))), floor_of(rule, self.floors))
        evidence = self._weigh(old, new)
        again = []
        for again_base, again_head in reruns:
            third, fourth = again_base.cost(mine, rule.stat), again_head.cost(theirs, rule.stat)
            assert third is not None and fourth is not None  # reruns measure what the first run did
            again.append(self._weigh(third, fourth).ratio)
        status, why_so = decide(evidence, limit, self.alpha, again)
        return Outcome(
            rule.stat, theirs, status, _shown(old, unit), _shown(new, unit), unit, limit, evidence, tuple(again), why_so
        )

    def _weigh(self, base: Array, head: Array) -> Evidence:
        return weigh_paired(base, head) if self.paired else weigh_apart(base, head)


def decide(evidence: Evidence, limit: float, alpha: float, reruns: Sequence[float] = ()) -> tuple[Status, str | None]:
    """Return the status of one comparison and, unless it speaks for itself, the reason.

    Regressed: the ratio of all blocks is above the limit, the rank test agrees, and every rerun lies above half of
    the limit by itself.
    """
    if evidence.blocks < MIN_BLOCKS:
        return "unstable", f"{evidence.blocks} blocks, at least {MIN_BLOCKS} are needed"
    if evidence.ratio > 1 + limit:
        if evidence.worse >= alpha:
            return "unstable", f"above the limit, but the rank test does not agree (p {evidence.worse:.2g})"
        if any(ratio <= 1 + limit / 2 for ratio in reruns):
            return "unstable", "the confirmation rerun does not agree"
        return "regressed", None
    if evidence.ratio < 1 / (1 + limit):
        if evidence.better >= alpha:
            return "unstable", f"below the limit, but the rank test does not agree (p {evidence.better:.2g})"
        return "improved", None
    return "ok", None


def side_of(result: BenchResult, name: str) -> Side:
    """Return the side of a stored result, times on the clock its ratios are made of."""
    shape = (-1, 2, result.calls_per_visit)
    segment = {}
    for runner in result.runners:
        times = np.asarray(runner.cpu_ms if result.clock == "cpu" else runner.wall_ms, dtype=np.float64)
        whole = len(times) // (2 * result.calls_per_visit) * 2 * result.calls_per_visit
        if whole:
            segment[runner.name] = times[:whole].reshape(shape)
    return Side(name, [segment], tuple(result.unstable))


def class_differences(base: BenchResult, head: BenchResult) -> list[str]:
    """Return why the samples of two results cannot be compared; empty when they are of one fingerprint class."""
    one, two = fingerprint_class(base), fingerprint_class(head)
    return [f"{key}: {one.get(key)} against {two.get(key)}" for key in one if one.get(key) != two.get(key)]


def fingerprint_class(result: BenchResult) -> dict[str, Any]:
    """Return what two results must share: machine, power mode, TensorRT's minor version, and how they were measured."""
    found = result.fingerprint
    gpu, packages, board = (found.get(name) or {} for name in ("gpu", "packages", "jetson"))
    tensorrt = packages.get("tensorrt")
    scenario = None if result.scenario is None else result.scenario.text
    return {
        **{name: found.get(name) for name in _CLASS_FIELDS},
        **{name: board.get(name) for name in _BOARD_FIELDS},
        "gpu": gpu.get("name"),
        "TensorRT": None if tensorrt is None else ".".join(str(tensorrt).split(".")[:2]),
        "model": result.bundle.get("model"),
        "target": result.bundle.get("target"),
        "batch": result.batch,
        "threads": result.threads,
        "clock": result.clock,
        "data": result.data,
        "images": result.images,
        "runs per sample": result.runs_per_sample,
        "scenario": scenario or "single-stream",
    }


def compare_results(
    base: BenchResult,
    head: BenchResult,
    gate: Gate,
    names: tuple[str, str],
    *,
    base_top1: Mapping[str, float] | None = None,
    head_top1: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare stored samples.

    Args:
        base: result of `edgeprune bench`.
        head: another one.
        gate: what a regression is.
        names: of both, for people.
        base_top1: graph -> share of images classified right.
        head_top1: the same of head.
    """
    differences = class_differences(base, head)
    old = replace(side_of(base, names[0]), top1=base_top1 or {})
    new = replace(side_of(head, names[1]), top1=head_top1 or {})
    outcomes = gate.judge(old, new)
    if differences:
        reason = f"other machine or setting: {'; '.join(differences)}"
        outcomes = [o if o.unit == "share" else _no_baseline(o, reason) for o in outcomes]
    warnings = [
        f"{side.name} was marked unstable: {side.unstable[0]}"
        + (f" (and {len(side.unstable) - 1} more)" if len(side.unstable) > 1 else "")
        for side in (old, new)
        if side.unstable
    ]
    return Comparison(*names, "stored", base.clock, gate.alpha, outcomes, warnings)


def _no_baseline(outcome: Outcome, reason: str) -> Outcome:
    return Outcome(
        outcome.stat, outcome.runner, "no-baseline", outcome.base, outcome.head, outcome.unit, outcome.limit,
        reason=reason,
    )  # fmt: skip


def _match(base: Side, head: Side) -> list[tuple[str, str]]:
    """Return pairs of graphs by name; a single pruned graph on each side is a pair whatever its rate."""
    mine, theirs = base.runners(), head.runners()
    if len(mine) == len(theirs) == 1:
        return [(mine[0], theirs[0])]
    return [(name, name) for name in [*theirs, *(n for n in mine if n not in theirs)]]


def _judge_parity(rule: Rule, base: Side, head: Side) -> Outcome:
    """Regressed: top-1 agreement with PyTorch fell by more than the limit, or the error is above its tolerance."""
    old, new = (None if side.parity is None else side.parity.top1_agreement for side in (base, head))
    if head.parity is not None and head.parity.max_rel_error > head.parity.tolerance:
        reason = f"relative error {head.parity.max_rel_error:.1e}, tolerance {head.parity.tolerance:g}"
        return Outcome("parity", "model", "regressed", old, new, "share", rule.limit, reason=reason)
    return _judge_share(rule, "model", old, new, "no parity is recorded; it stands in bundles that were verified")


def _judge_top1(rule: Rule, base: Side, head: Side) -> Iterator[Outcome]:
    for graph in dict.fromkeys([*head.top1, *base.top1]) or ["model"]:
        yield _judge_share(rule, graph, base.top1.get(graph), head.top1.get(graph), "give --accuracy BASE HEAD")


def _judge_share(rule: Rule, graph: str, base: float | None, head: float | None, missing: str) -> Outcome:
    if base is None or head is None:
        return Outcome(rule.stat, graph, "no-baseline", base, head, "share", rule.limit, reason=missing)
    status: Status = "regressed" if base - head > rule.limit + 1e-12 else "improved" if head > base else "ok"
    return Outcome(rule.stat, graph, status, base, head, "share", rule.limit)


def _shown(cost: Array, unit: str) -> float:
    middle = float(np.median(cost))
    return 1 / middle if unit == "x" else middle


def learn_floor(comparisons: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the floor of each stat: the largest change between equals, or three times their robust deviation.

    Args:
        comparisons: of one thing with itself: stat -> ratio.
    """
    floors = {}
    for stat in (*TIMES, "speedup"):
        found = np.abs(np.log([ratios[stat] for ratios in comparisons if stat in ratios]))
        if len(found):
            spread = 3 * 1.4826 * float(np.median(found))
            floors[stat] = float(np.expm1(max(float(found.max()), spread)))
    return floors
