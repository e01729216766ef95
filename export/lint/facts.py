"""What rules ask of a graph again and again: types, shapes, constants, who makes a tensor and who reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

STANDARD_DOMAINS = ("", "ai.onnx")


class Facts:
    """Facts about a model; weights may be references."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.outputs = {output.name for output in model.graph.output}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                self.readers.setdefault(name, []).append(node)

    @cached_property
    def all_nodes(self) -> list[onnx.NodeProto]:
        """The nodes of the graph, of graphs inside nodes and of local functions."""
        return [*_with_inner(self.nodes), *_with_inner(n for f in self.model.functions for n in f.node)]

    @cached_property
    def opset(self) -> int:
        """Version of the standard operators."""
        return max(i.version for i in self.model.opset_import if i.domain in STANDARD_DOMAINS)

    @cached_property
    def _inferred(self) -> dict[str, onnx.TypeProto]:
        """Declared types first: inference knows nothing of operators that are not standard."""
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        return {
            info.name: info.type
            for of in (graph, self.model.graph)
            for info in (*of.value_info, *of.input, *of.output)
            if info.type.tensor_type.elem_type
        }

    @cached_property
    def types(self) -> dict[str, str]:
        """Element type by tensor, as far as known: "float32", "bfloat16", "bool"."""
        types = {name: type_name(of.tensor_type.elem_type) for name, of in self._inferred.items()}
        for node in self.nodes:
            if node.op_type == "Constant" and (value := constant_of(node)) is not None:
                types[node.output[0]] = type_name(value.data_type)
        return types | {name: type_name(tensor.data_type) for name, tensor in self.initializers.items()}

    def rank(self, name: str) -> int | None:
        """Return the number of axes of a tensor, None where it is not known."""
        if name in self.initializers:
            return len(self.initializers[name].dims)
        if name not in self._inferred or not self._inferred[name].tensor_type.HasField("shape"):
            return None
        return len(self._inferred[name].tensor_type.shape.dim)

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor is an initializer or a Constant."""
        return name in self.initializers or (name in self.producers and self.producers[name].op_type == "Constant")

    def value(self, name: str) -> np.ndarray | None:
        """Return the value of a constant that stands in the graph itself, None of anything else."""
        tensor = self.initializers.get(name)
        if tensor is None and name in self.producers:
            tensor = constant_of(self.producers[name])
        if tensor is None or external_data_helper.uses_external_data(tensor):
            return None
        return numpy_helper.to_array(tensor)

    def behind(self, name: str, *passing: str) -> list[onnx.NodeProto]:
        """Return who reads a tensor, looking through operators that hand it on."""
        found = []
        for node in self.readers.get(name, []):
            found += self.behind(node.output[0], *passing) if node.op_type in passing else [node]
        return found

    def before(self, name: str, *passing: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor, looking through operators that hand on their first input."""
        node = self.producers.get(name)
        while node is not None and node.op_type in passing:
            node = self.producers.get(node.input[0])
        return node


def type_name(element_type: int) -> str:
    """Return "float32" for TensorProto.FLOAT, and so on."""
    name = TensorProto.DataType.Name(element_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def constant_of(node: onnx.NodeProto) -> TensorProto | None:
    """Return the value of a Constant node, None of another node or of a value that is no tensor of numbers."""
    if node.op_type != "Constant":
        return None
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return value
    dtype = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in dtype:
        return None
    return numpy_helper.from_array(np.array(value, dtype[attribute.name]))


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Return the value of an attribute, None where it is missing."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def label(node: onnx.NodeProto) -> str:
    """Return what to call a node in a finding."""
    return node.name or next(filter(None, node.output), node.op_type)


def _with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for inner in node.attribute:
            yield from _with_inner(inner.g.node)
            for graph in inner.graphs:
                yield from _with_inner(graph.node)
