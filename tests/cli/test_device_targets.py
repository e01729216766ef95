"""Targets of a device, from the command line of a machine that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.runtime import cuda
from tests.cli.conftest import Cli, write_image

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
RATES = {"dynamicvit": ("--keep-rate", "0.7"), "evit": ("--keep-rate", "0.7"), "ats": ()}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libcuda-that-is-not-there.so",))


def export(cli: Cli, out: Path, method: str, target: str, *more: str) -> None:
    checkpoint = CHECKPOINTS / f"vit_digits_{method}.safetensors"
    options = ("--method", method, *RATES[method], "--checkpoint", checkpoint, "--target", target, "--batch", "1:8")
    result = cli("export", "-m", "vit_digits", *options, *more, "-o", out)
    assert result.code == 0, result.err
    if target.startswith("trt"):
        assert f"next: edgeprune build {out}" in result.err
        assert "no engine: there is no CUDA driver" in result.err


@pytest.mark.parametrize("target", ["trt-fp16", "trt-bf16", "ort-cuda-fp16"])
@pytest.mark.parametrize("method", RATES)
def test_cross_exported_bundle_is_whole_checked_and_waits_for_its_device(
    cli: Cli, tmp_path: Path, method: str, target: str
) -> None:
    out = tmp_path / "bundle"
    export(cli, out, method, target)
    manifest = cli("inspect", out, "--json").json["results"]["manifest"]
    assert manifest["parity"]["top1_agreement"] == 1.0
    if target.startswith("trt"):
        oldest = "8.6" if target == "trt-fp16" else "10.0"
        assert manifest["tensorrt"][oldest] == [] and manifest["tensorrt"]["8.5"]
        assert manifest["graphs"]["model_plugin"]["variant_of"] == "model"
        assert not (out / "engines").exists()
    checkpoint = CHECKPOINTS / f"vit_digits_{method}.safetensors"
    verified = cli("verify", out, "--checkpoint", checkpoint, "--json")
    assert verified.code == 0, verified.err
    assert verified.json["results"]["emulated"]
    image = write_image(tmp_path / "image.png", "RGB")
    layers = ("bench", out, "--layers")
    for command in (("run", out, image), ("bench", out), layers):
        refused = cli(*command)
        assert refused.code == (2 if command == layers and target == "ort-cuda-fp16" else 3), refused.err
        assert "Traceback" not in refused.err and "fix: " in refused.err


def test_accuracy_of_a_typed_bundle_is_emulated(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(cli, out, "evit", "trt-fp16", "--no-verify")
    result = cli("evaluate", out, "--data", "digits", "--limit", "200", "--json")
    assert result.code == 0, result.err
    assert result.json["results"]["emulated"].startswith("there is no CUDA driver")
    assert result.json["results"]["graphs"]["model"]["top1"] > 0.9


def test_required_engine_is_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out" / "bundle"
    result = cli(
        "export", "-m", "vit_digits", "--random-weights", "--target", "trt-fp16", "--require-engine", "-o", out
    )
    assert result.code == 3
    assert "[gpu-missing]" in result.err
    assert not out.parent.exists()


@pytest.mark.parametrize(("target", "more"), [("trt-fp16", ("--no-engine",)), ("ort-cpu", ())])
def test_required_engine_that_cannot_be_meant(cli: Cli, tmp_path: Path, target: str, more: tuple[str, ...]) -> None:
    options = ("--target", target, "--require-engine", *more, "-o", tmp_path / "bundle")
    result = cli("export", "-m", "vit_digits", "--random-weights", *options)
    assert result.code == 2
    assert "--require-engine" in result.err
    assert list(tmp_path.iterdir()) == []


def test_buckets_for_a_device_say_where_they_were_measured(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    calibrated = ("--buckets", "auto:3", "--calibration", "digits", "--calibration-images", "32")
    export(cli, out, "ats", "trt-fp16", *calibrated)
    manifest = cli("inspect", out, "--json").json["results"]["manifest"]
    assert any("not on the device" in warning for warning in manifest["warnings"])
    adaptive = manifest["adaptive"]
    assert all(size % 8 == 0 for bucket in adaptive["buckets"] for size in bucket["capacities"])
    weights = (out / "model.onnx.data").stat().st_size
    assert weights < 2.2 * manifest["model"]["parameters"] + 200_000  # float16; what was measured with is gone
    assert not list(out.glob("trial*"))
