"""Operators that become loops inside an engine."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label
from edgeprune.export.targets.tensorrt_versions import first_that


def loops(context: LintContext) -> list[Finding]:
    """Refuse what the parser imports as a loop: one kernel after the other, and no CUDA graph."""
    return [
        Finding("loop", label(node), _reason(node.op_type))
        for node in context.facts.nodes
        if node.op_type in context.family.loops
    ]


def _reason(operator: str) -> str:
    since = first_that(lambda family: operator not in family.loops)
    return f"{operator} is a loop before TensorRT {since}, and an engine with a loop fits no CUDA graph"
