from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeprune.cli import machine
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


def test_versions_compare_by_number() -> None:
    assert machine.as_numbers("2.13.0+cpu") == (2, 13, 0)
    assert machine.as_numbers("2.13") > machine.as_numbers("2.6")


def test_packages_and_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, _, least, _, _ in (*machine.REQUIRED, *machine.OPTIONAL):
        assert re.search(rf'"{re.escape(name)}>={re.escape(least)}[",]', text), name
