"""Loads a plugin library into the registry of the TensorRT this Python has, and reports what came of it as JSON.

Usage: probe.py LIBRARY [--registered]   (--registered: the library registers itself when it is opened)

Asks the registry alone: without a GPU a builder cannot be made, and TensorRT 8.6 crashes on making a run time.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_lean_bindings as trt

FIELDS = {
    "TopKGather": {"k": 3, "num_prefix_tokens": 1, "order": 1, "mode": 2, "threshold": 0.25},
    "GatherTokens": {"num_prefix_tokens": 2},
    "ScatterTokens": {},
}
MAJOR = int(trt.__version__.split(".")[0])


def fields_of(values: dict[str, float]) -> Any:
    """Return a collection of fields, int32 and float32."""
    made = []
    for name, value in values.items():
        real = isinstance(value, float)
        kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
        made.append(trt.PluginField(name, np.array([value], np.float32 if real else np.int32), kind))
    return trt.PluginFieldCollection(made)


def create(creator: Any, values: dict[str, float], phase: str = "BUILD") -> Any:
    """Return a plugin, or None where the creator refuses."""
    arguments = [getattr(trt.TensorRTPhase, phase)] if MAJOR >= 10 else []
    return creator.create_plugin("layer", fields_of(values), *arguments)


def describe(creator: Any, op: str) -> dict[str, Any]:
    """Return what the plugin of an op tells of itself, before and after copying and storing."""
    plugin = create(creator, FIELDS[op])
    if MAJOR < 10:
        stored = bytes(plugin.serialize())
        restored = creator.deserialize_plugin(op, stored)
        return {
            "name": f"{plugin.plugin_namespace}::{plugin.plugin_type} {plugin.plugin_version}",
            "outputs": plugin.num_outputs,
            "copies_agree": [bytes(p.serialize()) == stored for p in (plugin.clone(), restored)],
            "refuses_damage": creator.deserialize_plugin(op, stored[:-1]) is None,
        }
    # Copying and storing a C++ plugin of this kind is closed to Python; a plan holds the fields it was made of.
    restored = create(creator, FIELDS[op], "RUNTIME")
    core, again = (p.get_capability_interface(trt.PluginCapabilityType.CORE) for p in (plugin, restored))
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    return {
        "name": f"{core.plugin_namespace}::{core.plugin_name} {core.plugin_version}",
        "outputs": build.num_outputs,
        "copies_agree": [again.plugin_name == op],
        "timing_id": build.timing_cache_id,
    }


def main(path: str, registered: bool) -> int:
    """Print the report; 3 when the library is of another generation than this TensorRT, 4 without its creators."""
    library = ctypes.CDLL(path)
    abi = library.edgeprune_plugin_abi()
    if abi != (8 if MAJOR < 10 else 10):
        # Loading it regardless ends in a segmentation fault or in silence, depending on the pair.
        sys.stderr.write(f"{path} is for TensorRT {abi}, this is {trt.__version__}\n")
        return 3
    registry = trt.get_plugin_registry()
    loaded = registered or registry.load_library(path) is not None
    report: dict[str, Any] = {"tensorrt": trt.__version__, "loaded": loaded, "ops": {}}
    find = registry.get_creator if MAJOR >= 10 else registry.get_plugin_creator
    for op, good in FIELDS.items():
        creator = find(op, "1", "edgeprune")
        if creator is None:
            sys.stderr.write(f"TensorRT {trt.__version__} has no creator edgeprune::{op} 1\n")
            return 4
        missing = [{k: v for k, v in good.items() if k != name} for name in good]
        wrong = [{**good, name: 1 if isinstance(value, float) else 0.5} for name, value in good.items()]
        report["ops"][op] = {
            "fields": {field.name: field.type.name for field in creator.field_names},
            "refused": [create(creator, bad) is None for bad in missing + wrong],
            "found_elsewhere": [find(op, "1", "") is not None, find(op, "2", "edgeprune") is not None],
            **describe(creator, op),
        }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--registered" in sys.argv))
