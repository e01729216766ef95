"""Inputs and outputs whose type depends on the version: int32 in place of int64 before there were such tensors."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.targets.tensorrt_versions import first_that
from edgeprune.runtime.router import SLOTS


def int64_io(context: LintContext) -> list[Finding]:
    """Refuse int64 inputs and outputs but the token counts: what one graph hands to another has one type."""
    graph, since = context.model.graph, first_that(lambda family: family.int64)
    return [
        Finding("int64-io", info.name, f"{info.name} is int64, which is int32 before TensorRT {since}: cast it")
        for info in (*graph.input, *graph.output)
        if context.facts.types.get(info.name) == "int64" and info.name != SLOTS
    ]
