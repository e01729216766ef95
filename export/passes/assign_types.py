"""Graph pass: write the types of a lower precision into a float32 graph.

Most engines want them there: TensorRT 11 knows no precision flags. What the emitter marked as precise stays float32:
scores and everything that compares them, normalisation, sums over many tokens; so do inputs and outputs of the graph.
Among those, nodes that only move values take the type of what they move.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from edgeprune.errors import BuildError
from edgeprune.export.ops import DOMAIN, gather_tokens, topk_gather

MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "ScatterElements", "Slice", "Squeeze",
    "Transpose", "Unsqueeze", gather_tokens.NAME,
})  # fmt: skip
COMPARES = frozenset({"Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "TopK"})
LOW_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT = np.dtype(np.float32)


def low_type(precision: str) -> np.dtype[Any] | None:
    """Return the type of a precision's tensors, None for float32."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(LOW_TYPES[precision])) if precision in LOW_TYPES else None


def assign_types(graph: gs.Graph, precision: str, precise: Collection[str]) -> gs.Graph:
    """Return the graph with casts and constants of the precision.

    Args:
        graph: float32, nodes in an order that can be executed, shapes and types known.
        precision: "fp16" or "bf16"; "fp32" changes nothing.
        precise: names of the nodes that stay float32.

    Raises:
        BuildError: `overflow` when a weight is beyond the precision's range.
    """
    low = low_type(precision)
    if low is not None:
        _Assignment(graph, low, precision, precise).run()
    return graph


class _Assignment:
    def __init__(self, graph: gs.Graph, low: np.dtype[Any], label: str, precise: Collection[str]) -> None:
        self.graph, self.low, self.label, self.precise = graph, low, label, precise
        self.nodes: list[gs.Node] = []
        self._as_type: dict[tuple[str, np.dtype[Any]], gs.Tensor] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            own = self._type_of(node)
            for i, tensor in enumerate(node.inputs):
                if _is_float(tensor):
                    scores = node.op == topk_gather.NAME and i == 0
                    node.inputs[i] = self._cast(tensor, FLOAT if scores else own)
            if node.op == "Cast" and _is_float(node.outputs[0]):
                node.attrs["to"] = int(helper.np_dtype_to_tensor_dtype(own))
            for tensor in node.outputs:
                if _is_float(tensor):
                    tensor.dtype = own
            self.nodes.append(node)
        self._restore_outputs()
        self.graph.nodes = self.nodes

    def _type_of(self, node: gs.Node) -> np.dtype[Any]:
        """Return the type of a node's floating-point tensors."""
        if node.op in COMPARES:
            return FLOAT
        if node.name not in self.precise:
            return self.low
        if node.op in MOVES or node.domain == DOMAIN:
            moved = node.inputs[1:] if node.op == topk_gather.NAME else node.inputs
            if any(_is_float(t) and not isinstance(t, gs.Constant) and np.dtype(t.dtype) == self.low for t in moved):
                return self.low
        return FLOAT

    def _cast(self, tensor: gs.Tensor, wanted: np.dtype[Any]) -> gs.Tensor:
        """Return a tensor as another type; cast once for all who want it."""
        if np.dtype(tensor.dtype) == wanted:
            return tensor
        key = (tensor.name, wanted)
        if key not in self._as_type:
            suffix = "fp32" if wanted == FLOAT else self.label
            name = f"{tensor.name}.{suffix}"
            self._as_type[key] = (
                self._convert(tensor, name) if isinstance(tensor, gs.Constant) else self._add_cast(tensor, name, wanted)
            )
        return self._as_type[key]

    def _add_cast(self, tensor: gs.Tensor, name: str, wanted: np.dtype[Any]) -> gs.Variable:
        out = gs.Variable(name, wanted, tensor.shape)
        to = int(helper.np_dtype_to_tensor_dtype(wanted))
        self.nodes.append(gs.Node("Cast", name, {"to": to}, [tensor], [out]))
        return out

    def _convert(self, constant: gs.Constant, name: str) -> gs.Constant:
        with np.errstate(over="ignore"):
            values = constant.values.astype(self.low)
        if not np.isfinite(values.astype(np.float32)).all() and np.isfinite(constant.values).all():
            raise BuildError(
                f"{constant.name} holds {float(np.abs(constant.values).max()):.3g}, which is beyond {self.label}",
                code="overflow",
                expected=f"weights within the range of {self.label}",
                hint="use the target of the same name with bf16, or fp32",
            )
        return gs.Constant(name, values)

    def _restore_outputs(self) -> None:
        """Give every output of the graph back its type."""
        for i, tensor in enumerate(self.graph.outputs):
            if _is_float(tensor) and tensor.dtype != FLOAT:
                name = tensor.name
                tensor.name = f"{name}.{self.label}"
                out = self._add_cast(tensor, name, FLOAT)
                self.graph.outputs[i] = out


def _is_float(tensor: gs.Tensor) -> bool:
    return not tensor.is_empty() and tensor.dtype is not None and _kind(tensor.dtype) in _FLOATS


def _kind(dtype: Any) -> str:
    return np.dtype(dtype).name


_FLOATS = ("float32", "float16", "bfloat16")
