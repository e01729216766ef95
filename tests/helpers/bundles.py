"""A tiny bundle that stands for a real one: 8x8 images in 2x2 patches, four classes, one stage that keeps two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.runtime.bundle import Bundle, BundleWriter

WEIGHTS = np.array([[4, 0, 0, -4], [0, 4, 0, -4], [0, 0, 4, -4]], np.float32)  # class = strongest colour


def tiny_model(
    batch: tuple[int, int] = (1, 1), *, kept: bool = True, scale: float = 1.0, prefix_ids: bool = False
) -> onnx.ModelProto:
    """Return a graph with the inputs and outputs of an exported one.

    Args:
        batch: fixed or dynamic batch size.
        kept: with `kept_indices_0` and `kept_counts`; the two brightest patches of four are kept.
        scale: factor on the logits, to tell graphs apart.
        prefix_ids: append -1, the number of a fused token, to the kept indices.
    """
    B: int | str = batch[0] if batch[0] == batch[1] else "batch"
    initializers = [numpy_helper.from_array(WEIGHTS * np.float32(scale), "head.weight")]
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "head.weight"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [B, 4])]
    if kept:
        initializers += [
            numpy_helper.from_array(np.array([0, 4], np.int64), "flat"),
            numpy_helper.from_array(np.array([2], np.int64), "k"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ]
        nodes += [
            helper.make_node("AveragePool", ["images"], ["patches"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("ReduceMean", ["patches"], ["bright"], axes=[1], keepdims=0),
            helper.make_node("Reshape", ["bright", "flat"], ["scores"]),
            helper.make_node("TopK", ["scores", "k"], ["values", "ids64"]),
            helper.make_node("Cast", ["ids64"], ["ids"], to=TensorProto.INT32),
            helper.make_node("Equal", ["ids", "ids"], ["same"]),
            helper.make_node("Cast", ["same"], ["ones"], to=TensorProto.INT32),
            helper.make_node("ReduceSum", ["ones", "axis"], ["kept_counts"], keepdims=1),
        ]
        if prefix_ids:
            nodes += [
                helper.make_node("ReduceMax", ["ones"], ["one"], axes=[1], keepdims=1),
                helper.make_node("Neg", ["one"], ["fused"]),
                helper.make_node("Concat", ["ids", "fused"], ["kept_indices_0"], axis=1),
            ]
        else:
            nodes.append(helper.make_node("Identity", ["ids"], ["kept_indices_0"]))
        width = 3 if prefix_ids else 2
        outputs += [
            helper.make_tensor_value_info("kept_indices_0", TensorProto.INT32, [B, width]),
            helper.make_tensor_value_info("kept_counts", TensorProto.INT32, [B, 1]),
        ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [B, 3, 8, 8])
    graph = helper.make_graph(nodes, "tiny", [images], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def graph_info(model: onnx.ModelProto, file: str) -> dict[str, Any]:
    """Return the manifest entry of a graph."""

    def tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind = value.type.tensor_type
        return {
            "name": value.name,
            "dtype": str(helper.tensor_dtype_to_np_dtype(kind.elem_type)),
            "shape": [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim],
        }

    return {
        "file": file,
        "inputs": [tensor(v) for v in model.graph.input],
        "outputs": [tensor(v) for v in model.graph.output],
    }


def manifest_fields(graphs: dict[str, Any], batch: tuple[int, int] = (1, 1), **extra: Any) -> dict[str, Any]:
    """Return the fields an exporter hands to `BundleWriter.finish`."""
    return {
        "model": {"name": "tiny", "parameters": 12},
        "weights": {"source": "random", "seed": 0},
        "method": {"name": "evit", "keep_rate": 0.5},
        "target": "ort-cpu",
        "precision": "fp32",
        "opset": 17,
        "batch": batch,
        "lowering": "emitted",
        "selection": "native",
        "dead_rows": True,
        "graphs": graphs,
        "preprocessing": {
            "image_size": (8, 8),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        },
        "labels": ["red", "green", "blue", "dark"],
        **extra,
    }


def write_tiny(
    out: Path, batch: tuple[int, int] = (1, 1), *, kept: bool = True, prefix_ids: bool = False, **extra: Any
) -> Bundle:
    """Write a tiny bundle whose pruned and dense graph keep their weights in `model.onnx.data`."""
    graphs = {}
    with BundleWriter(out) as writer:
        for name, scale in (("model", 1.0), ("dense", 2.0)):
            model = tiny_model(batch, kept=kept, scale=scale, prefix_ids=prefix_ids)
            graphs[name] = graph_info(model, f"{name}.onnx")
            onnx.save(
                model,
                str(writer.path / f"{name}.onnx"),
                save_as_external_data=True,
                location=f"{name}.onnx.data",
                size_threshold=64,  # the weights; ONNX Runtime wants shapes inside the graph
                convert_attribute=False,
            )
        return writer.finish(manifest_fields(graphs, batch, **extra))
