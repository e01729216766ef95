"""The emitted graph is well formed in every opset and agrees with the torch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import get_model_config
from tests.helpers.lowering import (
    Lowered,
    lowered,
    noise,
    random_model,
    reference,
    relative_error,
    run_onnx,
    small,
    stages_of,
)

TARGETS = ["onnx", "ort-cpu"]
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "dense": ("dense", {}),
    "dynamicvit": ("dynamicvit", {}),
    "evit fused": ("evit", {}),
    "evit unfused": ("evit", {"fuse": "false"}),
    "random": ("random", {}),
}
PRUNING = [m for m in METHODS if m != "dense"]
MAIN_METHODS = ["dynamicvit", "evit fused"]


def digits(depth: int = 3) -> ViTConfig:
    """Return the shipped digits model, shorter."""
    return get_model_config("vit_digits", depth=depth)


def made(
    folder: Path, method: str, target: str, config: ViTConfig | None = None, **options: Any
) -> tuple[Lowered, Any]:
    config = config or digits()
    name, settings = METHODS[method]
    model = random_model(config, stages_of(config, name, 0.6, "1", **settings))
    return lowered(model, folder, target=target, **options), model


def assert_agrees(graph: Lowered, model: Any, sizes: tuple[int, ...] = (1,)) -> None:
    for size in sizes:
        images = noise(model.config, size, seed=10 + size)
        ours, theirs = graph.run(images), reference(model, images)
        assert relative_error(ours["logits"], theirs["logits"]) <= 1e-5
        for s, stage in enumerate(model.stages):
            np.testing.assert_array_equal(ours[f"kept_indices_{s}"], theirs[f"kept_indices_{s}"])
            assert ours[f"kept_indices_{s}"].dtype == np.int32
            assert ours["kept_counts"][:, s].tolist() == [stage.counts.kept] * size


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_graph_agrees_with_torch_at_any_batch(tmp_path: Path, method: str, target: str) -> None:
    graph, model = made(tmp_path, method, target, batch=(1, 4))
    assert_agrees(graph, model, (1, 2, 4))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", PRUNING)
def test_graph_with_plugin_nodes_agrees_with_torch(tmp_path: Path, method: str, target: str) -> None:
    graph, model = made(tmp_path, method, target, small(), batch=(2, 2), selection="plugin")
    assert_agrees(graph, model, (2,))
    ours = {op for op in graph.ops() if op.startswith("edgeprune.")}
    assert ours == (set() if method == "random" else ours | {"edgeprune.TopKGather"})
    onnx.checker.check_model(str(graph.path))


@pytest.mark.parametrize(("target", "method"), [("onnx", "evit fused"), ("ort-cpu", "dynamicvit")])
@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21])
def test_graph_agrees_with_torch_in_every_opset(tmp_path: Path, opset: int, method: str, target: str) -> None:
    graph, model = made(tmp_path, method, target, small(depth=2), opset=opset)
    assert_agrees(graph, model)
    assert {o.domain: o.version for o in graph.model.opset_import}[""] == opset


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "fields",
    [
        {"distilled": True},
        {"reg_tokens": 4, "no_embed_class": True, "global_pool": "avg", "fc_norm": True, "class_token": False},
        {"layer_scale": True, "qkv_bias": False},
        {"image_size": (48, 32), "patch_size": (16, 8), "in_chans": 1, "num_heads": 4, "mlp_ratio": 2.5},
        {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True},
    ],
    ids=["distilled", "registers, average pooling", "layer scale", "oblong, grey", "average over the prefix too"],
)
def test_graph_of_another_architecture_agrees_with_torch(tmp_path: Path, fields: dict[str, Any], target: str) -> None:
    graph, model = made(tmp_path, "dynamicvit", target, small(depth=2, **fields), batch=(2, 2))
    assert_agrees(graph, model, (2,))


@pytest.mark.parametrize("target", TARGETS)
def test_image_alone_gives_what_it_gives_in_a_batch(tmp_path: Path, target: str) -> None:
    graph, model = made(tmp_path, "evit fused", target, batch=(1, 4))
    images = noise(model.config, 4)
    together = graph.run(images)
    for i in range(4):
        alone = graph.run(images[i : i + 1])
        np.testing.assert_allclose(alone["logits"][0], together["logits"][i], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(alone["kept_indices_0"][0], together["kept_indices_0"][i])


# ------------------------------------------------------------------------------------------------ inputs and outputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("batch", "first"), [((1, 1), 1), ((3, 3), 3), ((1, 4), "batch")])
def test_inputs_and_outputs_are_declared(tmp_path: Path, target: str, batch: tuple[int, int], first: int | str) -> None:
    graph, model = made(tmp_path, "evit fused", target, small(), batch=batch)

    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]

    K = model.stages[0].counts.kept
    assert {v.name: shape(v) for v in graph.model.graph.input} == {"images": [first, 3, 32, 32]}
    assert {v.name: shape(v) for v in graph.model.graph.output} == {
        "logits": [first, 5],
        "kept_indices_0": [first, K],
        "kept_counts": [first, 1],
    }


@pytest.mark.parametrize("method", PRUNING)
def test_token_outputs_are_absent_unless_asked_for(tmp_path: Path, method: str) -> None:
    graph, _ = made(tmp_path, method, "ort-cpu", small(), token_outputs=False)
    assert [v.name for v in graph.model.graph.output] == ["logits"]


def test_dense_graph_has_no_token_outputs(tmp_path: Path) -> None:
    graph, _ = made(tmp_path, "dense", "ort-cpu", small(), token_outputs=True)
    assert [v.name for v in graph.model.graph.output] == ["logits"]


# ------------------------------------------------------------------------------------------------ portable form


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21])
@pytest.mark.parametrize("method", METHODS)
def test_portable_graph_passes_the_full_check(tmp_path: Path, method: str, opset: int) -> None:
    graph, _ = made(tmp_path, method, "onnx", small(depth=2), opset=opset, batch=(1, 4))
    onnx.checker.check_model(str(graph.path), full_check=True)
    assert {node.domain for node in graph.model.graph.node} <= {"", "ai.onnx"}
    assert not graph.model.functions
    assert {o.domain for o in graph.model.opset_import} <= {"", "ai.onnx"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(2, 2), (1, 4)], ids=["fixed", "dynamic"])
def test_declared_shapes_are_those_onnx_infers(tmp_path: Path, method: str, batch: tuple[int, int]) -> None:
    graph, _ = made(tmp_path, method, "onnx", small(depth=2), batch=batch)

    def declared(model: onnx.ModelProto) -> dict[str, tuple[int, list[int]]]:
        """Return element type and dimensions, 0 for what is not a number."""
        return {
            v.name: (v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in model.graph.value_info
        }

    ours = declared(graph.model)
    bare = onnx.ModelProto()
    bare.CopyFrom(graph.model)
    del bare.graph.value_info[:]
    inferred = declared(onnx.shape_inference.infer_shapes(bare, data_prop=True, strict_mode=True))
    assert len(ours.keys() & inferred.keys()) > 50
    for name in ours.keys() & inferred.keys():
        (our_type, our_dims), (type_, dims) = ours[name], inferred[name]
        assert our_type == type_, name
        assert len(our_dims) == len(dims), name
        assert all(a == b or 0 in (a, b) for a, b in zip(our_dims, dims, strict=True)), (name, our_dims, dims)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_declared_shapes_are_those_onnx_runtime_computes(tmp_path: Path, method: str, target: str) -> None:
    graph, model = made(tmp_path, method, target, small(depth=2), batch=(1, 4))
    open_up = onnx.load(str(graph.path))  # with its weights, every intermediate value made an output
    known = {v.name: v for v in open_up.graph.value_info if v.type.tensor_type.HasField("shape")}
    outputs = {v.name for v in open_up.graph.output}
    open_up.graph.output.extend(v for name, v in known.items() if name not in outputs)
    values = run_onnx(open_up.SerializeToString(), {"images": noise(model.config, 3)})
    assert len(known) > 40
    for name, info in known.items():
        dims = info.type.tensor_type.shape.dim
        shape = values[name].shape
        assert len(shape) == len(dims), name
        for size, dim in zip(shape, dims, strict=True):
            if dim.dim_param == "batch":
                assert size == 3, (name, shape)
            elif dim.HasField("dim_value"):
                assert size == dim.dim_value, (name, shape)


def test_every_node_has_a_name_of_its_own(tmp_path: Path) -> None:
    for target in TARGETS:
        graph, _ = made(tmp_path, "evit fused", target, small())
        names = [node.name for node in graph.model.graph.node]
        assert len(set(names)) == len(names) and all(names)
        assert {"blocks.1.attn.q", "blocks.1.select.q_cls", "blocks.2.mlp.fc1", "head.logits"} <= set(names)


# ------------------------------------------------------------------------------------------------ dialects


def test_cpu_dialect_has_the_measured_form(tmp_path: Path) -> None:
    graph, _ = made(tmp_path, "evit fused", "ort-cpu", small())
    ops = graph.ops()
    assert {"Gemm", "LayerNormalization", "Add", "com.microsoft.MultiHeadAttention", "com.microsoft.Gelu"} <= ops
    assert not {"com.microsoft.SkipLayerNormalization", "com.microsoft.Attention", "Erf"} & ops
    gemms = [n.name for n in graph.model.graph.node if n.op_type == "Gemm"]
    assert {f"blocks.0.attn.{w}" for w in "qkv"} <= set(gemms)


def test_fixed_batch_gathers_whole_rows_on_cpu(tmp_path: Path) -> None:
    fixed, _ = made(tmp_path / "fixed", "dynamicvit", "ort-cpu", small(), batch=(2, 2), token_outputs=False)
    dynamic, _ = made(tmp_path / "dynamic", "dynamicvit", "ort-cpu", small(), batch=(1, 2), token_outputs=False)
    assert "GatherND" not in fixed.ops()
    assert "GatherND" in dynamic.ops()


def test_k_of_top_k_is_the_count_of_the_schedule(tmp_path: Path) -> None:
    for target in TARGETS:
        graph, model = made(tmp_path, "dynamicvit", target, small())
        constants = {
            t.name: onnx.numpy_helper.to_array(t) for t in graph.model.graph.initializer if not t.external_data
        }
        found = [constants[n.input[1]].tolist() for n in graph.model.graph.node if n.op_type == "TopK"]
        assert found == [[s.counts.kept] for s in model.stages]


# ------------------------------------------------------------------------------------------------ second engine


@pytest.mark.parametrize("method", MAIN_METHODS)
def test_second_engine_gives_the_same_logits(tmp_path: Path, method: str) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'edgeprune[dev]'")
    graph, model = made(tmp_path, method, "onnx", batch=(2, 2))
    core = openvino.Core()
    properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(graph.path)), "CPU", properties)
    images = noise(model.config, 2)
    theirs = compiled(images)
    ours = graph.run(images)
    assert relative_error(theirs[compiled.output("logits")], ours["logits"]) <= 1e-4
    for b in range(2):
        kept = theirs[compiled.output("kept_indices_0")][b]
        assert set(kept.tolist()) == set(ours["kept_indices_0"][b].tolist())
