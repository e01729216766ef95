"""Reports of made-up results, for the tests of the page and of the browser."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from edgeprune.bench.energy import EnergyResult
from edgeprune.bench.html import Accuracies, GraphAccuracy, ReportInput
from edgeprune.bench.html.overlays import Drop, Keep, Overlays, Picture
from edgeprune.bench.layers import LayersResult, PartTime
from edgeprune.bench.result import BenchResult, results_of
from tests.helpers.bench import summary

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP8AAAAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


def times(median: float, count: int = 80) -> list[float]:
    """Return samples that spread a little around a median; the last one is an outlier."""
    spread = [median * (1 + 0.01 * ((i * 7) % 11 - 5) / 5) for i in range(count - 1)]
    return [*spread, 4 * median]


def trained(**fields: Any) -> BenchResult:
    """Return a result with a checkpoint's weights and samples that move a little, as a file gives it back."""
    fields = {"weights": {"source": "checkpoint", "file": "a.safetensors"}, **fields}
    result = summary({"dense": times(100.0), "pruned": times(62.5), "random": times(62.0)}, rounds=80, **fields)
    return results_of(plain(result.to_dict()))[0]


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))


def full(result: BenchResult) -> BenchResult:
    """Return a result with energy and with times by part of the network."""
    energy = EnergyResult(0.5, 0.3, 12.0, 4.0, "counter", "rapl", "package-0", 5.0, 100, 60)
    parts = [PartTime("attention", 30.0, 0.6, 12), PartTime("mlp", 20.0, 0.4, 12)]
    layers = [LayersResult(n, [n], "onnxruntime profiler", 9, 52.0, parts) for n in ("dense", "pruned")]
    runners = [replace(r, energy=energy) for r in result.runners]
    return replace(result, runners=runners, layers=layers)


def accuracies(result: BenchResult, **fields: Any) -> Accuracies:
    """Return accuracies of the bundle of a result."""
    graphs = {"dense": GraphAccuracy(0.976, 0.99, 500), "model": GraphAccuracy(0.97, 0.99, 500)}
    known = {"name": "bundle", "identity": result.bundle, "data": "digits", "emulated": None, "graphs": graphs}
    return Accuracies(**{**known, **fields})


def overlays() -> Overlays:
    """Return two densities of two stages over one image of 2 x 2 patches."""
    half = Keep([Drop("M0 0h1v1h-1z", 3), Drop("M1 0h1v1h-1z", 2)], "7 (90.0 %)", True, False)
    less = Keep([Drop("M0 0h2v1h-2z", 2), Drop("M0 1h1v1h-1z", 1)], "8 (60.0 %)", False, False)
    stages = ["in front of block 3", "in front of block 6"]
    return Overlays("a model", 2, 2, ["0.7", "0.5"], stages, [Picture("one", PIXEL, True, [half, less])], None, False)


def report(*results: BenchResult) -> ReportInput:
    """Return the input of a report with accuracies for every result."""
    return ReportInput(results=list(results), accuracies=[accuracies(r) for r in results])
