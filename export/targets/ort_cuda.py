"""Target `ort-cuda-fp16`: a typed graph for ONNX Runtime's CUDA provider. Not run on a GPU yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.export.targets import onnx, ort_cpu
from edgeprune.export.targets.base import Target

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect


def make_dialect() -> PlainDialect:
    """Return the dialect of ONNX Runtime: its fused attention and GELU have CUDA kernels too."""
    from edgeprune.export.emit.dialects.ort_cpu import OrtCpuDialect

    return OrtCpuDialect("fp16")


TARGET = Target(
    name="ort-cuda-fp16",
    backend="ONNX Runtime, CUDA provider",
    precision="fp16",
    summary="float16 with float32 scores and normalisation, fused attention; needs no TensorRT",
    opset=17,
    opsets=onnx.TARGET.opsets,
    domains=ort_cpu.TARGET.domains,
    packages=onnx.TARGET.packages,
    device="cuda",
    dialect=make_dialect,
    passes=ort_cpu.graph_passes,
    rules=onnx.lint_rules,
)
