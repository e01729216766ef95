"""Manifests and bundles for TensorRT: small, written by hand, with graphs that stand for exported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.runtime.bundle import Bundle, BundleWriter
from edgeprune.runtime.manifest import Manifest
from tests.helpers.bundles import WEIGHTS, graph_info, manifest_fields, tiny_model

ZEROS = "0" * 64
STAGES = [
    {"index": i, "block": 3 * i + 3, "where": "before", "tokens_in": 16, "kept": kept, "fused": 0, "adaptive": True}
    for i, kept in enumerate((16, 12))
]
BUCKETS = ((8, 6), (12, 8), (16, 12))
SHARES = (0.5, 0.3, 0.2)


def tensor(name: str, *shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def described(name: str, batch: int, **extra: Any) -> dict[str, Any]:
    """Return a manifest entry of a graph that takes images."""
    return {
        "file": f"{name}.onnx",
        "inputs": [tensor("images", batch, 3, 8, 8)],
        "outputs": [tensor("logits", batch, 4)],
        **extra,
    }


def rest(name: str, batch: int, *, told: bool = False, **extra: Any) -> dict[str, Any]:
    """Return a manifest entry of a graph behind a stem."""
    inputs = [tensor("tokens", batch, 17, 32, dtype="float16"), tensor("token_count", batch, dtype="int32")]
    inputs += [tensor("slots", 2, dtype="int64")] if told else []
    outputs = [tensor("logits", batch, 4), tensor("kept_counts", batch, 2, dtype="int32")]
    return {"file": f"{name}.onnx", "inputs": inputs, "outputs": outputs, **extra}


def engine_manifest(graphs: dict[str, Any], batch: tuple[int, int] = (1, 1), **extra: Any) -> Manifest:
    """Return a manifest for TensorRT whose files are not there."""
    files = {info["file"]: {"sha256": ZEROS, "bytes": 1} for info in graphs.values()}
    fields = {"target": "trt-fp16", "precision": "fp16", **extra}
    return Manifest.model_validate(
        {**manifest_fields(graphs, batch, **fields), "tool_version": "0", "created": "", "files": files}
    )


def bucket_manifest(batch: tuple[int, int] = (1, 2), *, told: str | None = "rest", **extra: Any) -> Manifest:
    """Return a manifest of three buckets, with graphs whose batch is open."""
    names = [f"rest_{bucket[0]}" for bucket in BUCKETS]
    graphs = {"stem": described("stem", -1), "dense": described("dense", -1)}
    graphs |= {name: rest(name, -1) for name in names}
    if told is not None:
        graphs[told] = rest(told, -1, told=True)
    return engine_manifest(
        {**graphs, **extra},
        batch,
        method={"name": "ats", "keep_rate": 1.0, "stages": STAGES},
        adaptive={
            "form": "buckets",
            "told": told,
            "buckets": [
                {"capacities": list(bucket), "graph": name, "share": share}
                for bucket, name, share in zip(BUCKETS, names, SHARES, strict=True)
            ],
        },
    )


def write_for_tensorrt(out: Path, batch: tuple[int, int] = (1, 1), *, plugin: bool = False, **extra: Any) -> Bundle:
    """Write a tiny bundle for trt-fp32 whose graphs share their weights' file.

    Args:
        out: its directory.
        batch: smallest and largest.
        plugin: with a variant of "model" that has a node of the plugin.
        extra: fields of the manifest.
    """
    graphs: dict[str, Any] = {}
    with BundleWriter(out) as writer:
        models = {"model": tiny_model(batch), "dense": tiny_model(batch, kept=False, scale=2.0)}
        if plugin:
            models["model_plugin"] = with_plugin_node(tiny_model(batch, kept=False, scale=3.0))
        for name, model in models.items():
            graphs[name] = graph_info(model, f"{name}.onnx")
            if name == "model_plugin":
                graphs[name] |= {"variant_of": "model", "plugin": True}
            onnx.save(
                model,
                str(writer.path / f"{name}.onnx"),
                save_as_external_data=True,
                location=f"{name}.onnx.data",
                size_threshold=64,  # the weights; ONNX Runtime wants shapes inside the graph
                convert_attribute=False,
            )
        fields = {"target": "trt-fp32", "selection": "auto" if plugin else "native", **extra}
        return writer.finish(manifest_fields(graphs, batch, **fields))


def write_two_buckets(out: Path, batch: tuple[int, int] = (1, 2)) -> Bundle:
    """Write a bundle of a stem, a rest for two and one for four tokens, and a rest that is told."""
    stage = {**STAGES[0], "tokens_in": 4, "kept": 4}
    with BundleWriter(out) as writer:
        models = {"stem": tiny_stem(), "rest_2": tiny_rest(2), "rest_4": tiny_rest(4), "rest": tiny_rest(None)}
        for name, model in models.items():
            onnx.save(model, str(writer.path / f"{name}.onnx"))
        buckets = [{"capacities": [k], "graph": f"rest_{k}", "share": 0.5} for k in (2, 4)]
        return writer.finish(
            manifest_fields(
                {name: graph_info(model, f"{name}.onnx") for name, model in models.items()},
                batch,
                target="trt-fp32",
                method={"name": "ats", "keep_rate": 1.0, "stages": [stage]},
                adaptive={"form": "buckets", "told": "rest", "buckets": buckets},
            )
        )


def tiny_stem() -> onnx.ModelProto:
    """Return images -> the mean colours of four patches as tokens, and how many of them are bright."""
    nodes = [
        helper.make_node("AveragePool", ["images"], ["patches"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Reshape", ["patches", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["tokens"], ["bright"], axes=[2], keepdims=0),
        helper.make_node("Greater", ["bright", "zero"], ["is_bright"]),
        helper.make_node("Cast", ["is_bright"], ["ones"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", ["ones", "axis"], ["token_count"], keepdims=0),
    ]
    initializers = {"flat": _int64([0, 3, 4]), "zero": np.float32(0), "axis": _int64([1])}
    outputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", 4, 3]),
        helper.make_tensor_value_info("token_count", TensorProto.INT32, ["batch"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    return _model(nodes, [images], outputs, initializers)


def tiny_rest(kept: int | None) -> onnx.ModelProto:
    """Return tokens -> logits of the mean of the first few; told how many when `kept` is None."""
    nodes = [
        helper.make_node("Slice", ["tokens", "begin", "slots" if kept is None else "end", "axis"], ["taken"]),
        helper.make_node("ReduceMean", ["taken"], ["features"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["features", "head.weight"], ["logits"]),
        helper.make_node("Unsqueeze", ["token_count", "axis"], ["kept_counts"]),
    ]
    initializers = {"begin": _int64([0]), "axis": _int64([1]), "head.weight": WEIGHTS}
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", 4, 3]),
        helper.make_tensor_value_info("token_count", TensorProto.INT32, ["batch"]),
    ]
    if kept is None:
        inputs.append(helper.make_tensor_value_info("slots", TensorProto.INT64, [1]))
    else:
        initializers["end"] = _int64([kept])
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("kept_counts", TensorProto.INT32, ["batch", 1]),
    ]
    return _model(nodes, inputs, outputs, initializers)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: dict[str, Any]) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def with_plugin_node(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose pooled features pass through a GatherTokens of the plugin, which takes them all."""
    graph = model.graph
    steps = [
        helper.make_node("Flatten", ["pooled"], ["flat_features"]),
        helper.make_node("Unsqueeze", ["flat_features", "one"], ["as_tokens"]),
        helper.make_node("ReduceMean", ["flat_features"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "nothing"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["first"], to=TensorProto.INT32),
        helper.make_node(
            "GatherTokens",
            ["as_tokens", "first"],
            ["gathered"],
            name="select.gather_tokens",
            domain="edgeprune",
            num_prefix_tokens=0,
            plugin_namespace="edgeprune",
            plugin_version="1",
        ),
        helper.make_node("Flatten", ["gathered"], ["features"]),
    ]
    graph.initializer.append(numpy_helper.from_array(_int64([1]), "one"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend([old[0], *steps, *old[2:]])
    model.opset_import.append(helper.make_opsetid("edgeprune", 1))
    return model


def _int64(values: Any) -> np.ndarray:
    return np.array(values, np.int64)
