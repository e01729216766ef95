"""Which kernels ran, from the profiler of ONNX Runtime, and linear layers that were meant to run on integers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgeprune.quantization import Quantization, linear_layers
from edgeprune.runtime.kernels import INTEGER, NodeRun, float_layers, linear_layer, profile_nodes
from edgeprune.runtime.ort import OrtBackend
from tests.helpers.lowering import Lowered, lowered, noise, random_model, small

CONFIG = small(depth=2)
NAMES = ("blocks.0.attn.q", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")


def profiled(path: Path, images: np.ndarray, name: str = "images") -> list[NodeRun]:
    return profile_nodes(partial(OrtBackend, path, threads=1, spinning=False), {name: images}, runs=2)


def graph(folder: Path, layers: list[str], target: str = "ort-cpu-int8") -> Lowered:
    quantization = Quantization("int8", "dynamic", frozenset(layers), weight_bits=7)
    return lowered(
        random_model(CONFIG), folder, target=target, quantization=quantization if target != "ort-cpu" else None
    )


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        ("blocks.3.attn.q", "blocks.3.attn.qkv"),
        ("blocks.3.attn.k", "blocks.3.attn.qkv"),
        ("blocks.11.attn.v", "blocks.11.attn.qkv"),
        ("blocks.3.attn.proj", "blocks.3.attn.proj"),
        ("blocks.3.mlp.fc1", "blocks.3.mlp.fc1"),
        ("blocks.3.mlp.fc2", "blocks.3.mlp.fc2"),
        ("blocks.3.mlp.fc2.quantized", None),
        ("blocks.3.attn.context", None),
        ("select.0.fc1", None),
        ("head.logits", None),
    ],
)
def test_linear_layer_of_a_node(node: str, layer: str | None) -> None:
    assert linear_layer(node) == layer


def test_integer_layers_run_on_integers(tmp_path: Path) -> None:
    kept = ["blocks.1.mlp.fc1"]
    layers = [layer for layer in linear_layers(CONFIG) if layer not in kept]
    nodes = profiled(graph(tmp_path, layers).path, noise(CONFIG))
    assert float_layers(nodes, kept) == []
    assert float_layers(nodes, []) == ["blocks.1.mlp.fc1 ran as Gemm"]
    assert all(node.ms >= 0 for node in nodes) and len({node.name for node in nodes}) == len(nodes)
    assert {linear_layer(node.name) for node in nodes} - {None} == set(linear_layers(CONFIG))


def test_float_graph_is_all_float_layers(tmp_path: Path) -> None:
    made = graph(tmp_path, [], target="ort-cpu")
    linear = [node.name for node in made.model.graph.node if linear_layer(node.name)]
    assert sorted(float_layers(profiled(made.path, noise(CONFIG)), [])) == sorted(f"{n} ran as Gemm" for n in linear)


def write_products(path: Path) -> Path:
    """Write a graph of float products with the names of linear layers."""
    rng, weights, nodes, x = np.random.default_rng(0), [], [], "x"
    for name in NAMES:
        weights.append(numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), f"{name}.weight"))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.weight"], [f"{name}.out"], name=name))
        x = f"{name}.out"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [16, 64]) for n in ("x", x)]
    made = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Rows(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = [np.random.default_rng(seed).standard_normal((16, 64)).astype(np.float32) for seed in range(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"x": self._left.pop()} if self._left else None


def test_weights_alone_quantized_by_another_tool_are_found(tmp_path: Path) -> None:
    plain, path = write_products(tmp_path / "plain.onnx"), tmp_path / "qdq.onnx"
    quantize_static(
        plain, path, Rows(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, nodes_to_quantize=list(NAMES),
    )  # fmt: skip
    model = onnx.load(path)
    weights = {node.output[0] for node in model.graph.node if node.input[0].endswith(".weight_quantized")}
    assert len(weights) == len(NAMES)
    dequantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    quantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "MatMul":  # its input stays float, as where a tool does not know a tensor's type
            node.input[0] = quantized[dequantized[node.input[0]]]
    onnx.save(model, path)
    x = np.ones((16, 64), np.float32)
    found = float_layers(profiled(path, x, "x"), [])
    assert [line.split(" ran as ")[0] for line in found] == list(NAMES)
    assert not {line.split(" ran as ")[1] for line in found} & INTEGER
    assert [line.split(" ran as ")[0] for line in float_layers(profiled(plain, x, "x"), NAMES[1:])] == [NAMES[0]]


def test_nodes_of_a_profile_are_judged_by_their_operator() -> None:
    nodes = [NodeRun(name, op, 1.0) for name, op in zip(NAMES, ("MatMulNBits", "QGemm", "MatMul", "Gemm"), strict=True)]
    nodes.append(NodeRun("head.logits", "Gemm", 1.0))
    assert float_layers(nodes, ["blocks.0.mlp.fc2"]) == [
        "blocks.0.attn.q ran as MatMulNBits",
        "blocks.0.mlp.fc1 ran as MatMul",
    ]
