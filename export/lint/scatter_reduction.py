"""Scatters that add up or multiply, which some versions read as scatters that overwrite."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import attribute, label
from edgeprune.export.targets.tensorrt_versions import first_that

SCATTERS = ("ScatterElements", "ScatterND")


def scatter_reduction(context: LintContext) -> list[Finding]:
    """Refuse a reduction that is not computed: of ScatterElements in old versions, of ScatterND in all."""
    findings = []
    for node in (node for node in context.facts.nodes if node.op_type in SCATTERS):
        if attribute(node, "reduction") in (None, b"none"):
            continue
        if node.op_type == "ScatterND":
            findings.append(Finding("scatter-reduction", label(node), "no version computes a reduction of ScatterND"))
        elif not context.family.scatter_reduction:
            since = first_that(lambda family: family.scatter_reduction)
            reason = f"a reduction of ScatterElements is computed from TensorRT {since} on and ignored before"
            findings.append(Finding("scatter-reduction", label(node), reason))
    return findings
