"""Quantized graphs for TensorRT: what is quantized, and that they compute what kernels on 8-bit numbers do."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from edgeprune.checks.compare import compare, draw_images, failures, passes
from edgeprune.data.digits import DigitsSet, DigitsStream
from edgeprune.errors import InternalError
from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.dialects.qdq import TYPES, QdqDialect, quantize_rows
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.emulate import element_types, emulated, open_emulated
from edgeprune.export.lint.facts import Facts
from edgeprune.export.ops import DOMAIN
from edgeprune.export.passes.assign_types import assign_types
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import Counts, build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.writer import WeightStore, write_graph
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization.scheme import SMALLEST_SCALE, Precision, Quantization, signed_scale
from edgeprune.runtime.manifest import ParityInfo, PreprocessInfo
from edgeprune.runtime.ort import OrtBackend
from tests.helpers import adaptive
from tests.helpers.lowering import lowered, noise, random_model, small, stages_of
from tests.helpers.quantized import made_up, measured
from tests.unit.training.test_shipped_checkpoints import RECORDS, build, record_of

PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")
STORED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
LAYER = "blocks.0.mlp.fc1"


def make(name: str, **options: str) -> PrunedViT:
    if name in adaptive.METHODS:
        return adaptive.model_of(name)
    config = small(depth=3)
    return random_model(config, stages_of(config, name, 0.6, "1,2", **options) if name != "dense" else ())


def nodes_of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


# ------------------------------------------------------------------------------------------------ one layer


def one_layer(folder: Path, precision: Precision, weight: np.ndarray, bias: np.ndarray, reach: float) -> Path:
    """Write the graph of a quantized layer on x [1, 16, in]."""
    quantization = Quantization(precision, "static", frozenset({LAYER}), {LAYER: (-reach, reach / 2)})
    g = GraphBuilder("layer", 19, {}, batch=1)
    x = gs.Variable("x", np.float32, [1, 16, weight.shape[1]])
    y = QdqDialect("fp16", quantization).linear(g, "fc", x, weight, bias, LAYER)
    assert isinstance(y, gs.Variable)
    y.name = "y"
    graph = assign_types(g.graph([x], [y]), "fp16", g.precise_nodes)
    with WeightStore(folder / "layer.onnx.data") as store:
        write_graph(graph, folder / "layer.onnx", store, ir_version=9)
    return folder / "layer.onnx"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reach", [4.5, 1.0], ids=["covers", "clips"])
def test_layer_is_the_product_of_8_bit_numbers_scaled_afterwards(
    tmp_path: Path, precision: Precision, reach: float
) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((48, 384)) * rng.uniform(0.01, 0.2, (48, 1))).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32)
    x = rng.standard_normal((1, 16, 384)).astype(np.float32)
    path = one_layer(tmp_path, precision, weight, bias, reach)
    (ours,) = open_emulated(path, threads=1).run({"x": x}).values()

    scale = np.float32(np.float16(signed_scale((-reach, reach / 2), precision)))
    scaled = x.astype(np.float16).astype(np.float32) / scale
    numbers = np.clip(np.rint(scaled), -128, 127) if precision == "int8" else np.clip(scaled, -448, 448)
    numbers = numbers.astype(TYPES[precision]).astype(np.float64)
    weights, scales = quantize_rows(weight, TYPES[precision], np.dtype(np.float16))
    product = numbers @ weights.astype(np.float64).T * (np.float64(scale) * scales)
    theirs = (product.astype(np.float16).astype(np.float32) + bias.astype(np.float16)).astype(np.float16)
    differs = ours != theirs.astype(np.float32)
    assert differs.mean() < 0.01  # a product on the edge between two float16 numbers
    assert np.abs(ours - theirs.astype(np.float32)).max() <= 2.0**-10 * np.abs(theirs).max()
    if reach > 1:  # and near the product of real numbers
        assert np.abs(ours - (x @ weight.T + bias)).max() < (0.02 if precision == "int8" else 0.06) * np.abs(ours).max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_quantized_by_the_scale_that_is_stored(precision: Precision) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) * np.logspace(-6, 1, 64)[:, None]
    values, scale = quantize_rows(weight.astype(np.float32), TYPES[precision], np.dtype(np.float16))
    assert values.dtype == TYPES[precision] and values.shape == weight.shape
    assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert (scale >= SMALLEST_SCALE).all()
    error = np.abs(values.astype(np.float32) * scale[:, None] - weight)
    half_step = scale[:, None] * (
        0.5 if precision == "int8" else np.maximum(np.abs(values.astype(np.float32)), 2**-5) / 16
    )
    assert (error <= half_step * 1.15).all()  # the greatest weight may lie a little beyond a scale that was rounded


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_multiplies_no_integers_and_rewrites_nothing_into_such(
    tmp_path: Path, precision: Precision
) -> None:
    path = lowered(
        make("evit"), tmp_path, target=f"trt-{precision}", quantization=made_up(small(depth=3), precision)
    ).path
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    proto = emulated(onnx.load(path, load_external_data=False)).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert {"FusedMatMul", "MatMul"} & found
    assert not [op for op in found if "Integer" in op or "NBits" in op or "QLinear" in op or op == "QGemm"]


# ------------------------------------------------------------------------------------------------ what is quantized


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_quantized_once_per_tensor_and_stored_so(tmp_path: Path, precision: Precision) -> None:
    model = make("dense")
    config = model.config
    graph = lowered(model, tmp_path, target=f"trt-{precision}", batch=(1, 4), quantization=made_up(config, precision))
    onnx.checker.check_model(str(graph.path), full_check=True)
    facts = Facts(graph.model)
    layers = [node for node in nodes_of(graph.model, "MatMul") if ".attn." in node.name or ".mlp." in node.name]
    quantized = [n for n in layers if facts.producers.get(n.input[1], n).op_type == "DequantizeLinear"]
    # the last block computes the class token alone, without keys and values
    assert len(quantized) == 6 * config.depth - 2
    for node in quantized:
        assert [facts.producers[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
        weight = facts.initializers[facts.producers[node.input[1]].input[0]]
        assert weight.data_type == STORED[precision]
        assert facts.types[node.output[0]] == "float16"
        assert all(facts.types[facts.producers[name].input[1]] == "float16" for name in node.input)
    first = {node.input[0] for node in quantized if node.name in [f"blocks.0.attn.{part}" for part in "qkv"]}
    assert len(first) == 1
    external = [t for t in graph.model.graph.initializer if t.data_type == STORED[precision] and t.external_data]
    stored = onnx.load(graph.path)
    arrays = {t.name: numpy_helper.to_array(t) for t in stored.graph.initializer}
    assert external
    for tensor in external:
        offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
        assert offset % 4096 == 0 and arrays[tensor.name].dtype == TYPES[precision]


def test_attention_predictor_embedding_head_and_what_is_not_named_stay_float16(tmp_path: Path) -> None:
    model = make("dynamicvit")
    whole = made_up(model.config)
    some = Quantization("int8", "static", whole.layers - {"blocks.0.mlp.fc1"}, whole.ranges)
    graph = lowered(model, tmp_path, target="trt-int8", batch=(1, 4), quantization=some)
    facts = Facts(graph.model)
    floats = {
        node.name
        for node in nodes_of(graph.model, "MatMul")
        if all(facts.producers.get(name, node).op_type != "DequantizeLinear" for name in node.input)
    }
    assert "blocks.0.mlp.fc1" in floats and "blocks.1.mlp.fc1" not in floats
    assert {name for name in floats if name.endswith((".logits", ".context"))}
    assert {name for name in floats if name.startswith("select.")}
    assert "head.logits" in floats
    assert all(node.name.startswith("blocks.") for node in nodes_of(graph.model, "QuantizeLinear"))


def test_product_of_one_row_stays_float16(tmp_path: Path) -> None:
    model = make("dense")
    graph = lowered(model, tmp_path, target="trt-int8", batch=(1, 1), quantization=made_up(model.config))
    assert not [node.name for node in nodes_of(graph.model, "QuantizeLinear") if node.name.startswith("blocks.2.")]
    assert len(nodes_of(graph.model, "QuantizeLinear")) == 4 * (model.config.depth - 1)


def test_layer_without_a_range_is_an_error(tmp_path: Path) -> None:
    model = make("dense")
    whole = made_up(model.config)
    ranges = {name: bounds for name, bounds in whole.ranges.items() if name != "blocks.1.attn.proj"}
    with pytest.raises(InternalError, match=r"blocks\.1\.attn\.proj") as caught:
        lowered(model, tmp_path, target="trt-int8", quantization=Quantization("int8", "static", whole.layers, ranges))
    assert caught.value.code == "quantization-range"


# ------------------------------------------------------------------------------------------------ selection

GATHERED = {
    "ats paper": 2,
    "asvit": 2,
    "sait mass": 1,
    "evit, no fused token": 2,
    "evit": 0,
    "dynamicvit": 0,
    "tome": 0,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GATHERED)
def test_plugin_moves_8_bit_numbers_where_those_are_read_and_computes_the_same(
    tmp_path: Path, name: str, precision: Precision
) -> None:
    model = make("evit", fuse="false") if name == "evit, no fused token" else make(name)
    options: dict[str, Any] = {"target": f"trt-{precision}", "batch": (1, 4)}
    options["quantization"] = measured(model, noise(model.config, 4, seed=3), precision)
    graphs = {s: lowered(model, tmp_path / s, selection=s, **options) for s in ("native", "plugin")}
    ours = {s: open_emulated(g.path, threads=1).run({"images": noise(model.config, 4)}) for s, g in graphs.items()}
    for output, values in ours["native"].items():
        assert np.array_equal(values, ours["plugin"][output]), output
    plugin = graphs["plugin"].model
    types, facts = element_types(plugin), Facts(plugin)
    moved = Counter(types[n.output[0]] for n in plugin.graph.node if n.domain == DOMAIN)
    assert moved[STORED[precision]] == GATHERED[name]
    for node in (n for n in plugin.graph.node if n.domain == DOMAIN and types[n.output[0]] == STORED[precision]):
        assert facts.producers[node.input[0]].op_type == "QuantizeLinear"
        assert {reader.op_type for reader in facts.readers[node.output[0]]} == {"DequantizeLinear"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("selection", ["native", "plugin"])
@pytest.mark.parametrize("name", ["ats paper", "asvit", "sait mass"])
def test_stem_and_rest_pass_no_8_bit_numbers_and_compute_the_same(
    tmp_path: Path, name: str, selection: str, precision: Precision
) -> None:
    model = make(name)
    quantization = measured(model, noise(model.config, 4, seed=3), precision)
    options: dict[str, Any] = {"selection": selection, "quantization": quantization}
    target = TARGETS[f"trt-{precision}"]
    whole = lowered(model, tmp_path / "whole", target=target.name, batch=(2, 2), **options)
    plan = build_plan(model.config, model.stages, batch=(2, 2), token_outputs=True, counts=Counts.SLOTS, split=True)
    for plan_pass in PLAN_PASSES:
        plan = plan_pass(plan)
    paths = [tmp_path / "stem.onnx", tmp_path / "rest.onnx"]
    with WeightStore(tmp_path / "model.onnx.data") as store:
        lower(plan, weight_arrays(model), target, paths, store, opset=target.opset, **options)
    stem, rest = (open_emulated(path, threads=1) for path in paths)
    assert {tensor.dtype for tensor in rest.inputs} <= {"float32", "float16", "int32", "int64", "bool"}
    images = noise(model.config, 2)
    handed = {"images": images, **stem.run({"images": images})}
    ours = rest.run({tensor.name: handed[tensor.name] for tensor in rest.inputs})
    theirs = open_emulated(whole.path, threads=1).run({"images": images})
    assert {"logits", "kept_indices_0"} <= ours.keys() & theirs.keys()
    for output in ours.keys() & theirs.keys():
        assert np.array_equal(ours[output], theirs[output]), output


# ------------------------------------------------------------------------------------------------ trained weights


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return calibration images and others, the model's inputs."""
    config = build(record_of(RECORDS[0])).config
    info = PreprocessInfo(
        image_size=config.image_size, mean=config.mean, std=config.std, crop_pct=1.0, interpolation="bicubic"
    )
    calibration, _ = DigitsStream().batch(0, 64, info, epoch=0, seed=1)
    ((images, _),) = DigitsSet(limit=64).batches(64, info)
    return calibration, images


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_trained_network_answers_alike_in_8_bits(
    tmp_path: Path, path: Path, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images of its task: a static quantization holds for those it was calibrated with, and not for noise."""
    calibration, images = digits
    draws = count()
    monkeypatch.setattr(
        "edgeprune.checks.compare.draw_images", lambda shape, n, rng: np.roll(images, -n * next(draws), axis=0)[:n]
    )
    model = build(record_of(path)).eval()
    for precision in PRECISIONS:
        quantization = measured(model, calibration, precision)
        graph = lowered(model, tmp_path / precision, target=f"trt-{precision}", batch=(1, 8), quantization=quantization)
        backend = open_emulated(graph.path, threads=1)

        def run(group: np.ndarray, backend: OrtBackend = backend) -> dict[str, np.ndarray]:
            return backend.run({"images": group})

        parity = compare(run, model, batch=(1, 8), images=24, precision=precision)
        assert failures(parity, precision) == []
        assert parity.top1_agreement >= 0.95


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", ["blocks.1.mlp.fc1", "blocks.2.attn.proj", "blocks.3.attn.qkv"])
def test_layer_scaled_wrongly_does_not_pass(tmp_path: Path, precision: Precision, layer: str) -> None:
    """On images that are unlike what it was trained on, where classes are not far apart."""
    (path,) = (one for one in RECORDS if one.stem.endswith("dense"))
    model = build(record_of(path)).eval()
    images = draw_images((3, *model.config.image_size), 64, np.random.default_rng(0))
    quantization = measured(model, images, precision)
    graph = lowered(model, tmp_path, target=f"trt-{precision}", batch=(1, 8), quantization=quantization)
    assert passes(compared(graph.path, model, precision), precision)
    wrong = onnx.load(graph.path, load_external_data=False)
    scale = next(t for t in wrong.graph.initializer if t.name == f"{layer}.input.scale.fp16")
    double = numpy_helper.from_array(np.float16(2) * numpy_helper.to_array(scale), "double")
    wrong.graph.initializer.append(double)
    for node in nodes_of(wrong, "DequantizeLinear"):
        if node.input[1] == scale.name:
            node.input[1] = double.name
    graph.path.write_bytes(wrong.SerializeToString())
    assert failures(compared(graph.path, model, precision), precision)


def compared(path: Path, model: PrunedViT, precision: Precision) -> ParityInfo:
    backend = open_emulated(path, threads=1)
    return compare(lambda images: backend.run({"images": images}), model, batch=(1, 8), images=16, precision=precision)
