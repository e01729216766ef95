"""What a comparison knows of BASE or HEAD: times in blocks, of one or several engine builds, and their machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeprune.bench.gate_stats import Array
from edgeprune.bench.result import BenchResult
from edgeprune.runtime.manifest import ParityInfo

_REDUCE: dict[str, Callable[..., Any]] = {"median": np.median, "mean": np.mean, "min": np.min}
_CLASS_FIELDS = (
    *("cpu_model", "cpu_flags", "architecture", "logical_cores", "usable_cores", "threads_per_core", "governor"),
)
_BOARD_FIELDS = ("l4t", "nvpmodel", "jetson_clocks")


@dataclass(frozen=True)
class Side:
    """What is known of BASE or HEAD.

    Attributes:
        name: for people.
        segments: runner -> samples [blocks, 2, calls] in milliseconds, one mapping per stretch of measuring.
        builds: in place of segments: for each run of the measurement the engine builds that took turns in it.
        unstable: why its times should not be trusted.
        parity: agreement of the graph with PyTorch, of a bundle.
        top1: graph -> share of images classified right, where it was evaluated.
    """

    name: str
    segments: list[dict[str, Array]] = field(default_factory=list)
    builds: list[list[Side]] = field(default_factory=list)
    unstable: Sequence[str] = ()
    parity: ParityInfo | None = None
    top1: Mapping[str, float] = field(default_factory=dict)

    def runners(self) -> list[str]:
        """Return the names of the graphs the gate looks at: the pruned ones, or the dense one of a dense bundle."""
        segments = self.builds[0][0].segments if self.builds else self.segments
        names = list(segments[0]) if segments else []
        pruned = [name for name in names if name.startswith("pruned")]
        return pruned or [name for name in names if name == "dense"]

    def times(self, runner: str, stat: str) -> Array:
        """Return a value per block [blocks]: the mean over its two visits of the visit's median, mean or minimum."""
        reduce = _REDUCE[stat]
        return np.concatenate([reduce(segment[runner], axis=2).mean(axis=1) for segment in self.segments])

    def cost(self, runner: str, stat: str) -> Array | None:
        """Return what is to stay small [blocks]: times, or for speedup pruned / dense; None where not measured.

        Of several builds it is their median in each block: what the next build may be expected to take.
        """
        if self.builds:
            costs = self._costs_of_builds(runner, stat)
            return None if costs is None else np.concatenate([np.median(run, axis=0) for run in costs])
        if not self.segments or runner not in self.segments[0]:
            return None
        if stat != "speedup":
            return self.times(runner, stat)
        if runner == "dense" or "dense" not in self.segments[0]:
            return None
        return self.times(runner, "median") / self.times("dense", "median")

    def spread(self, runner: str, stat: str) -> float | None:
        """Return by what share the dearest build of a run is above the cheapest, in the run where that is most.

        None without builds, or where the graph was not measured.
        """
        costs = self._costs_of_builds(runner, stat)
        if not costs:
            return None
        middles = [np.median(run, axis=1) for run in costs]
        return max(float(run.max() / run.min()) - 1 for run in middles)

    def _costs_of_builds(self, runner: str, stat: str) -> list[Array] | None:
        """Return the costs [builds, blocks] in each run."""
        found = []
        for run in self.builds:
            costs = [cost for build in run if (cost := build.cost(runner, stat)) is not None]
            if not costs:
                return None
            found.append(np.stack(costs))
        return found

    def joined(self, other: Side) -> Side:
        """Return a side with the blocks of both."""
        return replace(self, segments=[*self.segments, *other.segments], builds=[*self.builds, *other.builds])


def side_of(result: BenchResult, name: str) -> Side:
    """Return the side of a stored result, times on the clock its ratios are made of."""
    shape = (-1, 2, result.calls_per_visit)
    segment = {}
    for runner in result.runners:
        times = np.asarray(runner.cpu_ms if result.clock == "cpu" else runner.wall_ms, dtype=np.float64)
        whole = len(times) // (2 * result.calls_per_visit) * 2 * result.calls_per_visit
        if whole:
            segment[runner.name] = times[:whole].reshape(shape)
    return Side(name, [segment], unstable=tuple(result.unstable))


def class_differences(base: BenchResult, head: BenchResult) -> list[str]:
    """Return why the samples of two results cannot be compared; empty when they are of one fingerprint class."""
    one, two = fingerprint_class(base), fingerprint_class(head)
    return [f"{key}: {one.get(key)} against {two.get(key)}" for key in one if one.get(key) != two.get(key)]


def fingerprint_class(result: BenchResult) -> dict[str, Any]:
    """Return what two results must share: machine, power mode, TensorRT's minor version, and how they were measured."""
    found = result.fingerprint
    gpu, packages, board = (found.get(name) or {} for name in ("gpu", "packages", "jetson"))
    tensorrt = packages.get("tensorrt")
    scenario = None if result.scenario is None else result.scenario.text
    return {
        **{name: found.get(name) for name in _CLASS_FIELDS},
        **{name: board.get(name) for name in _BOARD_FIELDS},
        "gpu": gpu.get("name"),
        "TensorRT": None if tensorrt is None else ".".join(str(tensorrt).split(".")[:2]),
        "model": result.bundle.get("model"),
        "target": result.bundle.get("target"),
        "batch": result.batch,
        "threads": result.threads,
        "clock": result.clock,
        "data": result.data,
        "images": result.images,
        "runs per sample": result.runs_per_sample,
        "scenario": scenario or "single-stream",
    }
