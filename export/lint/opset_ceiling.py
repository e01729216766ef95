"""Versions of the standard operators a parser has not seen."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.targets.tensorrt_versions import first_that


def opset_ceiling(context: LintContext) -> list[Finding]:
    """Refuse an opset above the highest the version reads."""
    opset = context.facts.opset
    if opset <= context.family.opset:
        return []
    since = first_that(lambda family: family.opset >= opset)
    reads = "is read by no version of TensorRT" if since is None else f"is read from TensorRT {since} on"
    return [Finding("opset", context.model.graph.name, f"opset {opset} {reads}")]
