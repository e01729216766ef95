"""Pruning that only masks saves nothing: the shapes themselves must shrink as the plan says."""

from __future__ import annotations

import onnx
from onnx import helper

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.plan import Block


def tokens_shrink(context: LintContext) -> list[Finding]:
    """Infer every block's output shape from the operators alone and compare its rows with the plan."""
    if context.plan is None:
        return []
    batch = context.plan.batch[1]
    shapes = infer_shapes(context.model, batch)
    findings = []
    for step in context.plan.steps:
        if not isinstance(step, Block):
            continue
        name = f"blocks.{step.index}.mlp.fc1"
        shape = shapes.get(name, [])
        rows = shape[-2] if len(shape) >= 2 else None
        wanted = step.tokens_out * batch if len(shape) == 2 else step.tokens_out
        if rows != wanted:
            reason = f"computes {rows} rows where the plan keeps {wanted}"
            findings.append(Finding("tokens-shrink", name, reason))
    return findings


def infer_shapes(model: onnx.ModelProto, batch: int) -> dict[str, list[int | None]]:
    """Return the shape of every tensor for a batch, inferred without the shapes the emitter wrote down.

    Operators of ONNX Runtime are replaced by standard ones of the same shape first.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    copy.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    nodes = [standard for node in copy.graph.node for standard in _same_shape(node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return {
        info.name: [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
        for info in inferred.graph.value_info
    }


def _same_shape(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.domain != "com.microsoft":
        return [node]
    if node.op_type in ("MultiHeadAttention", "Gelu"):
        return [helper.make_node("Identity", [node.input[0]], list(node.output))]
    if node.op_type == "FusedMatMul":
        turned = f"{node.output[0]}.turned"
        return [
            helper.make_node("Transpose", [node.input[1]], [turned], perm=[0, 2, 1]),
            helper.make_node("MatMul", [node.input[0], turned], list(node.output)),
        ]
    return [node]
