from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeprune.plugins.contract import CREATORS, LIBRARIES
from edgeprune.plugins.locate import VARIABLE
from edgeprune.version import __version__
from tests.cli.conftest import Cli
from tests.helpers.tensorrt import (
    FakeTensorRT,
    Registry10,
    Registry86,
    compile_library,
    empty_machine,
    install_tools,
    write_headers,
)

TRT8, TRT10 = LIBRARIES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder under which all places are, empty."""
    return empty_machine(tmp_path / "home", monkeypatch)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Install a TensorRT 10.3."""
    module = FakeTensorRT("10.3.0", Registry10())
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.mark.parametrize("part", ["build", "path", "check"])
def test_parts_have_help_with_the_shared_options(cli: Cli, part: str) -> None:
    result = cli("plugins", part, "--help")
    assert result.code == 0
    assert all(option in result.out for option in ("--json", "--quiet", "--verbose", "--no-progress"))


def test_verb_alone_lists_its_parts(cli: Cli) -> None:
    result = cli("plugins")
    assert result.code == 0
    assert result.out == cli("plugins", "--help").out
    assert [result.out.index(f"\n  {part} ") for part in ("build", "path", "check")]
    assert cli("plugins", "--json").json["results"] is None


def test_unknown_part_names_the_nearest(cli: Cli) -> None:
    result = cli("plugins", "chek", "--json")
    assert (result.code, result.json["error"]["code"]) == (2, "usage")
    assert result.json["error"]["hint"] == "edgeprune plugins check"


def test_wrong_option_points_at_the_help_of_the_part(cli: Cli) -> None:
    result = cli("plugins", "path", "--tensorrt", "9")
    assert result.code == 2
    assert "edgeprune plugins path --help" in result.err


def test_path_prints_the_library_and_nothing_else(cli: Cli, home: Path, trt: FakeTensorRT) -> None:
    path = compile_library(home / "package/lib" / TRT10.file, abi=10)
    result = cli("plugins", "path")
    assert (result.code, result.out) == (0, f"{path}\n")
    assert "an earlier place has one" in result.err


@pytest.mark.parametrize("words", [("plugins", "path", "-q"), ("plugins", "-q", "path")])
def test_quiet_may_stand_before_or_after_the_part(cli: Cli, home: Path, trt: FakeTensorRT, words: list[str]) -> None:
    compile_library(home / "package/lib" / TRT10.file, abi=10)
    assert cli(*words).err == ""


@pytest.mark.usefixtures("no_tensorrt")
def test_path_of_a_named_version_needs_no_tensorrt(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_library(home / "mine" / TRT8.file, abi=8)
    monkeypatch.setenv(VARIABLE, str(path.parent))
    document = cli("plugins", "path", "--tensorrt", "8", "--json").json
    assert document["command"] == "plugins path"
    assert document["results"]["path"] == str(path)
    assert document["results"]["candidates"][0] == {"place": VARIABLE, "path": str(path), "passed_over": None}
    assert {c["passed_over"] for c in document["results"]["candidates"][1:]} == {f"{VARIABLE} is set"}


def test_path_without_a_library_still_tells_where_it_looked(cli: Cli) -> None:
    result = cli("plugins", "path", "--tensorrt", "11", "--json")
    assert (result.code, result.json["error"]["code"]) == (3, "plugin-missing")
    assert result.json["results"]["path"] is None
    assert [c["passed_over"] for c in result.json["results"]["candidates"]] == ["no such file", "no such file"]
    assert "edgeprune plugins build" in result.json["error"]["hint"]


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("part", ["path", "check"])
def test_missing_tensorrt(cli: Cli, part: str) -> None:
    result = cli("plugins", part)
    assert result.code == 3
    assert "error [tensorrt-missing]" in result.err


def test_check_prints_the_creators_with_their_fields(cli: Cli, home: Path, trt: FakeTensorRT) -> None:
    path = compile_library(home / "package/lib" / TRT10.file, abi=10)
    result = cli("plugins", "check")
    assert result.code == 0
    for line, name in zip(result.out.splitlines()[1:], CREATORS, strict=True):
        assert line.split() == [name, "1", "edgeprune", "k", "INT32"]
    assert str(path) in result.err


def test_check_in_json(cli: Cli, home: Path, trt: FakeTensorRT) -> None:
    compile_library(home / "package/lib" / TRT10.file, abi=10)
    results = cli("plugins", "check", "--json").json["results"]
    assert (results["tensorrt"], results["abi"], results["way"]) == ("10.3.0", 10, "load_library")
    assert results["creators"][0] == {
        "name": "TopKGather",
        "version": "1",
        "namespace": "edgeprune",
        "fields": [{"name": "k", "kind": "INT32"}],
    }
    assert "handle" not in results


def test_check_of_a_wrong_pairing(cli: Cli, home: Path, trt: FakeTensorRT) -> None:
    compile_library(home / "package/lib" / TRT10.file, abi=8)
    result = cli("plugins", "check")
    assert result.code == 3
    assert "error [plugin-abi]" in result.err
    assert trt.registry.loaded == []


def test_check_by_self_registration(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry86()
    registry.watched = compile_library(home / "package/lib" / TRT8.file, abi=8)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("8.6.0", registry))
    assert cli("plugins", "check", "--self-register", "--json").json["results"]["way"] == "self-registration"


def test_build_then_path(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    root = write_headers(home / "trt10", 10, 3)
    result = cli("plugins", "build", "--preset", "orin", "--archs", "87, 89", "--tensorrt-root", root)
    path = home / "cache/edgeprune/plugins" / __version__ / TRT10.file
    assert (result.code, result.out) == (0, f"{path}\n"), result.err
    assert "next: edgeprune plugins check" in result.err
    assert cli("plugins", "path", "--tensorrt", "10").out == f"{path}\n"


def test_build_elsewhere_says_how_to_find_it(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    root = write_headers(home / "trt8", 8, 6)
    result = cli("plugins", "build", "--archs", "87", "--tensorrt-root", root, "-o", home / "out")
    assert (result.code, result.out) == (0, f"{home / 'out' / TRT8.file}\n")
    assert f"{VARIABLE}={home / 'out'} edgeprune plugins check" in result.err


def test_build_in_json(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    root = write_headers(home / "trt8", 8, 6)
    document = cli("plugins", "build", "--archs", "87", "--tensorrt-root", root, "--json").json
    assert document["command"] == "plugins build"
    assert [Path(name).name for name in document["results"]["libraries"]] == [TRT8.file]
    assert document["results"]["archs"] == ["87"]


def test_build_that_fails_exits_with_four(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    monkeypatch.setenv("FAKE_CMAKE", "fail-compile")
    root = write_headers(home / "trt8", 8, 6)
    result = cli("plugins", "build", "--archs", "87", "--tensorrt-root", root)
    assert result.code == 4
    assert "error [plugin-build]" in result.err
    assert "nvcc fatal" in result.err


def test_build_without_tools_exits_with_three(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tools(home, monkeypatch)
    monkeypatch.setenv("PATH", "")
    result = cli("plugins", "build", "--preset", "thor", "--json")
    assert (result.code, result.json["error"]["code"]) == (3, "plugin-tools")


def test_doctor_tells_of_tensorrt_and_its_plugin(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.cli import machine

    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "10.3.0" if name == "tensorrt" else real(name))
    first, second = machine.check_tensorrt()
    assert (first.level, second.level) == ("ok", "note")
    assert "edgeprune plugins build" in str(second.fix)
    path = compile_library(home / "package/lib" / TRT10.file, abi=10)
    assert [finding.found for finding in machine.check_tensorrt()] == ["10.3.0", str(path)]
    monkeypatch.setattr(machine.metadata, "version", lambda name: "9.3.0")
    (only,) = machine.check_tensorrt()
    assert only.level == "warn"
