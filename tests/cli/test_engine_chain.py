"""From a checkpoint to engines that run, with the commands a user types, on stand-ins of TensorRT and CUDA.

The stand-ins compute with ONNX Runtime, so that the numbers are those of the typed graphs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, Outcome, write_image
from tests.helpers import fake_trt
from tests.helpers.tensorrt import empty_machine
from tests.helpers.trt_bundles import write_for_tensorrt

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


@pytest.fixture(params=fake_trt.VERSIONS)
def device(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make this machine, and the building processes it starts, one with a GPU and a TensorRT with the plugin."""
    empty_machine(tmp_path / "home", monkeypatch)
    fake_trt.install(monkeypatch, request.param)
    environment = fake_trt.other_process(tmp_path / "site", request.param)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([environment["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]))
    return request.param


def ok(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return outcome.json["results"]


CASES = {
    "evit": ("--method", "evit", "--keep-rate", "0.7", "--token-outputs"),
    "ats": ("--method", "ats", "--buckets", "8,16", "--token-outputs"),
    "densities": ("--method", "dynamicvit", "--keep-rate", "1.0,0.5"),
}
QUANTIZED = ("--calibration", "digits", "--calibration-images", "16", "--calibration-method", "minmax")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::edgeprune.errors.EdgepruneWarning")  # stand-ins fuse nothing
@pytest.mark.parametrize("case", CASES)
def test_export_builds_and_everything_else_runs_the_engines(cli: Cli, device: str, case: str, tmp_path: Path) -> None:
    method = CASES[case][1]
    out, checkpoint = tmp_path / "bundle", CHECKPOINTS / f"vit_digits_{method}.safetensors"
    made = ok(
        cli("export", "-m", "vit_digits", *CASES[case], "--checkpoint", checkpoint, "--target", "trt-fp16",
            "--batch", "1:2", "--no-verify", "-o", out, "--json")
    )  # fmt: skip
    index = made["engines"]
    assert index["tensorrt"] == device
    assert {choice["what"] for choice in index["choices"]} >= ({"engines"} if case == "ats" else {"selection"})
    graphs = {profile["graph"] for engine in index["engines"] for profile in engine["profiles"]}
    wanted = {"evit": {"model", "dense", "random"}, "densities": {"model", "dense"}}
    assert wanted.get(case, {"stem", "rest_8", "rest_16", "dense"}) <= graphs
    assert list(ok(cli("inspect", out, "--json"))["engines"].values()) == [index]
    verified = ok(cli("verify", out, "--checkpoint", checkpoint, "--images", "4", "--json"))
    assert verified["emulated"] is None and verified["parity"]["top1_agreement"] == 1.0
    image = write_image(tmp_path / "image.png", "RGB")
    for density in ("1.0", "0.5") if case == "densities" else (None,):
        found = ok(cli("run", out, image, "--json", *(() if density is None else ("--density", density))))
        assert len(found["images"]) == 1
    result, page = tmp_path / "bench.json", tmp_path / "report.html"
    found = cli("bench", out, "--quick", "--rounds", "2", "--images", "4", "--layers", "-o", result)
    assert found.code == 0, found.err
    assert "where the time goes" in found.out
    assert "do not add up to the latency" in found.err
    layers = json.loads(result.read_text())["layers"]
    assert {one["source"] for one in layers} == {"tensorrt profiler"}
    assert {"attention", "mlp", "selection"} <= {part["part"] for part in layers[1]["parts"]}
    ok(cli("report", result, "-o", page, "--json"))
    assert "tensorrt profiler, 5 runs" in page.read_text()
    accuracy = ok(cli("evaluate", out, "--data", "digits", "--limit", "60", "--json"))
    assert accuracy["emulated"] is None
    assert all(graph["top1"] > 0.8 for graph in accuracy["graphs"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::edgeprune.errors.EdgepruneWarning")
@pytest.mark.parametrize("target", ["trt-int8"])
def test_quantized_bundle_goes_from_images_to_engines(
    cli: Cli, device: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.export.quantized_accuracy.JUDGED_IMAGES", 40)
    out, checkpoint = tmp_path / "bundle", CHECKPOINTS / "vit_digits_evit.safetensors"
    made = ok(
        cli("export", "-m", "vit_digits", *CASES["evit"], "--checkpoint", checkpoint, "--target", target, *QUANTIZED,
            "--max-drop", "10", "--no-engine", "--no-verify", "-o", out, "--json")
    )  # fmt: skip
    found = made["manifest"]["quantization"]
    assert (found["precision"], found["scheme"], found["weight_bits"]) == (target[4:], "static", 8)
    assert (found["ranges"]["data"], found["ranges"]["images"], found["ranges"]["method"]) == ("digits", 16, "minmax")
    assert found["speed"] is None and found["accuracy"]["top1"] > 0.8 and found["accuracy"]["images"] == 40
    built = cli("build", out, "--json")
    if device.startswith("8."):
        assert (built.code, "[tensorrt-version]" in built.err) == (3, True)
        return
    ok(built)
    assert ok(cli("inspect", out, "--json"))["manifest"]["quantization"] == found
    verified = ok(cli("verify", out, "--checkpoint", checkpoint, "--images", "4", "--json"))
    assert verified["emulated"] is None and verified["parity"]["top1_agreement"] == 1.0
    assert len(ok(cli("run", out, write_image(tmp_path / "image.png", "RGB"), "--json"))["images"]) == 1
    accuracy = ok(cli("evaluate", out, "--data", "digits", "--limit", "60", "--json"))
    assert accuracy["emulated"] is None
    assert all(graph["top1"] > 0.8 for graph in accuracy["graphs"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::edgeprune.errors.EdgepruneWarning")
def test_bundles_are_compared_on_engines_built_for_it(
    cli: Cli, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, temporary = tmp_path / "bundle", tmp_path / "tmp"
    made = cli("export", "-m", "vit_digits", *CASES["evit"], "--random-weights", "--target", "trt-fp16", "--no-verify",
               "--no-engine", "-o", out)  # fmt: skip
    assert made.code == 0, made.err
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    asked = ("--blocks", "6", "--quick", "--fail-on", "median:900%", "--fail-on", "speedup:900%")
    refused = cli("compare", out, out, *asked)
    assert (refused.code, "[engine-missing]" in refused.err) == (3, True)
    found = cli("compare", out, out, "--builds", "2", *asked, "--json")
    results = ok(found)
    assert (results["builds"], results["measured"], results["clock"]) == (2, "head to head", "wall")
    assert [outcome["stat"] for outcome in results["outcomes"]] == ["median", "speedup"]
    assert all(outcome["spread"] >= 0 for outcome in results["outcomes"])
    assert list(temporary.iterdir()) == [] and not (out / "engines").exists()
    assert not (tmp_path / "home" / "cache" / "edgeprune").exists()


def test_without_a_gpu_no_engine_is_built_for_a_comparison(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_trt.install(monkeypatch, count=None)
    bundle = write_for_tensorrt(tmp_path / "bundle").path
    refused = cli("compare", bundle, bundle, "--builds", "2")
    assert (refused.code, "[gpu-missing]" in refused.err, "fix: " in refused.err) == (3, True, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::edgeprune.errors.EdgepruneWarning")
@pytest.mark.parametrize("device", ["11.4.0"], indirect=True)
def test_quantized_bundle_is_built_and_runs(cli: Cli, device: str, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "bundle", CHECKPOINTS / "vit_digits_evit.safetensors"
    made = ok(
        cli("export", "-m", "vit_digits", "--method", "evit", "--keep-rate", "0.5", "--stages", "0,2,3",
            "--token-outputs", "--checkpoint", checkpoint, "--target", "trt-int8", "--calibration", "digits",
            "--calibration-images", "64", "--batch", "1:2", "-o", out, "--json")
    )  # fmt: skip
    assert made["engines"]["tensorrt"] == device
    verified = ok(cli("verify", out, "--checkpoint", checkpoint, "--images", "4", "--json"))
    assert verified["emulated"] is None and verified["parity"]["top1_agreement"] == 1.0
    accuracy = ok(cli("evaluate", out, "--data", "digits", "--limit", "60", "--json"))
    assert all(accuracy["graphs"][name]["top1"] > 0.9 for name in ("model", "dense"))
