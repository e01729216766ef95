from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeprune.cli import machine
from edgeprune.errors import EnvironmentLackError
from edgeprune.runtime.cuda import Device
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]


def test_doctor_passes_here_and_says_what_it_found(cli: Cli) -> None:
    result = cli("doctor", "--json")
    assert result.code == 0
    checks = {finding["check"] for finding in result.json["results"]}
    assert {"python", "onnxruntime", "torch", "processor", "disk here", "temporary directory", "gpu"} <= checks


def test_doctor_exits_with_three_when_a_required_package_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ("no-such-package", "nope", "1", "ort", "testing")
    monkeypatch.setattr(machine, "REQUIRED", (missing,))
    result = cli("doctor", "--json")
    assert (result.code, result.json["error"]["code"]) == (3, "doctor")
    assert result.json["error"]["hint"] == "pip install 'edgeprune[ort]'"
    assert result.json["results"][1]["level"] == "fail"


def test_doctor_only_warns_of_a_missing_extra(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OPTIONAL", (("no-such-package", "nope", "1", "hub", "testing"),))
    result = cli("doctor", "--json")
    assert result.code == 0
    levels = {finding["check"]: finding["level"] for finding in result.json["results"]}
    assert levels["no-such-package"] == "warn"


def test_old_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUIRED", (("numpy", "numpy", "999", None, "testing"),))
    found = next(iter(machine.check_packages()))
    assert found.level == "fail"
    assert "older than 999" in found.found


def test_unwritable_temporary_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent/tmp")
    (found,) = machine.check_temporary_directory()
    assert found.level == "fail"
    assert found.fix


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "fail"), (1 << 30, "warn"), (1 << 40, "ok")])
def test_disk_space_has_two_limits(monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())
    assert [finding.level for finding in machine.check_disk()] == [level, level]


def test_the_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0, "Orin", (8, 7), 8 << 30, "12.6")
    monkeypatch.setattr("edgeprune.runtime.cuda.find_device", lambda: device)
    (found,) = machine.check_gpu()
    assert (found.level, found.found) == ("ok", "Orin, compute capability 8.7, 8.0 GiB, driver for CUDA 12.6")


def test_no_gpu_is_a_note_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Device:
        raise EnvironmentLackError("there is no CUDA driver", code="gpu-missing", hint="nvidia-smi lists the GPUs")

    monkeypatch.setattr("edgeprune.runtime.cuda.find_device", none)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    (found,) = machine.check_gpu()
    assert found.level == "note"
    assert found.found == "there is no CUDA driver; the CPU targets do not need one"
    assert found.fix == "for the targets of a GPU: nvidia-smi lists the GPUs"


def versions(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name in known:
            return known[name]
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", version)


def providers(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: names))


def test_packages_of_a_gpu_are_notes_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, {})
    providers(monkeypatch, ["CPUExecutionProvider"])
    found = {finding.check: finding for finding in machine.check_cuda_packages()}
    assert {finding.level for finding in found.values()} == {"note"}
    assert found["pycuda"].fix == found["cuda-python"].fix == "pip install 'edgeprune[trt]'"
    assert "edgeprune[cuda]" in str(found["onnxruntime on a GPU"].fix)


def test_packages_of_a_gpu_are_found_under_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, {"pycuda": "2023.1", "cuda-bindings": "13.0.1"})
    providers(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    found = {finding.check: finding for finding in machine.check_cuda_packages()}
    assert [(f.check, f.level) for f in found.values()] == [
        ("pycuda", "warn"),
        ("cuda-python", "ok"),
        ("onnxruntime on a GPU", "ok"),
    ]
    assert found["pycuda"].found == "2023.1, older than 2024.1"


def test_onnxruntime_gpu_is_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUIRED", machine.REQUIRED[-1:])
    monkeypatch.setattr(machine, "OPTIONAL", ())
    versions(monkeypatch, {"onnxruntime-gpu": "1.22.0"})
    assert [(f.check, f.level, f.found) for f in machine.check_packages()] == [("onnxruntime", "ok", "1.22.0")]


def test_onnxruntime_is_not_required_where_tensorrt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUIRED", machine.REQUIRED[-1:])
    monkeypatch.setattr(machine, "OPTIONAL", ())
    versions(monkeypatch, {})
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert [f.level for f in machine.check_packages()] == ["fail" if find_spec("tensorrt") is None else "warn"]
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    assert [f.level for f in machine.check_packages()] == ["warn"]


def test_a_missing_tensorrt_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, {})
    monkeypatch.setattr(machine, "_is_there", lambda module: False)
    (found,) = machine.check_tensorrt()
    assert (found.level, "JetPack" in str(found.fix)) == ("note", True)


def test_tensorrt_without_package_metadata_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, {})
    stub = SimpleNamespace(__version__="8.6.0", get_plugin_registry=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", stub)
    assert next(iter(machine.check_tensorrt())).found == "8.6.0"


def test_versions_compare_by_number() -> None:
    assert machine.as_numbers("2.13.0+cpu") == (2, 13, 0)
    assert machine.as_numbers("2.13") > machine.as_numbers("2.6")


def test_packages_and_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, _, least, _, _ in (*machine.REQUIRED, *machine.OPTIONAL, *machine.ON_DEVICE):
        assert re.search(rf'"{re.escape(name)}>={re.escape(least)}[",]', text), name
