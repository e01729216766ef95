"""Where the time of a graph went, by part of the network."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("embed", "attention", "mlp", "norm", "selection", "head", "other")


@dataclass(frozen=True)
class PartTime:
    """One part of the network.

    Attributes:
        part: of `PARTS`; "selection" is choosing tokens, scoring and gathering them included, and "other" what belongs
            to none.
        ms: of one run; None where only the names of the layers are known.
        share: of all parts.
        nodes: that belong to it.
    """

    part: str
    ms: float | None
    share: float | None
    nodes: int


@dataclass(frozen=True)
class NodeTime:
    """One node, or one layer of an engine that several nodes were fused to."""

    name: str
    op: str
    part: str
    ms: float | None


@dataclass(frozen=True)
class LayersResult:
    """Where the time of one graph went.

    Attributes:
        runner: whose.
        graphs: of the bundle that it ran.
        source: "onnxruntime profiler", "tensorrt profiler", or "tensorrt inspector" for names without times.
        runs: profiled; the times are medians over them.
        wall_ms: median of a run while it was profiled, None where it was not run.
        parts: in the order of `PARTS`, those that have a node.
        nodes: the slowest ones, slowest first.
        note: what to know about the times.
    """

    runner: str
    graphs: list[str]
    source: str
    runs: int
    wall_ms: float | None
    parts: list[PartTime]
    nodes: list[NodeTime] = field(default_factory=list)
    note: str | None = None
