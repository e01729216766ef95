"""Graphs another tool quantized, ONNX Runtime's quantizer here, become bundles; others are refused with one error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.checks.parity import open_for_checks
from edgeprune.errors import BuildError, EdgepruneError, InputError
from edgeprune.export import ExportRequest, adopt, export_model
from edgeprune.runtime.bundle import load_bundle
from tests.helpers.quantized_elsewhere import digits, quantized_elsewhere

CHECKPOINTS = Path(__file__).resolve().parents[3] / "checkpoints"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = ExportRequest(
        model="vit_digits", method="evit", keep_rate=0.5, stages="0,2,3", target="trt-fp32", selection="auto",
        verify=False, token_outputs=True, checkpoint=str(CHECKPOINTS / "vit_digits_evit.safetensors"),
    )  # fmt: skip
    return export_model(request, tmp_path_factory.mktemp("source") / "bundle").path


@pytest.fixture(scope="module")
def quantized(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_elsewhere(bundle / "model.onnx", tmp_path_factory.mktemp("quantized") / "model.int8.onnx")


def changed(source: Path, out: Path, change: Callable[[onnx.ModelProto], Any]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, out)
    return out


def test_graph_of_another_quantizer_becomes_a_bundle(bundle: Path, quantized: Path, tmp_path: Path) -> None:
    before = load_bundle(bundle).manifest
    made = adopt(bundle, quantized, tmp_path / "out", images=digits("test", 16, before.preprocessing))
    manifest = load_bundle(made.path).manifest
    assert (manifest.target, manifest.precision, manifest.selection) == ("trt-int8", "int8", "native")
    assert manifest.graphs.keys() == {n for n, g in before.graphs.items() if g.variant_of is None}
    assert manifest.method == before.method
    assert manifest.parity is not None and manifest.parity.images == 16 and manifest.parity.top1_agreement >= 0.9
    assert manifest.parity.kept_overlap is not None and manifest.parity.kept_overlap > 0.6
    assert any("another tool" in warning for warning in manifest.warnings)
    assert manifest.tensorrt is not None and manifest.tensorrt["10.0"] == [] and manifest.tensorrt["8.6"]
    ours, theirs = (open_for_checks(load_bundle(path), threads=1)[0] for path in (made.path, bundle))
    images = digits("test", 1, before.preprocessing)
    difference = np.abs(ours.run(images).logits - theirs.run(images).logits).max()
    assert 0 < difference < 0.3 * np.abs(theirs.run(images).logits).max()
    for name in ("dense", "random"):
        file = before.graphs[name].file
        assert (made.path / file).read_bytes() == (bundle / file).read_bytes()


def test_what_costs_speed_is_a_warning(bundle: Path, quantized: Path, tmp_path: Path) -> None:
    def one_factor(model: onnx.ModelProto) -> None:
        """Let a product read floats where another tool quantized them."""
        makers = {name: node for node in model.graph.node for name in node.output}
        product = next(node for node in model.graph.node if node.name == "blocks.0.mlp.fc1")
        product.input[0] = makers[makers[product.input[0]].input[0]].input[0]

    made = adopt(bundle, changed(quantized, tmp_path / "graph.onnx", one_factor), tmp_path / "out")
    assert any("only the second factor is quantized" in warning for warning in made.manifest.warnings)


def test_images_are_drawn_where_none_are_given(bundle: Path, quantized: Path, tmp_path: Path) -> None:
    first, second = (adopt(bundle, quantized, tmp_path / str(seed), seed=seed).manifest.parity for seed in (1, 2))
    assert first is not None and second is not None
    assert first.images == 16 and first.max_abs_error != second.max_abs_error


def _rename(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]


def _zero_point(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "three"))
    for other in model.graph.node:
        if other.op_type.endswith("eLinear") and other.input[1] == node.input[1]:
            other.input[2] = "three"


def _scale(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and "blocks." in node.input[0]]
    scales = {node.input[1] for node in nodes if node.input[0].endswith("QuantizeLinear_Output")}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 50, tensor.name))


def _foreign(model: onnx.ModelProto) -> None:
    model.graph.node[5].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], Any], type[EdgepruneError], str, str]] = {
    "another input": (_rename, InputError, "graph-differs", "images is absent"),
    "another type": (
        lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", TensorProto.FLOAT16),
        InputError, "graph-differs", "logits is float16",
    ),
    "a missing output": (
        lambda model: model.graph.output.pop(), InputError, "graph-differs", "absent",
    ),
    "a zero point": (_zero_point, BuildError, "lint", "zero point is not 0"),
    "operators of an engine": (_foreign, BuildError, "lint", "com.microsoft"),
    "scales far too small": (_scale, BuildError, "parity", "answers differently"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_graph_that_does_not_fit_is_refused(bundle: Path, quantized: Path, tmp_path: Path, name: str) -> None:
    change, kind, code, words = BROKEN[name]
    with pytest.raises(kind) as caught:
        adopt(bundle, changed(quantized, tmp_path / "graph.onnx", change), tmp_path / "out")
    assert caught.value.code == code and words in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_float_graph_is_refused(bundle: Path, tmp_path: Path) -> None:
    refuses("graph-not-quantized", bundle, bundle / "model.onnx", tmp_path / "out")


def refuses(code: str, *arguments: Any) -> None:
    with pytest.raises(InputError) as caught:
        adopt(*arguments)
    assert caught.value.code == code and caught.value.expected


def test_file_that_is_no_graph_is_refused(bundle: Path, tmp_path: Path) -> None:
    refuses("graph-not-found", bundle, tmp_path / "nothing.onnx", tmp_path / "out")
    refuses("graph-not-found", bundle, tmp_path, tmp_path / "out")
    for content in (b"not an onnx file at all", b""):
        (tmp_path / "text.onnx").write_bytes(content)
        refuses("graph-invalid", bundle, tmp_path / "text.onnx", tmp_path / "out")


def test_graph_whose_weights_are_missing_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle / "model.onnx", tmp_path / "alone.onnx")
    refuses("graph-invalid", bundle, tmp_path / "alone.onnx", tmp_path / "out")


def test_bundle_of_another_target_is_refused(quantized: Path, bundle: Path, tmp_path: Path) -> None:
    first = adopt(bundle, quantized, tmp_path / "first")
    refuses("target", first, quantized, tmp_path / "out")
    refuses("bundle-not-found", tmp_path / "no bundle", quantized, tmp_path / "out")
    refuses("output-exists", bundle, quantized, tmp_path / "first")


@pytest.mark.parametrize("options", [{"densities": (0.7, 0.5)}], ids=["keep rates"])
def test_bundle_of_several_sizes_is_refused(
    quantized: Path, tmp_path: Path, options: dict[str, Sequence[float]]
) -> None:
    request = ExportRequest(
        model="vit_digits", method="dynamicvit", target="trt-fp16", verify=False, random_weights=True, **options
    )
    refuses("adaptive", export_model(request, tmp_path / "bundle"), quantized, tmp_path / "out")
