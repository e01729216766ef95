"""The bodies of the `edgeprune` ops as ONNX functions: parsed once, attached to a model or inlined into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from edgeprune.export.ops import DOMAIN, gather_tokens, scatter_tokens, topk_gather


@lru_cache
def function_for(op: str, opset: int, order: int = 0, mode: int = 0) -> onnx.FunctionProto:
    """Return the body of an op as a function.

    Args:
        op: name in the `edgeprune` domain.
        opset: version of the standard operators.
        order: `TopKGather` only.
        mode: `TopKGather` only.
    """
    simple = {gather_tokens.NAME: gather_tokens.body, scatter_tokens.NAME: scatter_tokens.body}
    text = topk_gather.body(opset, order, mode) if op == topk_gather.NAME else simple[op](opset)
    return onnx.parser.parse_function(text)


def function_of(node: gs.Node, opset: int) -> onnx.FunctionProto:
    """Return the function that is the body of an `edgeprune` node."""
    return function_for(node.op, opset, int(node.attrs.get("order", 0)), int(node.attrs.get("mode", 0)))


def is_edgeprune(node: gs.Node) -> bool:
    """Return whether a node is one of our ops."""
    return node.domain == DOMAIN


def inline(node: gs.Node, opset: int) -> list[gs.Node]:
    """Return standard nodes that compute what an `edgeprune` node computes; the node is disconnected.

    Names inside are prefixed with the node's name; what depends on attributes alone becomes a constant.
    """
    function = function_of(node, opset)
    tensors: dict[str, gs.Tensor] = dict(zip(function.input, node.inputs, strict=True))
    outputs = list(node.outputs)
    node.outputs.clear()
    node.inputs.clear()
    tensors.update(zip(function.output, outputs, strict=True))
    made = []
    dims: dict[str, gs.Tensor] = {}  # output of a Shape node -> the tensor it measures
    for inner in function.node:
        attrs = {a.name: _attribute(a, node.attrs) for a in inner.attribute}
        if inner.op_type == "Constant":
            tensors[inner.output[0]] = gs.Constant(f"{node.name}.{inner.output[0]}", _constant(attrs))
            continue
        arguments = [tensors[name] for name in inner.input]
        if inner.op_type == "Shape":
            dims[inner.output[0]] = arguments[0]
        if inner.op_type == "Slice" and inner.input[0] in dims:
            start, stop = (int(bound.values[0]) for bound in arguments[1:3])
            known = (dims[inner.input[0]].shape or [])[start:stop]
            if len(known) == stop - start and all(isinstance(d, int) for d in known):
                tensors[inner.output[0]] = gs.Constant(f"{node.name}.{inner.output[0]}", np.array(known, np.int64))
                continue
        if inner.op_type in _FOLDABLE and all(isinstance(t, gs.Constant) for t in arguments):
            folded = _FOLDABLE[inner.op_type](*(t.values for t in arguments))
            tensors[inner.output[0]] = gs.Constant(f"{node.name}.{inner.output[0]}", folded)
            continue
        shape, dtypes = _known(inner.op_type, arguments)
        for name, dtype in zip(inner.output, dtypes, strict=False):
            tensors.setdefault(name, gs.Variable(f"{node.name}.{name}", dtype, shape))
        made.append(
            gs.Node(
                inner.op_type,
                f"{node.name}.{inner.output[0]}",
                attrs,
                arguments,
                [tensors[name] for name in inner.output],
            )
        )
    return made


_FOLDABLE: dict[str, Callable[..., np.ndarray]] = {
    "Reshape": lambda x, shape: x.reshape(tuple(shape)),
    "Range": lambda start, stop, step: np.arange(start, stop, step),
}


def _known(op: str, inputs: list[gs.Tensor]) -> tuple[list[Any] | None, tuple[Any, Any]]:
    """Return shape and types of the outputs where a later pass may ask for them: of scores and what becomes of them."""
    ranked = inputs and inputs[0].shape is not None and _is_scores(inputs)
    if op == "TopK" and ranked and isinstance(inputs[1], gs.Constant):
        return [*inputs[0].shape[:-1], int(inputs[1].values[0])], (np.float32, np.int64)
    if op in ("Max", "Where") and _is_scores(inputs):
        shapes = [list(t.shape) for t in inputs if t.shape is not None]
        return max(shapes, key=len), (np.float32, None)
    return (list(inputs[0].shape), (bool, None)) if op == "IsNaN" and ranked else (None, (None, None))


def _is_scores(inputs: list[gs.Tensor]) -> bool:
    return any(not isinstance(t, gs.Constant) and t.dtype == np.float32 and t.shape is not None for t in inputs)


def _attribute(attribute: onnx.AttributeProto, outer: dict[str, Any]) -> Any:
    return outer[attribute.ref_attr_name] if attribute.ref_attr_name else helper.get_attribute_value(attribute)


def _constant(attrs: dict[str, Any]) -> np.ndarray:
    (name, value), *_ = attrs.items()
    if name == "value":
        return numpy_helper.to_array(value)
    return np.array(value, np.int64 if name.startswith("value_int") else np.float32)
