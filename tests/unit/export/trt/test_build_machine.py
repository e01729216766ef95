"""What is asked of the machine, in which order, and what is said when it lacks something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.export.trt import can_build_here
from edgeprune.export.trt.machine import (
    check_capability,
    check_target,
    check_version,
    find_machine,
    reasons_against,
    with_plugin,
)
from edgeprune.export.trt.options import BuildOptions
from edgeprune.export.trt.plan import Role, plan_roles
from tests.helpers import fake_trt
from tests.helpers.tensorrt import compile_library, empty_machine
from tests.helpers.trt_bundles import described, engine_manifest

MODEL = {"model": described("model", 1)}
VARIANT = {**MODEL, "model_plugin": described("model_plugin", 1, variant_of="model", plugin=True)}


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cpu-int8"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(InputError) as caught:
        check_target(engine_manifest(MODEL, target=target))
    assert caught.value.code == "target"
    assert f"'{target}'" in caught.value.message
    assert "--target trt-fp16" in str(caught.value.hint)


def test_machine_is_device_and_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, "11.4.0")
    machine = find_machine()
    assert (machine.device, machine.compute_capability, machine.tensorrt) == ("NVIDIA Pretend GPU", "8.7", "11.4.0")
    assert can_build_here() is None


def test_device_is_asked_before_tensorrt_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, "8.6.0", count=0)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLackError) as caught:
        find_machine()
    assert caught.value.code == "gpu-missing"
    assert can_build_here() == caught.value.message


def test_missing_tensorrt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, "8.6.0")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLackError) as caught:
        find_machine()
    assert caught.value.code == "tensorrt-missing"
    assert can_build_here() == caught.value.message


REASONS = {"8.6": ["no bfloat16"], "10.0": [], "10.3": ["odd"], "11.1": []}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("8.6.0", ["no bfloat16"]),
        ("8.6.2.3", ["no bfloat16"]),
        ("9.3.0", ["no bfloat16"]),
        ("10.0.1", []),
        ("10.3.0.26", ["odd"]),
        ("10.13.3", ["odd"]),
        ("11.4.0.106", []),
        ("8.5.2", ["it is older than 8.6, the oldest version the export looked at"]),
    ],
)
def test_version_is_judged_by_the_newest_that_is_not_newer(version: str, expected: list[str]) -> None:
    assert reasons_against(REASONS, version) == expected


def test_refused_version_names_reasons_and_what_would_do() -> None:
    manifest = engine_manifest(MODEL, tensorrt=REASONS)
    with pytest.raises(EnvironmentLackError) as caught:
        check_version(manifest, "8.6.0")
    assert caught.value.code == "tensorrt-version"
    assert "TensorRT 8.6.0 does not take this bundle: no bfloat16" in caught.value.message
    assert caught.value.expected == "TensorRT 10.0 or 11.1 or what is like it"
    assert caught.value.details["reasons"] == ["no bfloat16"]
    check_version(manifest, "11.4.0")
    check_version(engine_manifest(MODEL), "8.6.0")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_machine(tmp_path / "home", monkeypatch)


def sources(roles: tuple[Role, ...]) -> list[str]:
    return [plan.source for role in roles for plan in role.plans()]


def found(graphs: dict[str, Any], **options: Any) -> tuple[Any, tuple[Role, ...], list[str]]:
    roles = plan_roles(engine_manifest(graphs, selection="auto"), BuildOptions(**options))
    return with_plugin(find_machine(), roles)


@pytest.mark.parametrize(("version", "abi"), [("8.6.0", 8), ("11.4.0", 10)])
def test_plugin_is_loaded_and_hashed(version: str, abi: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_trt.install(monkeypatch, version)
    trt.registry.held = []
    path = compile_library(home / f"package/lib/libedgeprune_trt{abi}.so", abi=abi)
    machine, roles, notes = found(VARIANT)
    assert machine.plugin == path
    assert len(machine.plugin_sha256) == 64
    assert not machine.registers_itself
    assert (sources(roles), notes) == (["model", "model_plugin"], [])


def test_plugin_is_not_asked_for_when_nothing_needs_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_trt.install(monkeypatch, "8.6.0")
    trt.registry.held = []
    machine, roles, notes = found(MODEL)
    assert (machine.plugin, sources(roles), notes) == (None, ["model"], [])


def test_missing_plugin_leaves_the_native_form_with_a_note(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_trt.install(monkeypatch, "8.6.0")
    trt.registry.held = []
    machine, roles, (note,) = found(VARIANT)
    assert (machine.plugin, sources(roles)) == (None, ["model"])
    assert "only the native form is built, since no plugin library for TensorRT 8.6.0" in note
    assert "edgeprune plugins build" in note


@pytest.mark.parametrize("graphs", [VARIANT, {"model": described("model", 1, plugin=True)}])
def test_missing_plugin_is_an_error_when_there_is_no_other_form(
    graphs: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_trt.install(monkeypatch, "11.4.0")
    trt.registry.held = []
    with pytest.raises(EnvironmentLackError) as caught:
        found(graphs, selection="plugin")
    assert caught.value.code == "plugin-missing"


def test_fp8_needs_a_gpu_that_multiplies_it() -> None:
    manifest = engine_manifest(MODEL, target="trt-fp8")
    for capability in ("8.9", "9.0", "10.0", "12.0"):
        check_capability(manifest, capability)
    with pytest.raises(EnvironmentLackError, match=r"8\.7") as caught:
        check_capability(manifest, "8.7")
    assert caught.value.code == "gpu-too-old"
    check_capability(engine_manifest(MODEL, target="trt-int8"), "8.7")
