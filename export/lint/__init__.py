"""Rules that refuse a graph a target cannot run. One rule per file; all findings are reported together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from edgeprune.errors import BuildError
from edgeprune.export.plan import Plan


@dataclass(frozen=True)
class Finding:
    """One refusal: the node it is about and the reason."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class LintContext:
    """What rules may read.

    Attributes:
        model: weights as references; shapes as the emitter declared them.
        plan: None for a traced graph.
        domains: operator domains the target runs.
    """

    model: onnx.ModelProto
    plan: Plan | None
    domains: tuple[str, ...]


Rule = Callable[[LintContext], list[Finding]]


def run_lint(context: LintContext, rules: tuple[Rule, ...], target: str) -> None:
    """Apply the rules.

    Raises:
        BuildError: `lint` with every finding.
    """
    findings = [finding for rule in rules for finding in rule(context)]
    if findings:
        lines = "".join(f"\n  {f.node}: {f.reason} [{f.rule}]" for f in findings[:20])
        raise BuildError(
            f"the graph breaks {len(findings)} rule(s) of target '{target}':{lines}",
            code="lint",
            hint="use another target, or report the model if it came from the emitter",
            details={"findings": [vars(f) for f in findings]},
        )
