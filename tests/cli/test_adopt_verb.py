"""`edgeprune adopt`: a graph quantized elsewhere goes the way of every bundle, engines of a stand-in included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, write_image
from tests.helpers import fake_trt
from tests.helpers.quantized_elsewhere import quantized_elsewhere
from tests.helpers.tensorrt import empty_machine

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "vit_digits_dynamicvit.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeprune.export import ExportRequest, export_model

    request = ExportRequest(
        model="vit_digits", method="dynamicvit", keep_rate=0.7, target="trt-fp32", selection="native", verify=False,
        token_outputs=True, checkpoint=str(CHECKPOINT),
    )  # fmt: skip
    return export_model(request, tmp_path_factory.mktemp("source") / "bundle").path


@pytest.fixture(scope="module")
def graph(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_elsewhere(source / "model.onnx", tmp_path_factory.mktemp("graph") / "model.onnx")


def test_adopted_bundle_is_shown_built_run_and_evaluated(
    cli: Cli, source: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    made = cli("adopt", source, graph, "-o", out, "--data", "digits", "--images", "8", "--json")
    assert made.code == 0, made.err
    results = made.json["results"]
    assert results["target"] == "trt-int8" and results["parity"]["images"] == 8
    assert results["parity"]["top1_agreement"] == 1.0
    shown = cli("inspect", out)
    assert shown.code == 0 and "trt-int8" in shown.out and "another tool" in shown.out + shown.err
    accuracy = cli("evaluate", out, "--data", "digits", "--limit", "40", "--json").json["results"]
    assert accuracy["emulated"] is not None
    refused = cli("verify", out, "--checkpoint", CHECKPOINT)
    assert refused.code == 2 and "another tool quantized" in refused.err and "edgeprune evaluate" in refused.err

    empty_machine(tmp_path / "home", monkeypatch)
    fake_trt.install(monkeypatch, "11.4.0")
    environment = fake_trt.other_process(tmp_path / "site", "11.4.0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([environment["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]))
    built = cli("build", out, "--graphs", "model", "--json")
    assert built.code == 0, built.err
    engines = cli("evaluate", out, "--data", "digits", "--limit", "40", "--graph", "model", "--json").json["results"]
    assert engines["emulated"] is None
    assert engines["graphs"]["model"]["top1"] == accuracy["graphs"]["model"]["top1"]
    assert cli("run", out, write_image(tmp_path / "image.png", "RGB"), "--json").code == 0


def test_tensorrt_without_strong_typing_is_told_apart(
    cli: Cli, source: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    assert cli("adopt", source, graph, "-o", out).code == 0
    empty_machine(tmp_path / "home", monkeypatch)
    fake_trt.install(monkeypatch, "8.6.0")
    refused = cli("build", out)
    assert refused.code == 3 and "strongly typed networks, from TensorRT 10.0 on" in refused.err


def test_graph_that_is_not_quantized_is_refused(cli: Cli, source: Path, tmp_path: Path) -> None:
    refused = cli("adopt", source, source / "model.onnx", "-o", tmp_path / "out")
    assert refused.code == 2 and "nothing in it is quantized" in refused.err
    assert not (tmp_path / "out").exists()
