"""Which kernels ONNX Runtime ran for which node, by its profiler; whether integer layers ran on integers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgeprune.runtime.ort import OrtBackend

INTEGER = frozenset({"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"})
_LINEAR = re.compile(r"(blocks\.\d+)\.(?:attn\.(?P<part>[qkv])|(?P<rest>attn\.proj|mlp\.fc[12]))$")


@dataclass(frozen=True)
class NodeRun:
    """One run of a node: the operator that ran, which may be another one than the file's, and what it took."""

    name: str
    op: str
    ms: float


def linear_layer(node: str) -> str | None:
    """Return the linear layer a node computes, or a part of it; None for other nodes."""
    found = _LINEAR.match(node)
    return None if found is None else f"{found[1]}.{found['rest'] or 'attn.qkv'}"


def profile_nodes(
    open_backend: Callable[..., OrtBackend], feeds: dict[str, np.ndarray], runs: int = 5
) -> list[NodeRun]:
    """Return what ran, each node once with the median milliseconds of some runs.

    Args:
        open_backend: opens the graph; called with `profile`.
        feeds: of every run.
        runs: after one to warm up.
    """
    with TemporaryDirectory(prefix="edgeprune-profile-") as folder:
        backend = open_backend(profile=Path(folder) / "profile")
        for _ in range(1 + runs):
            backend.run(feeds)
        ran = list(read_profile(backend.end_profiling()))
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in ran:
        took[node.name, node.op].append(node.ms)
    return [NodeRun(name, op, median(times[1:] or times)) for (name, op), times in took.items()]


def read_profile(path: Path) -> Iterator[NodeRun]:
    """Yield every run of a node that ONNX Runtime's profiler wrote to a file, in the order of time."""
    return node_runs(json.loads(path.read_text(encoding="utf-8")))


def node_runs(events: Iterable[Mapping[str, Any]]) -> Iterator[NodeRun]:
    """Yield the runs of nodes among the events of ONNX Runtime's profiler."""
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            op = str(event.get("args", {}).get("op_name", ""))
            yield NodeRun(name.removesuffix("_kernel_time"), op, float(event["dur"]) / 1000)


def integer_layers(nodes: Collection[NodeRun]) -> set[str]:
    """Return the linear layers of which something ran on integers."""
    return {layer for node in nodes if node.op in INTEGER and (layer := linear_layer(node.name)) is not None}


def float_layers(nodes: Collection[NodeRun], kept_float: Collection[str]) -> list[str]:
    """Return the linear layers that ran on floats and were not meant to, each with the kernel that did it."""
    found = []
    for node in nodes:
        layer = linear_layer(node.name)
        if layer is not None and layer not in kept_float and node.op not in INTEGER:
            found.append(f"{node.name} ran as {node.op}")
    return found
