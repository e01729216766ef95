"""QuantizeLinear and DequantizeLinear as the parser takes them: symmetric, scales that are known and positive.

Source: `QuantDequantLinearHelper` of github.com/onnx/onnx-tensorrt, branches 8.6-GA and 10.1-GA, and the description of
IQuantizeLayer and IDequantizeLayer in `NvInfer.h`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, Facts, attribute, label
from edgeprune.export.targets.tensorrt_versions import first_that

NAMES = ("QuantizeLinear", "DequantizeLinear")
TYPES = ("int8", "float8e4m3fn", "int4")


def is_one(node: onnx.NodeProto) -> bool:
    """Return whether a node is of the two operators."""
    return node.op_type in NAMES and node.domain in STANDARD_DOMAINS


def quantized_tensors(context: LintContext) -> list[Finding]:
    """Refuse what is not symmetric, has no constant and positive scale, or one per channel of an activation."""
    nodes = [node for node in context.facts.nodes if is_one(node)]
    findings = [
        Finding("quantized-tensor", label(node), reason) for node in nodes for reason in _reasons(context.facts, node)
    ]
    if nodes and not context.family.strong:
        since = first_that(lambda family: family.strong)
        reason = f"quantized graphs need strongly typed networks, from TensorRT {since} on"
        findings.append(Finding("quantized-tensor", label(nodes[0]), reason))
    return findings


def _reasons(facts: Facts, node: onnx.NodeProto) -> Iterator[str]:
    scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
    number = facts.types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0], TYPES[0])
    if number not in TYPES:
        yield f"{number} is no quantized type of TensorRT: int8, symmetric about zero, or float8e4m3fn"
    if zero and not facts.is_constant(zero):
        yield "the zero point is computed and must be a constant"
    elif zero and (value := facts.value(zero)) is not None and np.any(value.astype(np.float32) != 0):
        yield "the zero point is not 0, and quantization is symmetric in TensorRT"
    if not facts.is_constant(scale):
        yield "the scale is computed and must be a constant"
        return
    if (value := facts.value(scale)) is not None and not np.all(np.isfinite(value) & (value > 0)):
        yield "the scale is not positive"
    yield from _channels(facts, node)


def _channels(facts: Facts, node: onnx.NodeProto) -> Iterator[str]:
    """Yield what is wrong with a scale that is more than one number."""
    scales = shape_of(facts, node.input[1])
    if scales is None or int(np.prod(scales)) == 1:
        return
    if len(scales) > 1 or attribute(node, "block_size"):
        yield "the scales are of blocks, needed is one for the tensor or one per channel"
        return
    data = shape_of(facts, weight_of(facts, node))
    if data is None:
        yield "an activation has a scale per channel, needed is one for the tensor"
    elif scales[0] != data[axis_of(node, len(data))]:
        yield f"{scales[0]} scales for {data[axis_of(node, len(data))]} channels"


def axis_of(node: onnx.NodeProto, rank: int) -> int:
    """Return the axis of the channels."""
    axis = attribute(node, "axis")
    return int(1 if axis is None else axis) % rank


def weight_of(facts: Facts, node: onnx.NodeProto) -> str:
    """Return the name of the data, or of the constant it was quantized from in the graph."""
    maker = facts.producers.get(node.input[0])
    return maker.input[0] if maker is not None and maker.op_type == "QuantizeLinear" else node.input[0]


def shape_of(facts: Facts, name: str) -> tuple[int, ...] | None:
    """Return the shape of a constant, None of anything else."""
    if name in facts.initializers:
        return tuple(facts.initializers[name].dims)
    value = facts.value(name)
    return None if value is None else value.shape
