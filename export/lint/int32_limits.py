"""Numbers that TensorRT keeps in 32 bits."""

from __future__ import annotations

import numpy as np
import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, label

LIMITS = np.iinfo(np.int32)


def int32_limits(context: LintContext) -> list[Finding]:
    """Refuse plugin attributes and dimensions that do not fit."""
    findings = [
        Finding("int32-limit", label(node), f"{node.op_type} gets {a.name}={value} cut to 32 bits")
        for node in context.facts.all_nodes
        if node.domain not in STANDARD_DOMAINS
        for a in node.attribute
        for value in (a.i, *a.ints)
        if not LIMITS.min <= value <= LIMITS.max
    ]
    graph = context.model.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    shapes |= {i.name: _dims(i) for i in (*graph.input, *graph.output, *graph.value_info)}
    return findings + [
        Finding("int32-limit", name, f"a dimension of {max(dims)} does not fit 32 bits")
        for name, dims in shapes.items()
        if max(dims, default=0) > LIMITS.max
    ]


def _dims(info: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
