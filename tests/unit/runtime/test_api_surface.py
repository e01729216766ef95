"""Every name of TensorRT, PyCUDA and cuda-python that the sources use exists in the real packages, or is asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_cuda import LAYOUTS, surface
from tests.helpers.fake_trt import VERSIONS

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(
    [
        ROOT / "edgeprune/plugins/loader.py",
        *(ROOT / "edgeprune/runtime" / name for name in ("engine_backend.py", "trt.py")),
        *(ROOT / "export/trt").glob("*.py"),
    ]
)
# the classes whose objects the sources hold; others have attributes of the same names as everything in Python
CLASSES = {
    *("Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "ITimingCache", "IProgressMonitor"),
    *("OnnxParser", "ParserError", "ILayer", "ITensor", "IHostMemory", "EngineInspector", "ILogger", "Logger"),
    *("Runtime", "ICudaEngine", "IExecutionContext", "IPluginRegistry", "IPluginCreator", "IProfiler"),
}
# a name that only some versions have -> what is asked for in the same file before it is used
BEHIND = {
    "create_execution_context_without_device_memory": "ExecutionContextAllocationStrategy",
    "USER_MANAGED": "ExecutionContextAllocationStrategy",
    "device_memory_size": "device_memory_size_v2",
    "get_plugin_creator": "get_creator",
    "set_output_type": "OBEY_PRECISION_CONSTRAINTS",
}
OURS = {"precision"}  # attributes of our own objects that TensorRT 8.6 has too
LIBCUDA = {
    *("cuInit", "cuDeviceGet", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2"),
    "cuDriverGetVersion",
}


def names_of(version: str) -> set[str]:
    """Return the names of the module, of enum members, and of attributes of the classes that are used."""
    held = surface(version)
    found = {*held["functions"], *(key.split()[-1] for key in held if " " in key)}
    for key, inside in held.items():
        kind, _, name = key.partition(" ")
        if kind == "enum" or name in CLASSES:
            found |= set(inside)
    return found


OLD, NEW = (names_of(version) for version in VERSIONS)


def attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def asked(tree: ast.AST) -> set[str]:
    """Return the names given to getattr and hasattr."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return {
        str(call.args[1].value)
        for call in calls
        if call.func.id in ("getattr", "hasattr") and isinstance(call.args[1], ast.Constant)  # type: ignore[attr-defined]
    }


def owner(node: ast.Attribute) -> str:
    """Return the last word before the dot."""
    value = node.value
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_name_of_one_version_alone_is_asked_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    known = asked(tree)
    wrong = {
        node.attr
        for node in attributes(tree)
        if node.attr in OLD ^ NEW and node.attr not in OURS | known and BEHIND.get(node.attr) not in known
    }
    assert wrong == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_module_has_what_is_taken_of_it(path: Path) -> None:
    taken = {node.attr for node in attributes(ast.parse(path.read_text())) if owner(node) in ("trt", "tensorrt")}
    assert {name for name in taken if not name.startswith("__")} <= OLD | NEW


def test_pycuda_and_cuda_python_have_what_is_taken_of_them() -> None:
    held = surface("cuda")
    tree = ast.parse((ROOT / "edgeprune/runtime/cuda.py").read_text())
    taken = {node.attr for node in attributes(tree) if owner(node) in ("driver", "_driver")}
    pycuda = {*held["functions"], *held["exceptions"], *(k.split()[1] for k in held if k.startswith("class "))}
    both = set.intersection(*(set(held[f"module {layout}"]) for layout in LAYOUTS))
    assert len(taken & both) > 4 and len(taken & pycuda) > 8, "the walk sees them"
    assert taken - LIBCUDA <= pycuda | both


def test_the_calls_of_objects_of_pycuda_exist() -> None:
    held: dict[str, Any] = surface("cuda")
    used = {
        "Context": {"push", "pop"},
        "Device": {"retain_primary_context"},
        "Stream": {"handle"},
        "Event": {"record", "query", "synchronize"},
        "DeviceAllocation": {"free"},
        "PagelockedHostAllocation": {"free"},
        "HostPointer": {"get_device_pointer"},
        "event_flags": {"DISABLE_TIMING"},
        "host_alloc_flags": {"DEVICEMAP"},
    }
    source = {node.attr for node in attributes(ast.parse((ROOT / "edgeprune/runtime/cuda.py").read_text()))}
    for name, attributes_used in used.items():
        assert attributes_used <= set(held[f"class {name}"]) and attributes_used <= source
    assert "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL" in held[f"module {LAYOUTS[1]}"]["CUstreamCaptureMode"]


def test_the_walk_finds_what_it_looks_for() -> None:
    tree = ast.parse("if hasattr(a, 'set_device_memory'):\n    a.set_device_memory(1)\nself.trt.BuilderFlag.FP16")
    assert asked(tree) == {"set_device_memory"}
    assert {(owner(node), node.attr) for node in attributes(tree)} >= {("trt", "BuilderFlag"), ("BuilderFlag", "FP16")}
    assert "FP16" in OLD ^ NEW
