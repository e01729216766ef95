"""Operators of a domain the target does not know."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext


def foreign_domains(context: LintContext) -> list[Finding]:
    """Refuse nodes outside the target's domains, unless the model carries their body as a function."""
    bodies = {(function.domain, function.name) for function in context.model.functions}
    inside = [node for function in context.model.functions for node in function.node]
    return [
        Finding(
            "foreign-domain", node.name or node.output[0], f"{node.domain}.{node.op_type} is unknown to this target"
        )
        for node in [*context.model.graph.node, *inside]
        if node.domain not in context.domains and (node.domain, node.op_type) not in bodies
    ]
