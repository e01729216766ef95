"""Stand-ins for TensorRT's Python package and for the plugin libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeprune.plugins import build, loader, locate
from edgeprune.plugins.contract import CREATORS

COMPILER = shutil.which("cc") or shutil.which("gcc")


def empty_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move every place in which a library, a tool or headers could lie under a folder, and return the folder."""
    home.mkdir()
    for name in (locate.VARIABLE, *build.ROOT_VARIABLES, "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(locate, "BESIDE", home / "package/lib")
    monkeypatch.setattr(locate, "ROOT", home / "checkout")
    monkeypatch.setattr(build, "CUDA_FOLDERS", ())
    monkeypatch.setattr(build, "SYSTEM_ROOTS", (home / "usr",))
    monkeypatch.setattr(loader, "_loaded", [])
    return home


def compile_library(path: Path, *, abi: int | None, version: str | None = "0.1.0", body: str = "") -> Path:
    """Compile a library that says an ABI and a version, each unless None; skip the test without a C compiler."""
    if COMPILER is None:
        pytest.skip("no C compiler: cc or gcc")
    code = body
    if abi is not None:
        code += f"int edgeprune_plugin_abi(void) {{ return {abi}; }}\n"
    if version is not None:
        code += f'const char* edgeprune_plugin_version(void) {{ return "{version}"; }}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@dataclass
class FakeField:
    name: str
    type: Any


@dataclass
class FakeKind:
    name: str


@dataclass
class FakeCreator:
    name: str
    plugin_version: str = "1"
    plugin_namespace: str = "edgeprune"
    field_names: list[FakeField] = field(default_factory=lambda: [FakeField("k", FakeKind("INT32"))])


def every_creator() -> list[FakeCreator]:
    return [FakeCreator(name) for name in CREATORS]


class _Registry:
    """What all versions have in common.

    Args:
        brings: creators a library registers.
        answer: what `load_library` returns; an exception is raised.
    """

    def __init__(self, brings: list[FakeCreator] | None = None, answer: Any = "handle") -> None:
        self.brings = every_creator() if brings is None else brings
        self.answer = answer
        self.held = [FakeCreator("NMS", "1", "")]
        self.loaded: list[str] = []
        self.removed: list[Any] = []

    def _get(self, name: str, version: str, namespace: str) -> FakeCreator | None:
        key = (name, version, namespace)
        return next((c for c in self._list() if (c.name, c.plugin_version, c.plugin_namespace) == key), None)

    def _list(self) -> list[FakeCreator]:
        return self.held

    def _load(self, path: str) -> Any:
        self.loaded.append(path)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            self.held += self.brings
        return self.answer

    def _remove(self, handle: Any) -> None:
        self.removed.append(handle)
        self.held = [creator for creator in self.held if creator not in self.brings]


class Registry85(_Registry):
    """TensorRT 8.5: a library registers itself when it is opened, here as the process's memory map tells."""

    watched: Path | None = None

    def _list(self) -> list[FakeCreator]:
        opened = self.watched is not None and str(self.watched) in Path("/proc/self/maps").read_text()
        return self.held + (self.brings if opened else [])

    @property
    def plugin_creator_list(self) -> list[FakeCreator]:
        return self._list()

    def get_plugin_creator(self, type: str, version: str, plugin_namespace: str = "") -> FakeCreator | None:
        return self._get(type, version, plugin_namespace)


class Registry86(Registry85):
    """TensorRT 8.6: libraries can be loaded and removed."""

    def load_library(self, plugin_path: str) -> Any:
        return self._load(plugin_path)

    def deregister_library(self, handle: Any) -> None:
        self._remove(handle)


class Registry10(_Registry):
    """TensorRT 10 and 11: other names for asking."""

    @property
    def all_creators(self) -> list[FakeCreator]:
        return self._list()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> FakeCreator | None:
        return self._get(type, version, plugin_namespace)

    def load_library(self, plugin_path: str) -> Any:
        return self._load(plugin_path)

    def deregister_library(self, handle: Any) -> None:
        self._remove(handle)


class FakeLogger:
    INFO = "INFO"

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: str, message: str) -> None:
        self.lines.append((severity, message))


class FakeTensorRT:
    """The module: whoever makes a builder or a runtime fails the test, since both need a GPU."""

    Logger = FakeLogger

    def __init__(self, version: str, registry: _Registry) -> None:
        self.__version__ = version
        self.registry = registry

    def get_plugin_registry(self) -> _Registry:
        return self.registry

    def __getattr__(self, name: str) -> Any:
        assert name not in ("Builder", "Runtime"), f"{name} needs a GPU"
        raise AttributeError(name)


OLD_HEADER = "#define NV_TENSORRT_MAJOR {} //!< major\n#define NV_TENSORRT_MINOR {} //!< minor\n"
NEW_HEADER = (
    "#define TRT_MAJOR_ENTERPRISE {}\n#define TRT_MINOR_ENTERPRISE {}\n"
    "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
)


def write_headers(root: Path, major: int, minor: int, folder: str = "include") -> Path:
    """Write what a build looks for in TensorRT's headers; newer versions define their numbers in two steps."""
    include = root / folder
    include.mkdir(parents=True)
    (include / "NvInfer.h").write_text("// nothing\n")
    text = OLD_HEADER if (major, minor) < (10, 13) else NEW_HEADER
    (include / "NvInferVersion.h").write_text(text.format(major, minor))
    return root


def write_tool(folder: Path, name: str, body: str) -> Path:
    """Write an executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def install_tools(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a checkout, the fake cmake and an nvcc on an otherwise empty machine; return the log of cmake's arguments."""
    write_tool(home / "bin", "cmake", f'exec "{sys.executable}" "{Path(__file__).with_name("fake_cmake.py")}" "$@"')
    write_tool(home / "bin", "nvcc", "exit 0")
    sources = home / "checkout/plugins"
    sources.mkdir(parents=True)
    (sources / "CMakeLists.txt").touch()
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.setenv("FAKE_CMAKE_LOG", str(home / "cmake.log"))
    return home / "cmake.log"
