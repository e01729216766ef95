"""A stem and rests as tiny graphs: what the stem hands on is float16 and stays on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper


def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_stem(path: Path, batch: int | str) -> Path:
    """Write images [B, 3, 8, 8] -> tokens [B, 192] float16, token_count [B] int32: values above zero."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["tokens"], to=TensorProto.FLOAT16),
        helper.make_node("Sign", ["flat"], ["signs"]),
        helper.make_node("Relu", ["signs"], ["ones"]),
        helper.make_node("ReduceSum", ["ones", "axis"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["token_count"], to=TensorProto.INT32),
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
    ]
    nodes.insert(0, nodes.pop())
    outputs = [value("tokens", TensorProto.FLOAT16, [batch, 192]), value("token_count", TensorProto.INT32, [batch])]
    return save(path, nodes, [value("images", TensorProto.FLOAT, [batch, 3, 8, 8])], outputs)


def write_rest(path: Path, batch: int | str, scale: float) -> Path:
    """Write tokens, token_count -> logits [B, 192] float32, scaled, kept_counts [B, 1]."""
    nodes = [
        helper.make_node("Constant", [], ["scale"], value_float=scale),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Cast", ["tokens"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["logits"]),
        helper.make_node("Unsqueeze", ["token_count", "one"], ["kept_counts"]),
    ]
    inputs = [value("tokens", TensorProto.FLOAT16, [batch, 192]), value("token_count", TensorProto.INT32, [batch])]
    outputs = [value("logits", TensorProto.FLOAT, [batch, 192]), value("kept_counts", TensorProto.INT32, [batch, 1])]
    return save(path, nodes, inputs, outputs)
