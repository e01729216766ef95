"""K of TopK: engines want a constant, and not a large one."""

from __future__ import annotations

from onnx import numpy_helper

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.plan import Counts

MAX_K = 3840  # limit of TensorRT's TopK layer


def constant_k(context: LintContext) -> list[Finding]:
    """Refuse a TopK whose K is computed, or above 3840, unless the graph was asked for with computed token counts."""
    if context.plan is not None and context.plan.counts is not Counts.SLOTS:
        return []
    values = {t.name: t for t in context.model.graph.initializer}
    findings = []
    for node in context.model.graph.node:
        if node.op_type != "TopK":
            continue
        if node.input[1] not in values:
            findings.append(Finding("constant-k", node.name, "K is computed in the graph"))
        elif (k := int(numpy_helper.to_array(values[node.input[1]]).reshape(()))) > MAX_K:
            findings.append(Finding("constant-k", node.name, f"K is {k}, the limit is {MAX_K}"))
    return findings
