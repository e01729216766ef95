"""Typed graphs on a processor: float32 arithmetic, every float16, bfloat16 or 8-bit tensor rounded to its type.

That is what a GPU computes with float32 accumulators. ONNX Runtime's CPU provider has no such arithmetic: given the
typed graph, it leaves out the rounding between two operators. A device differs in the order of additions, and rounds
less where it fuses operators.

What DequantizeLinear makes is not rounded: the kernels of a GPU multiply the 8-bit numbers and scale the sum. It
becomes a cast and a product. Left as it is, ONNX Runtime would fuse it with its neighbours into products of integers,
which saturate on processors without dot-product instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.export.lint.facts import Facts, attribute
from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION, functions
from edgeprune.export.passes.assign_types import LOW_TYPES, MOVES
from edgeprune.export.writer import graph_info
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import TensorInfo
from edgeprune.runtime.ort import OrtBackend

FLOAT = int(TensorProto.FLOAT)
FLOAT8 = int(TensorProto.FLOAT8E4M3FN)  # held as float32 too: few operators of the standard take it
LOW = frozenset({*(int(kind) for kind in LOW_TYPES.values()), FLOAT8})


def open_emulated(path: Path, **options: Any) -> OrtBackend:
    """Return the graph in a file ready to run on this machine's processor; `options` as of `OrtBackend`.

    Inputs and outputs of a low type are listed as such, and are float32 arrays of values of that type.

    Raises:
        InputError: `graph-invalid`.
        EnvironmentLackError: `package-missing`.
    """
    model = onnx.load(path, load_external_data=False)
    backend = OrtBackend(path, graph=emulated(model).SerializeToString(), **options)
    told = graph_info(model, path.name)
    backend.inputs, backend.outputs = ([TensorInfo(**info) for info in told[side]] for side in ("inputs", "outputs"))
    return backend


def forms_of(bundle: Bundle) -> Iterator[Bundle]:
    """Yield a bundle in every form in which a device may run it: as it is, with plugin nodes, told its sizes."""
    manifest = bundle.manifest
    yield bundle
    variants = {g.variant_of: g for g in manifest.graphs.values() if g.variant_of is not None}
    if variants:
        yield replace(bundle, manifest=manifest.model_copy(update={"graphs": {**manifest.graphs, **variants}}))
    adaptive = manifest.adaptive
    if adaptive is not None and adaptive.told is not None:
        buckets = [bucket.model_copy(update={"graph": adaptive.told}) for bucket in adaptive.buckets]
        told = adaptive.model_copy(update={"buckets": buckets})
        yield replace(bundle, manifest=manifest.model_copy(update={"adaptive": told}))


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model that rounds like a typed one; weights stay references."""
    types, facts = element_types(model), Facts(model)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    del graph.value_info[:]
    nodes = _widened(graph.initializer)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and types[node.output[0]] == FLOAT8:
            nodes += _quantized_to_float8(node, facts)
        elif node.op_type == "DequantizeLinear":
            nodes += _dequantized(node, facts)
        else:
            nodes += _rounded(node, types)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in LOW:
            value.type.tensor_type.elem_type = FLOAT
    if not made.functions:
        _attach_bodies(made)
    return made


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor that is known: declared, or inferred from the operators."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *model.graph.value_info, *model.graph.input, *model.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _widened(initializers: Iterable[TensorProto]) -> list[onnx.NodeProto]:
    """Rename initializers of a low type and return the casts that give their names to float32 tensors."""
    casts = []
    for tensor in initializers:
        if tensor.data_type in LOW:
            name, tensor.name = tensor.name, f"{tensor.name}.stored"
            casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.widened", to=FLOAT))
    return casts


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> list[onnx.NodeProto]:
    """Return a node, and behind it the rounding of each output of a low type."""
    low = [i for i, name in enumerate(node.output) if types.get(name) in LOW]
    if not low or node.op_type in MOVES or node.domain == DOMAIN:  # values that were rounded already
        return [node]
    own = onnx.NodeProto()
    own.CopyFrom(node)
    parts = [own]
    if node.op_type == "Cast":  # to the low type, which is the rounding itself
        own.output[0] = f"{node.output[0]}.rounded"
    for i in low:
        name = node.output[i]
        if node.op_type != "Cast":
            own.output[i] = f"{name}.exact"
            parts.append(helper.make_node("Cast", [own.output[i]], [f"{name}.rounded"], to=types[name]))
        parts.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=FLOAT))
    return parts


def _quantized_to_float8(node: onnx.NodeProto, facts: Facts) -> list[onnx.NodeProto]:
    """Return a division and casts in the place of a QuantizeLinear to float8e4m3fn, which saturates."""
    name = node.output[0]
    reshape, scale = _scale(node, facts)
    return [
        *reshape,
        helper.make_node("Div", [node.input[0], scale], [f"{name}.exact"], name=node.name),
        helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=FLOAT8),
        helper.make_node("Cast", [f"{name}.rounded"], [name], to=FLOAT),
    ]


def _dequantized(node: onnx.NodeProto, facts: Facts) -> list[onnx.NodeProto]:
    """Return a cast and a product in the place of a DequantizeLinear whose zero point is zero; nothing is rounded."""
    name = node.output[0]
    reshape, scale = _scale(node, facts)
    return [
        helper.make_node("Cast", [node.input[0]], [f"{name}.numbers"], to=FLOAT),
        *reshape,
        helper.make_node("Mul", [f"{name}.numbers", scale], [name], name=node.name),
    ]


def _scale(node: onnx.NodeProto, facts: Facts) -> tuple[list[onnx.NodeProto], str]:
    """Return the scale in a shape that broadcasts to the data, and the nodes this takes."""
    data, scale, name = node.input[0], node.input[1], f"{node.output[0]}.scale"
    rank, axis = facts.rank(data), attribute(node, "axis")
    behind = 0 if not facts.rank(scale) or rank is None else rank - 1 - (1 if axis is None else axis) % rank
    if not behind:
        return [], scale
    shape = numpy_helper.from_array(np.array([-1, *[1] * behind], np.int64))  # the axis is not the last
    made = [
        helper.make_node("Constant", [], [f"{name}.shape"], value=shape),
        helper.make_node("Reshape", [scale, f"{name}.shape"], [name]),
    ]
    return made, name


def _attach_bodies(model: onnx.ModelProto) -> None:
    """Give every `edgeprune` node its body; each order and mode of an op becomes a function of its own."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    bodies: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        variant = [int(attributes.get(name, 0)) for name in ("order", "mode")]
        body = onnx.FunctionProto()
        body.CopyFrom(functions.function_for(node.op_type, opset, *variant))
        body.name = node.op_type = "_".join([node.op_type, *map(str, variant)])
        bodies[body.name] = body
    model.functions.extend(bodies.values())
    if bodies and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
