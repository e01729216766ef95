"""Targets `trt-*`: typed graphs for TensorRT 8.6 to 11.x, which `edgeprune build` makes engines of on the device.

The quantized ones are for TensorRT 10 and newer. Scales and inputs of QuantizeLinear are float16 as the rest of the
graph is, which the operator takes from opset 19 on. 8.6 reads opset 17 and every scale as float32
(`QuantDequantLinearHelper` in github.com/onnx/onnx-tensorrt, branch 8.6-GA), and has no strong typing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edgeprune.export.targets import onnx
from edgeprune.export.targets.base import GraphPass, Target

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect
    from edgeprune.export.lint import Rule
    from edgeprune.quantization.scheme import Quantization

WORDS = {
    "fp32": "float32 throughout, TF32 off",
    "fp16": "float16 with float32 scores and normalisation",
    "bf16": "bfloat16 with float32 scores and normalisation; from TensorRT 10 on",
}
QUANTIZED = {
    "int8": "8-bit integer linear layers in a float16 graph; from TensorRT 10 on",
    "fp8": "8-bit float linear layers in a float16 graph; from TensorRT 10 and compute capability 8.9 on",
}
BASE = "fp16"  # what is not quantized


def make_dialect(precision: str) -> PlainDialect:
    """Return the portable dialect: its attention is the pattern TensorRT fuses, its GELU follows the opset."""
    from edgeprune.export.emit.dialects.plain import PlainDialect

    return PlainDialect(precision)


def make_quantized_dialect(quantization: Quantization) -> PlainDialect:
    """Return the dialect with quantized linear layers."""
    from edgeprune.export.emit.dialects.qdq import QdqDialect

    return QdqDialect(BASE, quantization)


def graph_passes(selection: str, batch: tuple[int, int]) -> tuple[GraphPass, ...]:
    """Return the ordered graph passes; nodes of the plugin stay as they are."""
    from edgeprune.export.passes.drop_dead_nodes import drop_dead_nodes
    from edgeprune.export.passes.expand_cumsum import expand_cumsum
    from edgeprune.export.passes.expand_isnan import expand_isnan
    from edgeprune.export.passes.lower_selection import inline_bodies
    from edgeprune.export.passes.narrow_io import narrow_io
    from edgeprune.export.passes.quantize_before_gather import quantize_before_gather

    lowered = (quantize_before_gather,) if selection == "plugin" else (inline_bodies,)
    return (*lowered, expand_cumsum, expand_isnan, narrow_io, drop_dead_nodes)


def lint_rules() -> tuple[Rule, ...]:
    """Return the rules of TensorRT's parsers and of engines worth building, and those every static graph must obey."""
    from edgeprune.export.lint.tensorrt import tensorrt_rules

    return tensorrt_rules()


def _target(precision: str) -> Target:
    return Target(
        name=f"trt-{precision}",
        backend="TensorRT",
        precision=precision,
        summary=WORDS[precision],
        opset=17,
        opsets=(17, 18, 19, 20),
        domains=(*onnx.STANDARD_DOMAINS, "edgeprune"),
        packages=onnx.TARGET.packages,
        selections=("auto", "native", "plugin"),
        ir_version=8,
        bodies=False,
        told=True,
        device="tensorrt",
        dialect=partial(make_dialect, precision),
        passes=graph_passes,
        rules=lint_rules,
    )


def _quantized_target(precision: str) -> Target:
    return replace(
        _target(BASE),
        name=f"trt-{precision}",
        precision=precision,
        summary=QUANTIZED[precision],
        opset=19,
        opsets=(19, 20),
        ir_version=9,
        quantizes=precision,
        dialect=make_quantized_dialect,
    )


TARGETS = (*(_target(precision) for precision in WORDS), *(_quantized_target(precision) for precision in QUANTIZED))
