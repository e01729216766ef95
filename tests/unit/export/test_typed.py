"""Typed graphs: the same function in float32, types where they belong, rounding that can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import BuildError
from edgeprune.export.emulate import element_types, emulated, open_emulated
from edgeprune.export.ops import DOMAIN
from edgeprune.export.passes.assign_types import COMPARES, assign_types, low_type
from edgeprune.pruning.model import PrunedViT
from tests.helpers.adaptive import METHODS, model_of
from tests.helpers.lowering import (
    lowered,
    noise,
    random_model,
    reference,
    relative_error,
    run_onnx,
    small,
    stages_of,
)

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ALL = ("dense", "dynamicvit", "evit", *(name for name in METHODS if "batch mean" not in name))
TYPED = [("trt-fp16", "fp16"), ("trt-bf16", "bf16"), ("ort-cuda-fp16", "fp16")]


def make(name: str) -> PrunedViT:
    if name in METHODS:
        return model_of(name)
    config = small(depth=3)
    return random_model(config, stages_of(config, name, 0.6, "1,2") if name != "dense" else ())


def same_sets(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> np.ndarray:
    """Return which images keep the same tokens in both."""
    names = [name for name in theirs if name.startswith("kept_indices")]
    rows = range(len(theirs["logits"]))
    return np.array([all(set(ours[n][i]) == set(theirs[n][i]) for n in names) for i in rows])


@pytest.mark.parametrize("selection", ["native", "plugin"])
@pytest.mark.parametrize("name", ALL)
def test_float32_graph_for_tensorrt_is_what_torch_computes(name: str, selection: str, tmp_path: Path) -> None:
    model = make(name)
    graph = lowered(model, tmp_path, target="trt-fp32", batch=(1, 3), selection=selection)
    backend = open_emulated(graph.path, threads=1)
    for batch in (1, 3):
        images = noise(model.config, batch, seed=batch)
        ours, theirs = backend.run({"images": images}), reference(model, images)
        assert same_sets(ours, theirs).all()
        assert relative_error(ours["logits"], theirs["logits"]) < 1e-4


@pytest.mark.parametrize(("target", "precision"), TYPED)
@pytest.mark.parametrize("name", ALL)
def test_types_are_consistent_and_scores_stay_float32(name: str, target: str, precision: str, tmp_path: Path) -> None:
    model = lowered(make(name), tmp_path, target=target, batch=(1, 3)).model
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    types = element_types(model)
    for node in compared(model):
        assert {types[i] for i in node.input[:1]} <= {TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64}, (
            node.name
        )
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and "blocks" in node.name]
    layers = [node for node in products if any(f".{part}" in node.name for part in ("attn.", "mlp."))]
    assert layers and all(types[node.output[0]] == LOW[precision] for node in layers)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} <= {
        TensorProto.FLOAT, TensorProto.INT32,
    }  # fmt: skip


def compared(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from (node for node in model.graph.node if node.op_type in COMPARES)


@pytest.mark.parametrize(("target", "precision"), TYPED)
@pytest.mark.parametrize("name", ["dense", "dynamicvit", "evit", "ats official", "sait mass", "cropr", "tome"])
def test_typed_graph_rounds_and_is_near(name: str, target: str, precision: str, tmp_path: Path) -> None:
    model = make(name)
    backend = open_emulated(lowered(model, tmp_path, target=target, batch=(1, 8)).path, threads=1)
    images = noise(model.config, 8)
    ours, theirs = backend.run({"images": images}), reference(model, images)
    same = same_sets(ours, theirs)
    assert same.any()
    error = relative_error(ours["logits"][same], theirs["logits"][same])
    unit = 2.0 ** -(10 if precision == "fp16" else 7)
    assert unit / 64 < error < 16 * unit  # rounds, but not more than a few dozen roundings can


def test_weights_of_a_typed_graph_take_half_the_room(tmp_path: Path) -> None:
    model = make("dense")
    sizes = {t: lowered(model, tmp_path / t, target=t).model for t in ("trt-fp32", "trt-fp16")}
    stored = {t: sum(_bytes(i) for i in m.graph.initializer) for t, m in sizes.items()}
    assert stored["trt-fp16"] < 0.6 * stored["trt-fp32"]


def _bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims)) * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def test_plugin_graph_has_no_bodies_and_moves_low_tokens(tmp_path: Path) -> None:
    model = lowered(make("evit"), tmp_path, target="trt-fp16", selection="plugin").model
    assert not model.functions
    types = element_types(model)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {"TopKGather", "GatherTokens"}
    for node in nodes:
        tokens = node.input[1 if node.op_type == "TopKGather" else 0]
        assert types[tokens] == TensorProto.FLOAT16
    assert all(types[n.input[0]] == TensorProto.FLOAT for n in nodes if n.op_type == "TopKGather")


@pytest.mark.parametrize("name", ["ats official", "sait mass"])
def test_no_running_sum_and_no_isnan_reaches_tensorrt(name: str, tmp_path: Path) -> None:
    assert not {"CumSum", "IsNaN"} & lowered(make(name), tmp_path, target="trt-fp16").ops()
    assert "CumSum" in lowered(make(name), tmp_path / "portable", target="onnx").ops()


def test_weight_beyond_float16_is_refused_with_its_name(tmp_path: Path) -> None:
    model = make("dense")
    model.blocks[1].mlp.fc1.weight.data[3, 5] = 1e5
    with pytest.raises(BuildError, match=r"blocks\.1\.mlp\.fc1") as caught:
        lowered(model, tmp_path, target="trt-fp16")
    assert (caught.value.code, caught.value.exit_code) == ("overflow", 4)
    assert "bf16" in str(caught.value.hint)
    lowered(model, tmp_path, target="trt-bf16")


def chain(*nodes: onnx.NodeProto, to: int) -> onnx.ModelProto:
    """Return a model x [4] float -> y [4] float whose tensors between are of a low type."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["low"], to=to), *nodes, helper.make_node("Cast", ["z"], ["y"], to=1)],
        "chain", [value("x", 1, [4])], [value("y", 1, [4])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("precision", LOW)
def test_emulation_rounds_after_every_operator(precision: str) -> None:
    """1 + 2^-k is lost in a low type when 1 is added first: the chain (x + 2048) - 2048 shows each rounding."""
    big = 2048.0
    kind = LOW[precision]
    low = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    constant = numpy_helper.from_array(np.array(big, low), "big")
    model = chain(
        helper.make_node("Add", ["low", "big"], ["sum"]), helper.make_node("Sub", ["sum", "big"], ["z"]), to=kind
    )
    model.graph.initializer.append(constant)
    x = np.array([0.3, 1.7, 3.2, 100.3], np.float32)
    found = run_onnx(emulated(model).SerializeToString(), {"x": x})["y"]
    step = (x.astype(low).astype(np.float32) + np.float32(big)).astype(low).astype(np.float32) - np.float32(big)
    np.testing.assert_array_equal(found, step.astype(low).astype(np.float32))
    assert np.abs(found - x).max() > 0.2


def test_float32_is_left_as_it_is() -> None:
    x = gs.Variable("x", np.float32, [2])
    y = gs.Variable("y", np.float32, [2])
    graph = gs.Graph(nodes=[gs.Node("Relu", "relu", {}, [x], [y])], inputs=[x], outputs=[y])
    assert assign_types(graph, "fp32", ()) is graph
    assert [node.op for node in graph.nodes] == ["Relu"] and low_type("fp32") is None


def test_outputs_keep_their_names_and_types() -> None:
    x: Any = gs.Variable("x", np.float32, [2])
    y: Any = gs.Variable("y", np.float32, [2])
    graph = gs.Graph(nodes=[gs.Node("Relu", "relu", {}, [x], [y])], inputs=[x], outputs=[y])
    assign_types(graph, "fp16", ())
    assert [(node.op, node.outputs[0].dtype) for node in graph.nodes] == [
        ("Cast", np.float16), ("Relu", np.float16), ("Cast", np.float32),
    ]  # fmt: skip
    assert [(t.name, t.dtype) for t in graph.outputs] == [("y", np.float32)]
