"""Products whose factors come out of DequantizeLinear, in the form that becomes one kernel on 8-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, Facts, attribute, label
from edgeprune.export.lint.quantized_tensors import axis_of, shape_of, weight_of

PRODUCTS = ("MatMul", "Gemm", "Conv")
HANDED_ON = ("Cast", "Reshape", "Transpose")


def quantized_products(context: LintContext) -> list[Finding]:
    """Refuse products of one quantized factor, casts in front of a product, scales along a wrong axis of weights."""
    facts = context.facts
    return [
        Finding("quantized-product", label(node), reason)
        for node in facts.nodes
        if node.op_type in PRODUCTS and node.domain in STANDARD_DOMAINS
        for reason in _reasons(facts, node)
    ]


def dequantized(facts: Facts, name: str) -> onnx.NodeProto | None:
    """Return the DequantizeLinear a tensor comes from, perhaps in another shape or type."""
    node = facts.before(name, *HANDED_ON)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _reasons(facts: Facts, node: onnx.NodeProto) -> Iterator[str]:
    factors = [dequantized(facts, name) for name in node.input[:2]]
    quantized = [factor for factor in factors if factor is not None]
    if not quantized:
        return
    if len(quantized) == 1:
        which = "first" if factors[0] is not None else "second"
        yield f"only the {which} factor is quantized, so {node.op_type} runs in floating point"
    for name in node.input[:2]:
        if dequantized(facts, name) is not None and "Cast" in _passed(facts, name):
            yield "a Cast stands between DequantizeLinear and the product: hold the scale in the type that is wanted"
    if factors[1] is not None:
        yield from _weight(facts, node, factors[1])


def _passed(facts: Facts, name: str) -> list[str]:
    """Return the operators between a tensor and its DequantizeLinear."""
    found, node = [], facts.producers.get(name)
    while node is not None and node.op_type in HANDED_ON:
        found.append(node.op_type)
        node = facts.producers.get(node.input[0])
    return found


def _weight(facts: Facts, product: onnx.NodeProto, node: onnx.NodeProto) -> Iterator[str]:
    """Yield what is wrong with the scales of weights."""
    shape, scales = shape_of(facts, weight_of(facts, node)), shape_of(facts, node.input[1])
    if shape is None or scales is None:
        return
    if int(np.prod(scales)) == 1:
        if len(shape) > 1 and shape[_outputs(facts, product, len(shape))] > 1:
            yield "the weights have one scale, needed is one per output"
    elif axis_of(node, len(shape)) != _outputs(facts, product, len(shape)):
        yield f"the scales of the weights lie along axis {axis_of(node, len(shape))}, which is not that of the outputs"


def _outputs(facts: Facts, product: onnx.NodeProto, rank: int) -> int:
    """Return the axis of a weight, as it is stored, along which the outputs of a product lie."""
    axis = 0 if product.op_type == "Conv" or attribute(product, "transB") else rank - 1
    node = facts.producers.get(product.input[1])
    while node is not None and node.op_type in HANDED_ON:
        if node.op_type == "Transpose":
            perm = attribute(node, "perm") or list(range(rank))[::-1]
            axis = perm[axis]
        node = facts.producers.get(node.input[0])
    return axis
