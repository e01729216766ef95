"""Loading against stand-ins for the registries of TensorRT 8.5, 8.6, 10 and 11, with real shared libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins.contract import CREATORS, LIBRARIES, library_for
from edgeprune.plugins.loader import Field, import_tensorrt, load_plugins
from edgeprune.plugins.locate import VARIABLE
from tests.helpers.tensorrt import (
    FakeCreator,
    FakeLogger,
    FakeTensorRT,
    Registry10,
    Registry85,
    Registry86,
    compile_library,
    empty_machine,
    every_creator,
)

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = {"8.5.2.2": Registry85, "8.6.0": Registry86, "10.3.0": Registry10, "11.4.0.106": Registry10}
LOADING = {version: kind for version, kind in VERSIONS.items() if kind is not Registry85}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder under which all places are, empty."""
    return empty_machine(tmp_path / "home", monkeypatch)


@pytest.fixture
def library(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that compiles a library where the loader looks."""

    def install(abi: int | None, name: str = "given.so", **options: Any) -> Path:
        path = compile_library(home / name, abi=abi, **options)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return install


def make(version: str, **options: Any) -> FakeTensorRT:
    return FakeTensorRT(version, VERSIONS[version](**options))


def refused(trt: FakeTensorRT, code: str, **options: Any) -> EnvironmentLackError:
    with pytest.raises(EnvironmentLackError) as caught:
        load_plugins(trt, **options)
    error = caught.value
    assert (error.code, error.exit_code) == (code, 3)
    assert error.details["tensorrt"] == trt.__version__
    assert error.details["build"] in str(error)
    return error


@pytest.mark.parametrize("version", LOADING)
def test_library_is_loaded_and_every_creator_verified(library: Any, version: str) -> None:
    path = library(library_for(version).abi, version="0.9.0")
    trt = make(version)
    loaded = load_plugins(trt)
    assert trt.registry.loaded == [str(path)]
    assert (loaded.tensorrt, loaded.path, loaded.place) == (version, path, VARIABLE)
    assert (loaded.abi, loaded.version, loaded.way) == (library_for(version).abi, "0.9.0", "load_library")
    assert tuple(creator.name for creator in loaded.creators) == CREATORS
    assert {(c.version, c.namespace, c.fields) for c in loaded.creators} == {("1", "edgeprune", (Field("k", "INT32"),))}
    assert loaded.handle == "handle"


def test_library_is_found_by_the_version(home: Path) -> None:
    for known in LIBRARIES:
        compile_library(home / "package/lib" / known.file, abi=known.abi)
    for version in LOADING:
        loaded = load_plugins(make(version))
        assert loaded.path == home / "package/lib" / library_for(version).file
        assert loaded.place == "package"


def test_library_that_says_no_version_is_loaded(library: Any) -> None:
    library(10, version=None)
    assert load_plugins(make("10.3.0")).version is None


def test_second_call_loads_nothing(library: Any) -> None:
    library(10)
    trt = make("10.3.0")
    first = load_plugins(trt)
    assert load_plugins(trt) is first
    assert len(trt.registry.loaded) == 1


def test_another_tensorrt_is_another_registry(library: Any) -> None:
    library(10)
    one, other = make("10.3.0"), make("10.3.0")
    assert load_plugins(one) is not load_plugins(other)
    assert one.registry.loaded == other.registry.loaded != []


def test_threads_load_once(library: Any) -> None:
    library(10)
    trt = make("10.3.0")
    threads = [threading.Thread(target=load_plugins, args=(trt,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trt.registry.loaded) == 1


def test_library_that_somebody_took_out_is_loaded_again(library: Any) -> None:
    library(10)
    trt = make("10.3.0")
    trt.registry.deregister_library(load_plugins(trt).handle)
    assert load_plugins(trt).way == "load_library"
    assert len(trt.registry.loaded) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_creators_that_are_there_already_are_taken(version: str) -> None:
    trt = make(version)
    trt.registry.held += every_creator()
    loaded = load_plugins(trt)
    assert (loaded.way, loaded.path, loaded.version) == ("already registered", None, None)
    assert tuple(creator.name for creator in loaded.creators) == CREATORS
    assert trt.registry.loaded == []


def test_logger_is_told_once(library: Any) -> None:
    path = library(8)
    trt, logger = make("8.6.0"), FakeLogger()
    load_plugins(trt, logger)
    load_plugins(trt, logger)
    assert logger.lines == [("INFO", f"edgeprune: {', '.join(CREATORS)} from {path} by load_library")]


def test_tensorrt_without_load_library_opens_the_library(library: Any) -> None:
    trt = make("8.5.2.2")
    trt.registry.watched = library(8)
    loaded = load_plugins(trt)
    assert loaded.way == "self-registration"
    assert tuple(creator.name for creator in loaded.creators) == CREATORS


def test_self_registration_on_request(library: Any) -> None:
    trt = make("8.6.0")
    trt.registry.watched = library(8)
    assert load_plugins(trt, self_register=True).way == "self-registration"
    assert trt.registry.loaded == []


def test_library_that_registers_itself_is_not_loaded_twice(library: Any) -> None:
    trt = make("8.6.0")
    trt.registry.watched = library(8)
    assert load_plugins(trt).way == "self-registration"
    assert trt.registry.loaded == []


def test_library_that_does_not_register_itself(library: Any) -> None:
    library(8)
    error = refused(make("8.5.2.2"), "plugin-refused")
    assert "did not bring edgeprune::TopKGather 1" in error.message


@pytest.mark.parametrize(("version", "abi"), [("8.6.0", 10), ("10.3.0", 8), ("11.4.0.106", 8), ("8.5.2.2", 10)])
def test_wrong_pairing_never_reaches_tensorrt(library: Any, version: str, abi: int) -> None:
    path = library(abi)
    trt = make(version)
    error = refused(trt, "plugin-abi")
    assert trt.registry.loaded == []
    assert (error.details["abi"], error.details["abi_wanted"]) == (abi, library_for(version).abi)
    assert all(words in str(error) for words in (str(path), version, f"has plugin ABI {abi}", f"unset {VARIABLE}"))


def test_library_without_the_function_never_reaches_tensorrt(library: Any) -> None:
    library(None)
    trt = make("10.3.0")
    assert "says no ABI" in refused(trt, "plugin-abi").message
    assert trt.registry.loaded == []


def test_library_that_cannot_be_opened(library: Any) -> None:
    body = "void getPluginRegistry(void); void start(void) { getPluginRegistry(); }\n"
    library(8, body=body)
    trt = make("8.6.0")
    assert "getPluginRegistry" in refused(trt, "plugin-refused").message
    assert trt.registry.loaded == []


@pytest.mark.parametrize(
    ("content", "reason"), [("text", "not a shared library"), (None, "no such file"), ("folder", "no such file")]
)
def test_file_that_is_no_library(home: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, reason: str) -> None:
    path = home / "given.so"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    monkeypatch.setenv(VARIABLE, str(path))
    trt = make("10.3.0")
    error = refused(trt, "plugin-missing")
    assert trt.registry.loaded == []
    first = error.details["candidates"][0]
    assert (first["place"], first["passed_over"]) == (VARIABLE, reason)
    assert str(path) in str(error)


def test_missing_library_names_every_place(home: Path) -> None:
    error = refused(make("8.6.0"), "plugin-missing")
    assert [one["place"] for one in error.details["candidates"]] == ["package", "user cache"]
    assert "libedgeprune_trt8.so" in str(error)
    assert "unset" not in str(error)


@pytest.mark.parametrize("version", LOADING)
def test_tensorrt_that_answers_none_has_refused(library: Any, version: str) -> None:
    path = library(library_for(version).abi)
    error = refused(make(version, answer=None), "plugin-refused")
    assert error.message == f"TensorRT {version} refused '{path}' without saying why"
    assert error.details["found"] == []
    assert error.details["wanted"] == [f"edgeprune::{name} 1" for name in CREATORS]


def test_tensorrt_that_raises_has_refused(library: Any) -> None:
    library(10)
    assert "no such thing" in refused(make("10.3.0", answer=RuntimeError("no such thing")), "plugin-refused").message


@pytest.mark.parametrize("version", LOADING)
@pytest.mark.parametrize(
    ("last", "found"),
    [
        (None, None),
        (FakeCreator("ScatterTokens", plugin_namespace=""), "::ScatterTokens 1"),
        (FakeCreator("ScatterTokens", plugin_version="2"), "edgeprune::ScatterTokens 2"),
        (FakeCreator("ScatterBack"), "edgeprune::ScatterBack 1"),
    ],
    ids=["missing", "namespace", "version", "name"],
)
def test_creator_that_is_not_the_wanted_one(
    library: Any, version: str, last: FakeCreator | None, found: str | None
) -> None:
    library(library_for(version).abi)
    trt = make(version, brings=every_creator()[:2] + ([] if last is None else [last]))
    error = refused(trt, "plugin-refused")
    assert "edgeprune::ScatterTokens 1" in error.message
    assert set(error.details["found"]) >= {"edgeprune::TopKGather 1", "edgeprune::GatherTokens 1"}
    assert found is None or found in error.details["found"]
    assert trt.registry.removed == ["handle"], "half a plugin stays in the registry"


def test_registry_that_answers_with_another_creator(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library(10)
    trt = make("10.3.0")
    monkeypatch.setattr(trt.registry, "get_creator", lambda *key: FakeCreator("ScatterTokens"))
    refused(trt, "plugin-refused")


@pytest.mark.parametrize("version", ["7.2.1", "9.3.0", "12.0.0"])
def test_other_version_is_refused_before_anything_is_touched(library: Any, version: str) -> None:
    library(10)
    trt = FakeTensorRT(version, Registry10())
    with pytest.raises(EnvironmentLackError) as caught:
        load_plugins(trt)
    assert caught.value.code == "tensorrt-version"
    assert version in caught.value.message
    assert trt.registry.loaded == []


def test_tensorrt_is_imported_when_it_is_not_given(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library(10)
    trt = make("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert load_plugins().tensorrt == "10.3.0"
    assert load_plugins(trt) is load_plugins()


def test_missing_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLackError) as caught:
        load_plugins()
    assert (caught.value.code, caught.value.exit_code) == ("tensorrt-missing", 3)
    assert "pip install tensorrt" in str(caught.value)
    assert "python3-libnvinfer" in str(caught.value)


def test_tensorrt_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EnvironmentLackError, match=r"does not load: libnvinfer\.so\.10") as caught:
        import_tensorrt()
    assert caught.value.code == "tensorrt-missing"


def test_tensorrt_that_is_a_shell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    with pytest.raises(EnvironmentLackError, match="shell") as caught:
        import_tensorrt()
    assert caught.value.code == "tensorrt-missing"


@pytest.mark.parametrize(
    ("registry", "module", "abi"), [("trt8", "tensorrt", 8), ("trt11", "tensorrt_lean_bindings", 10)]
)
def test_real_registry_takes_its_library_and_never_sees_the_other(registry: str, module: str, abi: int) -> None:
    python = ROOT / "build/registries" / registry / "bin/python"
    libraries = {library.abi: next((ROOT / "build/plugins").rglob(library.file), None) for library in LIBRARIES}
    if not python.exists() or None in libraries.values():
        pytest.skip(f"no build/registries/{registry} (plugins/tests/registries.sh), or no libraries in build/plugins")
    script = f"""
import json, os, sys, {module} as trt
from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins.loader import load_plugins
os.environ["{VARIABLE}"] = sys.argv[2]
try:
    load_plugins(trt)
except EnvironmentLackError as error:
    refusal = error.code
os.environ["{VARIABLE}"] = sys.argv[1]
loaded = load_plugins(trt, trt.Logger(trt.Logger.ERROR))
again = load_plugins(trt) is loaded
print(json.dumps([refusal, loaded.way, [creator.name for creator in loaded.creators], again]))
"""
    other = next(path for key, path in libraries.items() if key != abi)
    command = [str(python), "-c", script, str(libraries[abi]), str(other)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["plugin-abi", "load_library", list(CREATORS), True]
