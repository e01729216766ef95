"""Outputs whose type depends on the version: old ones make int32 of int64."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext


def int64_outputs(context: LintContext) -> list[Finding]:
    """Refuse int64 outputs where the version has none."""
    types = context.facts.types
    return [
        Finding("int64-output", output.name, f"output {output.name} is int64, which comes out as int32; cast it")
        for output in context.model.graph.output
        if not context.family.int64 and types.get(output.name) == "int64"
    ]
