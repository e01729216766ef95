"""Dimensions that are not known: an engine has profiles for batches and for token counts, for nothing else."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.runtime.router import SLOTS


def dynamic_dims(context: LintContext) -> list[Finding]:
    """Refuse inputs with an unknown dimension besides the batch, unless the graph is told its token counts."""
    inputs = {i.name: i.type.tensor_type.shape.dim for i in context.model.graph.input}
    if SLOTS in inputs:
        return []
    return [
        Finding("dynamic-dims", name, f"axis {axis} of {name} has no fixed size; only the batch may change")
        for name, dims in inputs.items()
        for axis, dim in enumerate(dims)
        if axis > 0 and not dim.HasField("dim_value")
    ]
