"""The result of a bench as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from edgeprune.bench.adaptive import AdaptiveResult
from edgeprune.bench.callers import CallersResult
from edgeprune.bench.energy import EnergyResult
from edgeprune.bench.images import NOISE
from edgeprune.bench.layers import LayersResult
from edgeprune.bench.measure import WarmupResult
from edgeprune.bench.scenarios import ScenarioResult
from edgeprune.bench.stats import Percentile, Ratio
from edgeprune.bench.telemetry import TelemetryResult
from edgeprune.errors import InputError

SCHEMA = "edgeprune-bench/1"
SWEEP_SCHEMA = "edgeprune-bench-sweep/1"
RatioClock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class RunnerResult:
    """One graph's samples and what they say.

    Attributes:
        wall_ms, cpu_ms: raw samples, one run of the whole batch each; of an adaptive bundle the mean run of one pass
            over all images; with multi-stream one query each, with fixed-fps from the moment a frame was due.
        gpu_ms, enqueue_ms: raw samples of the time between events on the device, and of giving it the work, in the
            order of `wall_ms`; None where the backend does not tell them.
        at_s: when each sample began, seconds since the measuring did; only with the scenario sustained.
        energy: of an image, where the machine tells its power.
        percentiles: of the wall time, keys "p90", "p95", "p99".
        speedup: how many times faster than the dense graph, paired; None for the dense graph itself.
        outliers: samples above three times the median wall time; none is removed.
    """

    name: str
    label: str
    n: int
    median_wall_ms: float
    median_cpu_ms: float
    percentiles: dict[str, Percentile]
    max_wall_ms: float
    outliers: int
    cv_wall: float
    cv_cpu: float
    images_per_s: float
    speedup: Ratio | None
    wall_ms: list[float]
    cpu_ms: list[float]
    median_gpu_ms: float | None = None
    median_enqueue_ms: float | None = None
    gpu_ms: list[float] | None = None
    enqueue_ms: list[float] | None = None
    at_s: list[float] | None = None
    energy: EnergyResult | None = None


@dataclass(frozen=True)
class MacsResult:
    """Multiply-accumulates of one image, in giga.

    Attributes:
        pruned_g: where the image decides what is computed, the mean over the images measured.
        dense_executed_g, pruned_executed_g: what the graphs compute; None where the image decides.
        ratio: dense / pruned as the literature counts both.
        ideal_speedup: dense / pruned as the two graphs execute them; time would follow it if every
            multiply-accumulate cost the same.
    """

    dense_g: float
    pruned_g: float
    dense_executed_g: float | None
    pruned_executed_g: float | None
    ratio: float
    ideal_speedup: float | None


@dataclass(frozen=True)
class DensityResult:
    """One keep rate of a bundle that holds several.

    Attributes:
        runner: its name among the runners; a keep rate that drops nothing is the dense graph.
        macs: with what the density prunes, its own multiply-accumulates.
        efficiency_nominal, efficiency_own: as of the whole result.
    """

    keep_rate: float
    runner: str
    macs: MacsResult | None
    speedup: Ratio | None
    efficiency_nominal: Ratio | None
    efficiency_own: Ratio | None


@dataclass(frozen=True)
class MemoryResult:
    """Resident memory of the process (Pss, MiB) before and after a session was opened, None where unreadable.

    What sessions share, such as a file of weights, counts with the first of them.
    """

    session: str
    before_mib: float | None
    after_mib: float | None


@dataclass(frozen=True)
class MachineResult:
    """What else ran while measuring; None where the machine does not tell.

    Attributes:
        other_cores: cores that other processes kept busy.
        steal: share of the time a hypervisor gave to others.
        mhz: clock readings, one per block.
    """

    load_1min_before: float | None
    load_1min_after: float | None
    other_cores: float | None
    steal: float | None
    mhz: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class BenchResult:
    """A bench of one bundle.

    Attributes:
        clock: what ratios are made of: "cpu" (processor time, with one thread) or "wall".
        data: what the images are: "noise", "digits", or "imagefolder:" with the directory's name.
        images: different images of one sample.
        runs_per_sample: runs a sample is the mean of; 1 unless the bundle is adaptive.
        speedup: dense / pruned, paired; None for a dense bundle. With several densities, of the first that prunes.
        naive_over_dense, naive_over_pruned: paired ratios, None without the naive baseline.
        efficiency_nominal: measured speed-up / nominal MACs ratio.
        efficiency_own: measured speed-up / ratio of the MACs both graphs execute.
        selection_overhead: (pruned - random) / pruned, a share.
        random_weights: the weights were drawn at random; speed is real, outputs mean nothing.
        unstable: why not to trust the numbers; empty when they are steady.
        adaptive: what images kept and their runs took, of a bundle where the image decides.
        densities: in the order of the manifest; none when there is only one.
        switch_us: median microseconds of setting a session's density.
        memory: one entry per session, in the order they were opened.
        callers: several threads on one session, when asked for.
        scenario: how runs followed each other; None in results of versions that knew single-stream only.
        warmup: what was run before; None likewise.
        telemetry: temperature, clocks, throttling and power while measuring; None where the machine tells nothing.
        layers: where the time of each graph went, when asked for.
        quantization_gain: float32 / quantized, paired, of the first graph that prunes; None where float32 was not
            measured.
    """

    schema: str
    created: str
    bundle: dict[str, Any]
    random_weights: bool
    batch: int
    threads: int
    quick: bool
    seed: int
    clock: RatioClock
    data: str
    images: int
    runs_per_sample: int
    rounds: int
    blocks: int
    calls_per_visit: int
    warmup_rounds: int
    elapsed_s: float
    runners: list[RunnerResult]
    speedup: Ratio | None
    naive_over_dense: Ratio | None
    naive_over_pruned: Ratio | None
    macs: MacsResult | None
    efficiency_nominal: Ratio | None
    efficiency_own: Ratio | None
    selection_overhead: Ratio | None
    unstable: list[str]
    warnings: list[str]
    machine: MachineResult
    fingerprint: dict[str, Any]
    adaptive: AdaptiveResult | None = None
    densities: list[DensityResult] = field(default_factory=list)
    switch_us: float | None = None
    memory: list[MemoryResult] = field(default_factory=list)
    callers: CallersResult | None = None
    scenario: ScenarioResult | None = None
    warmup: WarmupResult | None = None
    telemetry: TelemetryResult | None = None
    layers: list[LayersResult] = field(default_factory=list)
    quantization_gain: Ratio | None = None

    def runner(self, name: str) -> RunnerResult | None:
        """Return a graph's result by name, None when it was not measured."""
        return next((r for r in self.runners if r.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class SweepCase:
    """One bench of a sweep: a bundle at one batch.

    Attributes:
        bundle: the bundle's directory name, without its path.
        keep_rates: of the pruned graphs in the result, in the order of its runners.
    """

    bundle: str
    batch: int
    keep_rates: list[float]
    result: BenchResult


@dataclass(frozen=True)
class SweepResult:
    """Benches over keep rates and batches, one after the other.

    Attributes:
        keep_rates: asked for; empty when all were taken that the bundles hold.
    """

    schema: str
    created: str
    keep_rates: list[float]
    batches: list[int]
    cases: list[SweepCase]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class BenchSetting:
    """What was asked for; `clock` is the one ratios are made of, the others are as in the result.

    Attributes:
        images_per_sample: of a sample, or of the mean run of one; None for the batch.
        on_device: a GPU does the work.
    """

    batch: int
    threads: int
    quick: bool
    seed: int
    clock: RatioClock
    data: str = NOISE
    images: int = 1
    runs_per_sample: int = 1
    images_per_sample: int | None = None
    on_device: bool = False


@dataclass(frozen=True)
class Extras:
    """What is measured beside the times of the runners, as in the result.

    Attributes:
        mean_macs: pruned runner -> multiply-accumulates of an image, where the image decides.
        energy: by runner.
    """

    adaptive: AdaptiveResult | None = None
    mean_macs: Mapping[str, float] = field(default_factory=dict)
    switch_us: float | None = None
    memory: Sequence[MemoryResult] = ()
    callers: CallersResult | None = None
    scenario: ScenarioResult | None = None
    telemetry: TelemetryResult | None = None
    energy: Mapping[str, EnergyResult] = field(default_factory=dict)
    layers: Sequence[LayersResult] = ()


def read_results(path: Path | str) -> list[BenchResult]:
    """Return the result that `edgeprune bench -o` wrote, or those of all cases of a sweep.

    Raises:
        InputError: `result-unreadable` when the file is not one.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    return results_of(document, path)


def results_of(document: Any, path: Path | str = "-") -> list[BenchResult]:
    """Return the results that a document holds, as `read_results` does.

    Args:
        document: what a result file says.
        path: of the file, for errors.

    Raises:
        InputError: `result-unreadable`.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    try:
        if schema == SWEEP_SCHEMA:
            return [case.result for case in TypeAdapter(SweepResult).validate_python(document).cases]
        if schema == SCHEMA:
            return [TypeAdapter(BenchResult).validate_python(document)]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"{place}: {first['msg']}") from error
    raise _unreadable(path, f"its schema is {schema!r}")


def _unreadable(path: Path | str, why: str) -> InputError:
    return InputError(
        f"'{path}' is no result of a bench: {why}",
        code="result-unreadable",
        expected=f"a file that `edgeprune bench BUNDLE -o FILE` wrote, schema {SCHEMA} or {SWEEP_SCHEMA}",
        details={"path": str(path)},
    )
