"""Inputs that describe an operation, and that the parser wants to know while it reads the graph."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, label
from edgeprune.export.targets.tensorrt_versions import first_that


def constant_inputs(context: LintContext) -> list[Finding]:
    """Refuse axes that are computed."""
    findings = []
    for node in context.facts.nodes:
        place = context.family.constant.get(node.op_type)
        if place is None or node.domain not in STANDARD_DOMAINS or len(node.input) <= place or not node.input[place]:
            continue
        if not context.facts.is_constant(node.input[place]):
            reason = f"the axes of {node.op_type} must be an initializer{_until(node.op_type)}"
            findings.append(Finding("constant-input", label(node), reason))
    return findings


def _until(operator: str) -> str:
    since = first_that(lambda family: operator not in family.constant)
    return "" if since is None else f" before TensorRT {since}"
