"""The float form of a graph with integer layers: what the same network takes without quantization, on any machine.

The integers stay where they lie and are widened when the graph is loaded, so nothing is written and no second file of
weights is needed. The values are those of the quantized weights: good for latency, not for accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from edgeprune.runtime.ort import OrtBackend

QUANTIZERS = ("DynamicQuantizeLinear", "QuantizeLinear")


def open_float_twin(path: Path, **options: Any) -> OrtBackend:
    """Return the float form of a graph of target `ort-cpu-int8`, ready to run; `options` as of `OrtBackend`.

    Raises:
        InputError: `graph-invalid`.
        EnvironmentLackError: `package-missing`.
    """
    model = onnx.load(path, load_external_data=False)
    return OrtBackend(path, graph=float_twin(model).SerializeToString(), **options)


def float_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose integer products are Gemm again; weights stay references, widened by constant folding."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    rows = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in QUANTIZERS}
    nodes = [part for node in model.graph.node if node.op_type not in QUANTIZERS for part in _widened(node, rows)]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    del made.graph.value_info[:]
    return made


def _widened(node: onnx.NodeProto, rows: dict[str, str]) -> Iterator[onnx.NodeProto]:
    if node.op_type != "MatMulIntegerToFloat":
        yield node
        return
    integers, weight, _, scale, *rest = node.input
    cast, widened = f"{node.name}.weight.float", f"{node.name}.weight.widened"
    yield helper.make_node("Cast", [weight], [cast], to=onnx.TensorProto.FLOAT)
    yield helper.make_node("Mul", [cast, scale], [widened])
    bias = rest[2:]
    yield helper.make_node("Gemm", [rows[integers], widened, *bias], list(node.output), name=node.name)
