"""Graphs and plans of the stand-in for TensorRT: reading ONNX as the parser does, and computing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from edgeprune.export.emulate import emulated

KINDS = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.BFLOAT16: ("BF16", np.uint16),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.BOOL: ("BOOL", np.bool_),
    TensorProto.INT8: ("INT8", np.int8),
    TensorProto.UINT8: ("UINT8", np.uint8),
}
NUMPY = dict(KINDS.values())
# where an integer tensor becomes a size, as (operator, input), and what it may pass through before
SIZES = {("TopK", 1), ("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0)}
SIZES |= {("Slice", i) for i in range(1, 5)} | {("Range", i) for i in range(3)}
ARITHMETIC = {
    "Add",
    "Sub",
    "Mul",
    "Min",
    "Max",
    "Cast",
    "Concat",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Identity",
}


@dataclass
class Tensor:
    name: str
    onnx_type: int
    shape: list[int]


@dataclass
class Model:
    """An ONNX file as the parser reads it; weights stay where they are."""

    proto: onnx.ModelProto
    inputs: list[Tensor]
    outputs: list[Tensor]
    shape_inputs: set[str]

    def all(self) -> list[Tensor]:
        return self.inputs + self.outputs


def read_model(data: bytes) -> Model:
    proto = onnx.load_model_from_string(data)
    weights = {one.name for one in proto.graph.initializer}
    inputs = [_tensor(one) for one in proto.graph.input if one.name not in weights]
    return Model(proto, inputs, [_tensor(one) for one in proto.graph.output], _shape_inputs(proto, inputs))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    return Tensor(value.name, kind.elem_type, [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim])


def _shape_inputs(proto: onnx.ModelProto, inputs: Sequence[Tensor]) -> set[str]:
    """Return the integer inputs that become sizes of tensors: TensorRT reads them on the host."""
    found = set()
    for one in inputs:
        if one.onnx_type not in (TensorProto.INT32, TensorProto.INT64) or len(one.shape) > 1:
            continue
        reached = {one.name}
        for node in proto.graph.node:
            for i, name in enumerate(node.input):
                if name in reached:
                    if (node.op_type, i) in SIZES:
                        found.add(one.name)
                    elif node.op_type in ARITHMETIC:
                        reached |= set(node.output)
    return found


@dataclass(frozen=True)
class Computer:
    """A graph in ONNX Runtime. Typed graphs and nodes of the plugin are emulated: low types are float32 arrays then."""

    session: onnxruntime.InferenceSession
    widened: bool

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Return the outputs as an engine stores them."""
        given = {name: self._widen(array) for name, array in feeds.items()}
        found = self.session.run([one.name for one in outputs], given)
        return {one.name: _stored(array, one.onnx_type) for one, array in zip(outputs, found, strict=True)}

    def _widen(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.uint16:  # the bits of bfloat16
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32) if self.widened and array.dtype == np.float16 else array


def _stored(array: np.ndarray, onnx_type: int) -> np.ndarray:
    if onnx_type == TensorProto.BFLOAT16:  # rounded already
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(KINDS[onnx_type][1])


@lru_cache(maxsize=64)
def computer_of(source: Path, stamp: float, data: bytes | None = None) -> Computer:
    """Return what computes a graph: the one in a file, changed at a time, or the one in some bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.parent))
    proto = onnx.load(source, load_external_data=False) if data is None else onnx.load_model_from_string(data)
    low = {one.data_type for one in proto.graph.initializer} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    widened = bool(low) or any(
        node.domain == "edgeprune" or node.op_type == "DequantizeLinear" for node in proto.graph.node
    )
    model = (emulated(proto) if widened else proto).SerializeToString()
    return Computer(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), widened)


def make_plan(
    version: str,
    onnx_file: Path,
    profiles: Sequence[tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]]] = (({}, {}),),
    *,
    scratch: Sequence[int] | None = None,
    plugins: Sequence[str] = (),
) -> bytes:
    """Return an engine as the stand-in of a version builds it.

    Args:
        version: of TensorRT.
        onnx_file: what it runs.
        profiles: per profile the shapes of inputs and the values of shape inputs, each min = opt = max.
        scratch: bytes of device memory by profile.
        plugins: creators it needs.
    """
    return encode(
        {
            "stand-in": "plan",
            "tensorrt": version,
            "model": str(onnx_file.resolve()),
            "sha256": hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
            "profiles": [
                {
                    "shapes": {name: [list(sides)] * 3 for name, sides in shapes.items()},
                    "values": {name: [list(numbers)] * 3 for name, numbers in values.items()},
                }
                for shapes, values in profiles
            ],
            "flags": [],
            "verbosity": "LAYER_NAMES_ONLY",
            "plugins": [[name, "1", "edgeprune"] for name in plugins],
            "scratch": list(scratch or [4096 * (i + 1) for i in range(len(profiles))]),
        }
    )


def encode(plan: dict[str, Any]) -> bytes:
    return b"ftrt" + json.dumps(plan, sort_keys=True).encode()


def read_plan(data: Any) -> dict[str, Any]:
    """Return what is in an engine of the stand-in."""
    held = bytes(data)
    if held[:4] != b"ftrt":
        raise ValueError("no engine")
    found: dict[str, Any] = json.loads(held[4:])
    return found
