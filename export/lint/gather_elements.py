"""Gathers whose index is blown up to one entry per value."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label


def gather_elements(context: LintContext) -> list[Finding]:
    """Refuse GatherElements with an expanded index: it moves several times the bytes of the rows themselves."""
    findings = []
    for node in (node for node in context.facts.nodes if node.op_type == "GatherElements"):
        index = context.facts.before(node.input[1], "Cast", "Identity")
        if index is not None and index.op_type in ("Expand", "Tile"):
            reason = "GatherElements reads an expanded index; GatherND with batch_dims=1 takes one entry per row"
            findings.append(Finding("expanded-index", label(node), reason))
    return findings
