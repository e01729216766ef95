"""Attention with quantized operands: all of it in the pattern of a fused kernel, or none.

The pattern is that of NVIDIA's Model Optimizer (github.com/NVIDIA/Model-Optimizer/pull/1289): queries, keys, softmax
and values in float8, the softmax with the scale 1/448, because it is never more than 1. With 8-bit integers attention
is not fused and runs slower than in float16 (github.com/NVIDIA/Model-Optimizer/issues/167).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import Facts, label
from edgeprune.export.lint.quantized_products import HANDED_ON, dequantized
from edgeprune.quantization.scheme import FP8_MAX

BETWEEN = (*HANDED_ON, "Add", "Mul", "Div", "QuantizeLinear", "DequantizeLinear")


def quantized_attention(context: LintContext) -> list[Finding]:
    """Refuse attention of which some operands are quantized and others not, or not as the fused kernel wants them."""
    facts, findings = context.facts, []
    for softmax in (node for node in facts.nodes if node.op_type == "Softmax"):
        logits = facts.before(softmax.input[0], *BETWEEN)
        contexts = [n for n in facts.behind(softmax.output[0], *BETWEEN) if n.op_type == "MatMul"]
        if logits is None or logits.op_type != "MatMul":
            continue
        for product in contexts:
            findings += [
                Finding("quantized-attention", label(softmax), reason) for reason in _reasons(facts, logits, product)
            ]
    return findings


def _reasons(facts: Facts, logits: onnx.NodeProto, context: onnx.NodeProto) -> Iterator[str]:
    names = dict(zip(("queries", "keys", "softmax", "values"), (*logits.input, *context.input), strict=True))
    found = {operand: dequantized(facts, name) for operand, name in names.items()}
    quantized = {operand: node for operand, node in found.items() if node is not None}
    if not quantized:
        return
    if len(quantized) < len(found):
        left = [operand for operand in found if operand not in quantized]
        yield f"{' and '.join(quantized)} are quantized and {' and '.join(left)} are not, which loses the fused kernel"
        return
    if any(facts.types.get(node.input[0]) != "float8e4m3fn" for node in quantized.values()):
        yield "attention is quantized to integers, which TensorRT does not fuse: leave it in float16"
        return
    scale = facts.value(quantized["softmax"].input[1])
    if scale is None or not np.allclose(scale.astype(np.float32), 1 / FP8_MAX, rtol=1e-3):
        yield "the scale of the softmax is not 1/448, as the fused kernel wants it"
