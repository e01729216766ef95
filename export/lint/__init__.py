"""Rules that refuse a graph a target cannot run. One rule per file; all findings are reported together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import onnx

from edgeprune.errors import BuildError
from edgeprune.export.lint.facts import Facts
from edgeprune.export.plan import Plan
from edgeprune.export.targets.tensorrt_versions import LEAST, Family, family_of


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
        tensorrt: the version of TensorRT to judge for, where a rule asks.
    """

    model: onnx.ModelProto
    plan: Plan | None
    domains: tuple[str, ...]
    tensorrt: str = LEAST

    @cached_property
    def facts(self) -> Facts:
        """Types, shapes and connections of the graph."""
        return Facts(self.model)

    @cached_property
    def family(self) -> Family:
        """What is known of the version of TensorRT."""
        return family_of(self.tensorrt)

    def at(self, tensorrt: str) -> LintContext:
        """Return the same for another version of TensorRT."""
        other = replace(self, tensorrt=tensorrt)
        vars(other)["facts"] = self.facts
        return other


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
