"""The gate: is HEAD slower or worse than BASE, beyond noise? Pure functions of two sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from edgeprune.bench.gate_rules import TIMES, Rule, floor_of
from edgeprune.bench.gate_sides import Side, class_differences, side_of
from edgeprune.bench.gate_stats import Array, Evidence, weigh_apart, weigh_paired
from edgeprune.bench.result import BenchResult, RatioClock
from edgeprune.bench.stats import MIN_BLOCKS

SCHEMA = "edgeprune-compare/1"
ALPHA = 0.01
Status = Literal["ok", "regressed", "improved", "no-baseline", "unstable"]


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
        spread: share by which engine builds of one side differ, where several were measured.
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
    spread: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole gate.

    Attributes:
        measured: "head to head" in this process, or "stored" samples.
        clock: the times are of.
        outcomes: one per rule and graph.
        warnings: for people.
        builds: of engines per side and run; None where there are no engines, or nobody knows.
    """

    base: str
    head: str
    measured: Literal["head to head", "stored"]
    clock: RatioClock | None
    alpha: float
    outcomes: list[Outcome]
    warnings: list[str] = field(default_factory=list)
    builds: int | None = None

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
        spreads = [s for s in (all_base.spread(mine, rule.stat), all_head.spread(theirs, rule.stat)) if s is not None]
        spread = max(spreads, default=None)
        status, why_so = decide(evidence, limit, self.alpha, again, spread or 0.0)
        shown = (_shown(old, unit), _shown(new, unit))
        return Outcome(rule.stat, theirs, status, *shown, unit, limit, evidence, tuple(again), why_so, spread)

    def _weigh(self, base: Array, head: Array) -> Evidence:
        return weigh_paired(base, head) if self.paired else weigh_apart(base, head)


def decide(
    evidence: Evidence, limit: float, alpha: float, reruns: Sequence[float] = (), spread: float = 0.0
) -> tuple[Status, str | None]:
    """Return the status of one comparison and, unless it speaks for itself, the reason.

    Regressed: the ratio of all blocks is above the limit, the rank test agrees, every rerun lies above half of the
    limit by itself, and the ratio is above what builds of one side differ by.

    Args:
        evidence: of all blocks.
        limit: smallest change that counts.
        alpha: largest p-value.
        reruns: ratio of each.
        spread: share by which engine builds of one side differ.
    """
    if evidence.blocks < MIN_BLOCKS:
        return "unstable", f"{evidence.blocks} blocks, at least {MIN_BLOCKS} are needed"
    if evidence.ratio > 1 + limit:
        if evidence.worse >= alpha:
            return "unstable", f"above the limit, but the rank test does not agree (p {evidence.worse:.2g})"
        if any(ratio <= 1 + limit / 2 for ratio in reruns):
            return "unstable", "the confirmation rerun does not agree"
        if evidence.ratio <= 1 + spread:
            return "unstable", f"above the limit, but {_builds_differ(spread)}"
        return "regressed", None
    if evidence.ratio < 1 / (1 + limit):
        if evidence.better >= alpha:
            return "unstable", f"below the limit, but the rank test does not agree (p {evidence.better:.2g})"
        if evidence.ratio >= 1 / (1 + spread):
            return "unstable", f"below the limit, but {_builds_differ(spread)}"
        return "improved", None
    return "ok", None


def _builds_differ(spread: float) -> str:
    return f"builds of one side differ by {100 * spread:.2g} % among themselves; more --builds tell more"


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
