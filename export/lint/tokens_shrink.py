"""Pruning that only masks saves nothing: the shapes themselves must shrink as the plan says."""

from __future__ import annotations

import onnx
from onnx import helper

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.ops import DOMAIN, scatter_tokens, topk_gather
from edgeprune.export.plan import Block, Counts, Rows, Select


def tokens_shrink(context: LintContext) -> list[Finding]:
    """Infer every block's output shape from the operators alone and compare its rows with the plan.

    Where the number of tokens is no constant, the operators must not make it one. Of a graph that was cut, each part
    has some of the blocks.
    """
    plan = context.plan
    if plan is None:
        return []
    batch, symbolic = plan.packed or plan.batch[1], plan.counts is not Counts.SLOTS
    shapes = infer_shapes(context.model, batch)
    there = {node.name for node in context.model.graph.node}
    findings, shortened = [], False
    for step in plan.steps:
        shortened |= isinstance(step, Select) or (isinstance(step, Block) and step.stage is not None)
        name = f"blocks.{step.index}.mlp.fc1" if isinstance(step, Block) else ""
        if not isinstance(step, Block) or (plan.split and name not in there):
            continue
        shape = shapes.get(name, [])
        rows = shape[-2] if len(shape) >= 2 else None
        wanted: int | None = step.tokens_out * batch if len(shape) == 2 else step.tokens_out
        if symbolic and shortened:
            if step.projected_rows is Rows.HEAD:  # a slice of an unknown length, which inference does not follow
                continue
            wanted = None
        if rows != wanted:
            reason = (
                f"computes {rows} rows where the plan keeps {'as many as are asked for' if wanted is None else wanted}"
            )
            findings.append(Finding("tokens-shrink", name, reason))
    return findings


def infer_shapes(model: onnx.ModelProto, batch: int) -> dict[str, list[int | None]]:
    """Return the shape of every tensor for a batch, inferred without the shapes the emitter wrote down.

    Operators of ONNX Runtime and our own are replaced by standard ones of the same shape first.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for tensor in copy.graph.input:
        if tensor.type.tensor_type.shape.dim[0].dim_param:
            tensor.type.tensor_type.shape.dim[0].dim_value = batch
    nodes = [standard for node in copy.graph.node for standard in _same_shape(node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return {
        info.name: [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
        for info in inferred.graph.value_info
    }


def _same_shape(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.domain == DOMAIN and node.op_type == scatter_tokens.NAME:
        return [helper.make_node("Identity", [node.input[0]], list(node.output))]
    if node.domain == DOMAIN:
        return _selection_of_same_shape(node)
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
    if node.op_type == "MatMulIntegerToFloat":
        product = f"{node.output[0]}.product"
        return [
            helper.make_node("MatMulInteger", node.input[:2], [product]),
            helper.make_node("Cast", [product], list(node.output), to=1),
        ]
    return [node]


def _selection_of_same_shape(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes whose outputs have the shapes of a TopKGather or GatherTokens; K and P are attributes."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    P, name = attributes["num_prefix_tokens"], node.output[0]

    def ints(label: str, *values: int) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [f"{name}.{label}"], value_ints=values)

    bounds = [ints("zero", 0), ints("one", 1), ints("minus_one", -1), ints("prefix", P)]
    zero, one, minus_one, prefix = (constant.output[0] for constant in bounds)
    if node.op_type == topk_gather.NAME:
        scores, tokens = node.input
        kept, indices, count = node.output
        k, rows = ints("k", attributes["k"]), ints("rows", P + attributes["k"])
        return [
            *(*bounds, k, rows),
            helper.make_node("Slice", [tokens, zero, rows.output[0], one], [kept]),
            helper.make_node("Slice", [scores, zero, k.output[0], one], [f"{name}.best"]),
            helper.make_node("Cast", [f"{name}.best"], [indices], to=6),
            helper.make_node("ReduceSum", [indices, one], [count], keepdims=0),
        ]
    tokens, indices = node.input
    return [
        *bounds,
        helper.make_node("Cast", [indices], [f"{name}.positions"], to=7),
        helper.make_node("Unsqueeze", [f"{name}.positions", minus_one], [f"{name}.at"]),
        helper.make_node("GatherND", [tokens, f"{name}.at"], [f"{name}.best"], batch_dims=1),
        helper.make_node("Slice", [tokens, zero, prefix, one], [f"{name}.first"]),
        helper.make_node("Concat", [f"{name}.first", f"{name}.best"], [name], axis=1),
    ]
