"""A stand-in for TensorRT's Python package in the version 8.6.0 or 11.4.0, on a `FakeDevice`.

It has the names of the real one and no others (tests/fixtures/tensorrt). Parsing reads the ONNX file, building gives
bytes that name it, and running computes it with ONNX Runtime on the memory the addresses point to. What the real one
refuses is refused, with the same kind of answer: None, False, or an exception. Tests plant faults and read what
happened in `FakeTensorRT`.
"""

from __future__ import annotations

import enum
import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_cuda import LAYOUTS, FakeDevice, install_cuda, restricted, surface
from tests.helpers.fake_trt_builder import building
from tests.helpers.fake_trt_graphs import KINDS, NUMPY, make_plan, read_plan
from tests.helpers.fake_trt_runtime import running
from tests.helpers.tensorrt import Registry10, Registry86

__all__ = ["VERSIONS", "FakeTensorRT", "Faults", "install", "make_plan", "other_process", "read_plan"]
VERSIONS = ("8.6.0", "11.4.0")


@dataclass
class Faults:
    """What goes wrong, by a test's wish.

    Attributes:
        parse: the node the parser refuses.
        runtime: the device cannot be used: 8.6 raises, 11.4 logs an error and would crash later.
        build, deserialize, context: the call answers None.
        execute: `execute_async_v3` answers False.
        capture: it does so while the stream is captured.
        reason: what the logger is told then.
    """

    parse: str | None = None
    runtime: bool = False
    build: bool = False
    deserialize: bool = False
    context: bool = False
    execute: bool = False
    capture: bool = False
    reason: str = "a planted fault"


@dataclass
class FakeTensorRT:
    """A stand-in and what it was asked.

    Attributes:
        module: put in the place of `tensorrt`.
        calls: (name, arguments) in order, of the calls that matter.
        log: (severity, message) of all loggers.
        registry: of plugins; its creators are there unless a test removes them.
        inspector: text the engine inspector answers, in place of one made of the graph.
        layer_ms: what the profiler tells of a layer by its name, 0.125 of others.
    """

    version: str
    device: FakeDevice
    module: ModuleType = field(default_factory=lambda: ModuleType("tensorrt"))
    calls: list[tuple[str, Any]] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    registry: Any = None
    inspector: str | None = None
    layer_ms: dict[str, float] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = surface(self.version)
        self.registry = Registry86() if self.old else Registry10()
        self.registry.held += self.registry.brings
        _fill(self)

    @property
    def old(self) -> bool:
        return self.version.startswith("8.")

    def called(self, name: str) -> list[Any]:
        return [arguments for one, arguments in self.calls if one == name]

    def error(self, logger: Any, words: str) -> None:
        self.tell(logger, "ERROR", words)

    def tell(self, logger: Any, severity: str, words: str) -> None:
        self.log.append((severity, words))
        logger.log(self.module.ILogger.Severity[severity], words)

    def kind(self, onnx_type: int) -> str:
        """Return the name of the data type an engine shows for one of ONNX."""
        name = KINDS[onnx_type][0]
        return "INT32" if self.old and name == "INT64" else name


def _fill(fake: FakeTensorRT) -> None:
    """Put everything into the module: the names of the version, and behind them what is implemented here."""
    module, names = fake.module, fake.names
    module.__version__ = fake.version  # type: ignore[attr-defined]
    for name, members in _sections(names, "enum").items():
        setattr(module, name, _enum(name, members))
    implemented = _implementations(fake)
    for name, attributes in _sections(names, "class").items():
        implementation = implemented.get(name) or _not_implemented(name)
        base = {"IHostMemory": bytes, "Logger": getattr(module, "ILogger", None)}.get(name, object)
        setattr(module, name, restricted(implementation, attributes, name, base))
    severity = _enum(
        "Severity", dict(zip(["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], range(5), strict=True))
    )
    for one in (module.ILogger, module.Logger):
        one.Severity = severity
        for name, member in severity.__members__.items():
            setattr(one, name, member)
    for name, place in names["constants"].items():
        if place is not None:
            setattr(module, name, getattr(module, place[0])[place[1]])
    functions = {
        "get_plugin_registry": lambda: fake.registry,
        "get_builder_plugin_registry": lambda capability: fake.registry,
        "init_libnvinfer_plugins": lambda logger, namespace: fake.calls.append(("init_plugins", namespace)) or True,
        "get_nv_onnx_parser_version": lambda: int("".join(f"{int(p):02d}" for p in fake.version.split("."))),
        "nptype": lambda kind: np.dtype(NUMPY[kind.name]).type,
        "volume": lambda sides: int(np.prod(list(sides))),
    }
    for name, call in functions.items():
        if name in names["functions"]:
            setattr(module, name, call)


def _sections(names: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {key.removeprefix(f"{kind} "): held for key, held in names.items() if key.startswith(f"{kind} ")}


def _enum(name: str, members: Mapping[str, int]) -> Any:
    class Number(enum.Enum):
        def __int__(self) -> int:
            return self.value

        __index__ = __int__

    return enum.Enum(name, dict(members), type=Number)  # type: ignore[misc]


def _not_implemented(name: str) -> type:
    def refuse(self: Any, *args: Any) -> None:
        raise NotImplementedError(f"the stand-in lacks {name}, which the real one has: add it when it is needed")

    return type(name, (), {"__init__": refuse})


def _implementations(fake: FakeTensorRT) -> dict[str, type]:
    return {one.__name__: one for one in (*_common(fake), *building(fake), *running(fake))}


def _common(fake: FakeTensorRT) -> list[type]:
    class Dims:
        MAX_DIMS = 8

        def __init__(self, sides: Any = ()) -> None:
            self._sides = tuple(int(side) for side in sides)

        def __len__(self) -> int:
            return len(self._sides)

        def __getitem__(self, at: Any) -> Any:
            return self._sides[at]

        def __eq__(self, other: object) -> bool:
            return self._sides == tuple(other)  # type: ignore[arg-type]

        def __hash__(self) -> int:
            return hash(self._sides)

        def __repr__(self) -> str:
            return str(self._sides)

    class ILogger:
        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError("ILogger.log is pure virtual")

    class Logger:
        def __init__(self, min_severity: Any = None) -> None:
            self._ready, self._least = True, min_severity

        def log(self, severity: Any, msg: str) -> None:
            pass  # the real one prints

        def _set_least(self, severity: Any) -> None:
            self._least = severity

        min_severity = property(lambda self: self._least, _set_least)

    class IHostMemory:
        nbytes = property(len)

    class IProgressMonitor:
        def __init__(self) -> None:
            self._ready = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise NotImplementedError("IProgressMonitor.phase_start is pure virtual")

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError("IProgressMonitor.step_complete is pure virtual")

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError("IProgressMonitor.phase_finish is pure virtual")

    class IProfiler:
        def __init__(self) -> None:
            self._ready = True

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError("IProfiler.report_layer_time is pure virtual")

    return [Dims, ILogger, Logger, IHostMemory, IProgressMonitor, IProfiler]


def install(
    monkeypatch: pytest.MonkeyPatch, version: str = VERSIONS[0], *, layout: str | None = LAYOUTS[0], **device: Any
) -> FakeTensorRT:
    """Put stand-ins for tensorrt, pycuda, cuda-python and libcuda into this process.

    Args:
        monkeypatch: takes them back.
        version: of TensorRT, one of `VERSIONS`.
        layout: of cuda-python, None leaves it out.
        device: of `FakeDevice`.
    """
    fake = FakeTensorRT(version, FakeDevice(**device))
    install_cuda(fake.device, monkeypatch, layout=layout)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr("edgeprune.plugins.loader._loaded", [])
    return fake


def other_process(folder: Path, version: str = VERSIONS[0], **faults: Any) -> dict[str, str]:
    """Return the environment of a Python process that has the stand-ins from its start, such as a worker.

    Args:
        folder: an empty one, for the module that Python loads first.
        version: of TensorRT.
        faults: of `Faults`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import sys

            class Finder:  # the stand-ins are made when the first of their names is imported
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ("tensorrt", "pycuda", "cuda"):
                        start()
                    return None

            def start():
                sys.meta_path.remove(finder)
                from tests.helpers import fake_trt
                fake_trt.start_process({version!r}, {faults!r})

            finder = Finder()
            import ctypes
            real = ctypes.CDLL

            def load(name, *args, **options):
                if str(name).startswith("libcuda.so") and finder in sys.meta_path:
                    start()
                    return ctypes.CDLL(name)
                return real(name, *args, **options)

            ctypes.CDLL = load
            sys.meta_path.insert(0, finder)
            """
        )
    )
    root = Path(__file__).resolve().parents[2]
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def start_process(version: str, faults: dict[str, Any]) -> None:
    """Install the stand-ins for good; called by what `other_process` writes."""
    patch = SimpleNamespace(
        setitem=lambda held, key, value: held.__setitem__(key, value),
        setattr=lambda *args: _set(*args),
    )
    fake = install(patch, version)  # type: ignore[arg-type]
    fake.faults = Faults(**faults)


def _set(target: Any, name: Any, *value: Any) -> None:
    if isinstance(target, str):  # monkeypatch.setattr("module.name", value)
        path, _, attribute = target.rpartition(".")
        __import__(path)
        setattr(sys.modules[path], attribute, name)
    else:
        setattr(target, name, *value)
