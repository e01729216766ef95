"""From the graph in memory to files: weights streamed into one data file that several graphs share."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from edgeprune.errors import InternalError
from edgeprune.export.ops import DOMAIN, functions

INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference can read them
ALIGNMENT = 4096  # page size, so that a runtime can map tensors straight from the file


class WeightStore:
    """One external data file, written tensor by tensor; equal names are stored once.

    Args:
        path: the data file; graphs that use it stand beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._entries: dict[str, tuple[int, int, tuple[int, ...]]] = {}

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def flush(self) -> None:
        """Bring what was put so far into the file, so that a graph can be run before the others are written."""
        self._file.flush()

    def put(self, name: str, values: np.ndarray) -> TensorProto:
        """Write a tensor unless its name is known and return the reference to it."""
        if name not in self._entries:
            self._file.seek(-self._file.tell() % ALIGNMENT, 1)
            offset = self._file.tell()
            self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            self._entries[name] = (offset, values.nbytes, values.shape)
        offset, length, shape = self._entries[name]
        if shape != values.shape:
            raise InternalError(f"two tensors named {name}: {shape} and {values.shape}", code="weight-name")
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            dims=values.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def write_graph(
    graph: gs.Graph, path: Path, store: WeightStore, *, ir_version: int = 10, bodies: bool = True
) -> onnx.ModelProto:
    """Write a graph and stream its large tensors into the store; the graph refers to them afterwards.

    Args:
        graph: as its passes left it.
        path: the .onnx file.
        store: the weight file beside it.
        ir_version: of the file.
        bodies: attach the bodies of `edgeprune` nodes as functions.

    Returns:
        the model as written, weights as references.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and not isinstance(tensor._values, LazyValues):
            values = tensor.values
            small = values.nbytes < INLINE_BYTES
            tensor._values = LazyValues(
                numpy_helper.from_array(values, tensor.name) if small else store.put(tensor.name, values)
            )
    ours = [node for node in graph.nodes if functions.is_edgeprune(node)]
    model = gs.export_onnx(graph, ir_version=ir_version)
    if bodies:
        model.functions.extend({node.op: functions.function_of(node, graph.opset) for node in ours}.values())
    path.write_bytes(model.SerializeToString())
    return model


def graph_info(model: Any, file: str) -> dict[str, Any]:
    """Return the manifest's entry of a graph; dynamic dimensions are -1."""

    def tensors(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {
        "file": file,
        "inputs": tensors(model.graph.input),
        "outputs": tensors(model.graph.output),
        "plugin": any(node.domain == DOMAIN for node in model.graph.node) and not model.functions,
    }
