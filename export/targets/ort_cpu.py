"""Target `ort-cpu`: the form measured fastest on ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.export.targets import onnx
from edgeprune.export.targets.base import GraphPass, Target

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect


def make_dialect() -> PlainDialect:
    """Return the dialect of ONNX Runtime's CPU provider."""
    from edgeprune.export.emit.dialects.ort_cpu import OrtCpuDialect

    return OrtCpuDialect()


def graph_passes(selection: str, batch: tuple[int, int]) -> tuple[GraphPass, ...]:
    """Return the ordered graph passes; a fixed batch gets the flat gather."""
    from edgeprune.export.passes.drop_dead_nodes import drop_dead_nodes
    from edgeprune.export.passes.lower_selection import flatten_selection

    if selection == "native" and batch[0] == batch[1]:
        return (flatten_selection, drop_dead_nodes)
    return onnx.graph_passes(selection, batch)


TARGET = Target(
    name="ort-cpu",
    backend="ONNX Runtime, CPU provider",
    precision="fp32",
    summary="Gemm, fused attention and erf GELU of ONNX Runtime; the fastest form measured on CPU",
    opset=17,
    opsets=onnx.TARGET.opsets,
    domains=(*onnx.STANDARD_DOMAINS, "com.microsoft"),
    packages=onnx.TARGET.packages,
    dialect=make_dialect,
    passes=graph_passes,
    rules=onnx.lint_rules,
    adaptive_form="computed",
    takes_slots=True,
    bucket_multiple=1,
)
