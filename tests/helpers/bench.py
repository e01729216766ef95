"""Results of a bench worked out of made-up times."""

from __future__ import annotations

from typing import Any

from edgeprune.bench.measure import Measurement, Samples
from edgeprune.bench.result import BenchResult, BenchSetting, Extras, MachineResult
from edgeprune.bench.summary import summarise
from edgeprune.runtime.manifest import Manifest

TENSOR = {"name": "images", "dtype": "float32", "shape": [1, 3, 224, 224]}
GRAPH = {"file": "model.onnx", "inputs": [TENSOR], "outputs": [TENSOR]}
QUIET = MachineResult(0.1, 0.2, 0.0, 0.0, [2000.0, 2000.0])
MANIFEST: dict[str, Any] = {
    "tool_version": "0",
    "created": "2026-01-01T00:00:00+00:00",
    "model": {"name": "deit", "parameters": 22, "config": None},
    "weights": {"source": "random", "seed": 0},
    "method": {
        "name": "evit",
        "keep_rate": 0.7,
        "stages": [{"index": 0, "block": 3, "where": "mid_block", "tokens_in": 196, "kept": 138, "fused": 0}],
    },
    "target": "ort-cpu",
    "precision": "fp32",
    "opset": 17,
    "batch": (1, 8),
    "lowering": "emitted",
    "selection": "native",
    "dead_rows": True,
    "macs": {"dense": 4_500, "pruned": 3_000, "dense_executed": 4_400, "pruned_executed": 2_750},
    "graphs": {"model": GRAPH, "dense": GRAPH, "random": GRAPH},
    "preprocessing": {
        "image_size": (224, 224),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    },
    "files": {},
}


def summary(
    times: dict[str, float | list[float]],
    *,
    rounds: int = 20,
    warm: bool = True,
    clock: Any = "cpu",
    cpu_factor: float = 1.0,
    machine: MachineResult = QUIET,
    batch: int = 1,
    quick: bool = False,
    extras: Extras | None = None,
    **manifest: Any,
) -> BenchResult:
    """Return the result of made-up times, milliseconds by runner."""
    samples = {}
    for name, value in times.items():
        wall = value if isinstance(value, list) else [value] * rounds
        samples[name] = Samples(list(wall), [t * cpu_factor for t in wall])
    measurement = Measurement(samples, rounds, 1, 6, warm, 12.0)
    return summarise(
        Manifest.model_validate({**MANIFEST, **manifest}),
        measurement,
        BenchSetting(batch, 1, quick, 0, clock),
        machine=machine,
        fingerprint={"cpu_model": "some"},
        created="2026-01-01T00:00:00+00:00",
        extras=extras,
    )
