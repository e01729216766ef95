"""Where the time of TensorRT engines goes: what its profiler times, told apart by the ONNX nodes in each layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from edgeprune.bench import stats
from edgeprune.bench.layers import NodeTime, locate, part_of
from edgeprune.export.trt.inspector import Layer, read_layers, read_line
from edgeprune.runtime.timing import LayerLog

SOURCE = "tensorrt profiler"
NOTE = (
    "TensorRT's profiler waits for every layer, and nothing runs as a CUDA graph meanwhile: the times do not add up to "
    "the latency, shares are worth more than milliseconds; a layer made of several parts counts to the one most of its "
    "nodes are of, and as fused where that cannot be told"
)
# what stands between the names of nodes in a layer's: "a + b", "PWN(PWN(a), b)", "{ForeignNode[a...b]}"
_BETWEEN = re.compile(r"\s\+\s|\bPWN\(|[(),{}]")
_WHOLE = ("embed", "head")  # nothing of another part lies between two nodes of these


def engine_nodes(logs: Iterable[LayerLog], runs: int, per_run: int = 1) -> list[NodeTime]:
    """Return what each layer takes in a run, from what TensorRT's profiler told.

    Args:
        logs: of all engines and profiles that ran.
        runs: profiled calls.
        per_run: runs of a call, over which the time is spread.
    """
    return [node for log in logs for node in _nodes(log, runs, per_run)]


def _nodes(log: LayerLog, runs: int, per_run: int) -> Iterator[NodeTime]:
    known = {(layer.profile, layer.name): layer for layer in _told(log.information)}
    for name, times in log.times.items():
        said = read_line(name)
        layer = known.get((log.profile, said.name)) or known.get((0, said.name)) or said
        calls = len(times) / runs / per_run  # of one run; several where images run one by one or routed
        yield NodeTime(layer.name, layer.kind, part_of_layer(layer), stats.median(times) * calls)


def _told(information: str) -> list[Layer]:
    """Return what the inspector tells, nothing where it cannot be read: the names of layers say most of it too."""
    try:
        return read_layers(information)
    except ValueError:
        return []


def part_of_layer(layer: Layer) -> str:
    """Return the part of the network that a layer of an engine belongs to.

    A change of layout or type is "reformat", fused attention is "attention" whatever else it holds. Others go by the
    ONNX nodes they were made of: to the part that most of them are of, those of none left out. "fused" is a layer with
    as many of two parts, and one of several parts that the inspector does not open, since the number of nodes says
    nothing of the time there.
    """
    if layer.is_reformat:
        return "reformat"
    if layer.is_fused_attention:
        return "attention"
    if layer.group is not None and not layer.metadata:
        return _part_between(*layer.group)
    names = layer.metadata or tuple(_BETWEEN.split(layer.name))
    counts = Counter(part for part in map(part_of, names) if part != "other")
    if len(counts) < 2:
        return next(iter(counts), "other")
    (most, n), (_, m) = counts.most_common(2)
    return "fused" if layer.is_opaque or n == m else most


def _part_between(first: str, last: str) -> str:
    """Return the part of all nodes from one to another: known only when both lie in the same module of a part."""
    (part, module), (other, end) = locate(first), locate(last)
    if part == other and (part in _WHOLE or module == end):
        return part
    return "fused"
