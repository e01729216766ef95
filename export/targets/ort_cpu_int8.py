"""Target `ort-cpu-int8`: `ort-cpu` with 8-bit integer products in the linear layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgeprune.export.targets import ort_cpu
from edgeprune.quantization.scheme import Quantization

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect


def make_dialect(quantization: Quantization) -> PlainDialect:
    """Return the integer dialect of ONNX Runtime's CPU provider."""
    from edgeprune.export.emit.dialects.ort_cpu_int8 import OrtCpuInt8Dialect

    return OrtCpuInt8Dialect(quantization)


TARGET = replace(
    ort_cpu.TARGET,
    name="ort-cpu-int8",
    precision="int8",
    summary="ort-cpu with integer products in the linear layers; scores, attention and normalisation stay float32",
    dialect=make_dialect,
    quantizes="int8",
)
