"""The float form of an integer graph: the network of the quantized weights, without quantized inputs, as Gemm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeprune.export.float_twin import float_twin, open_float_twin
from edgeprune.quantization import linear_layers
from edgeprune.quantization.scheme import Scheme, quantize_weight
from edgeprune.runtime.kernels import linear_layer, profile_nodes
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
from tests.helpers.quantized import measured

MODEL = random_model(small(depth=3, qkv_bias=False), stages_of(small(depth=3), "evit", 0.6, "1"))
LAYERS = linear_layers(MODEL.config)
KEPT = "blocks.1.mlp.fc1"


def graph(folder: Path, scheme: Scheme = "dynamic", batch: tuple[int, int] = (1, 3)) -> Lowered:
    quantization = replace(measured(MODEL, noise(MODEL.config, 4)), scheme=scheme, weight_bits=7)
    quantization = replace(quantization, layers=quantization.layers - {KEPT})
    return lowered(MODEL, folder, target="ort-cpu-int8", batch=batch, quantization=quantization, passes=())


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_twin_is_the_float_network_of_the_quantized_weights(tmp_path: Path, scheme: Scheme) -> None:
    made = graph(tmp_path, scheme)
    twin, images = open_float_twin(made.path, threads=1, spinning=False), noise(MODEL.config, 3)
    rounded = random_model(MODEL.config, MODEL.stages)
    state = rounded.state_dict()
    for layer in set(LAYERS) - {KEPT}:
        held, scales = quantize_weight(state[f"{layer}.weight"].numpy(), 7)
        state[f"{layer}.weight"] = torch.from_numpy(held * scales[:, None])
    rounded.load_state_dict(state)
    found, integers, expected = twin.run({"images": images}), made.run(images), reference(rounded, images)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in integers.items()}
    assert relative_error(found["logits"], expected["logits"]) < 1e-5
    assert relative_error(found["logits"], reference(MODEL, images)["logits"]) < 0.1
    assert np.array_equal(found["kept_indices_0"], expected["kept_indices_0"])


def test_linear_layers_of_the_twin_run_as_gemm_and_nothing_is_widened_at_run_time(tmp_path: Path) -> None:
    made = graph(tmp_path)
    nodes = profile_nodes(partial(open_float_twin, made.path, threads=1), {"images": noise(MODEL.config)}, runs=2)
    linear = {node.name: node.op for node in nodes if linear_layer(node.name)}
    assert len(linear) == 3 * 6 and set(linear.values()) == {"Gemm"}
    left = [node.name for node in nodes if ".weight." in node.name or "quantized" in node.name]
    assert left == []


def test_twin_leaves_the_file_and_its_weights_alone(tmp_path: Path) -> None:
    path = graph(tmp_path).path
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = onnx.load(path, load_external_data=False)
    twin = float_twin(model)
    assert model == onnx.load(path, load_external_data=False)
    assert list(twin.graph.initializer) == list(model.graph.initializer)
    ops = [node.op_type for node in twin.graph.node]
    assert not {"MatMulIntegerToFloat", "DynamicQuantizeLinear", "QuantizeLinear"} & set(ops)
    open_float_twin(path, threads=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_graph_without_integers_is_its_own_twin(tmp_path: Path) -> None:
    made = lowered(MODEL, tmp_path, target="ort-cpu")
    (tmp_path / "twin.onnx").write_bytes(float_twin(made.model).SerializeToString())
    images = noise(MODEL.config)
    assert np.array_equal(run_onnx(tmp_path / "twin.onnx", {"images": images})["logits"], made.run(images)["logits"])
