"""Shapes that depend on data freeze no engine and disable CUDA graphs."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext

DATA_DEPENDENT = frozenset({"NonZero", "Loop", "If", "Scan", "Unique", "Compress", "NonMaxSuppression", "SequenceAt"})


def data_dependent_ops(context: LintContext) -> list[Finding]:
    """Refuse operators whose output shape or control flow depends on values."""
    functions = [node for function in context.model.functions for node in function.node]
    return [
        Finding("data-dependent", node.name or node.output[0], f"{node.op_type} makes shapes depend on the image")
        for node in [*context.model.graph.node, *functions]
        if node.op_type in DATA_DEPENDENT
    ]
