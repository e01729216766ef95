"""The result of a bench as data, and how it is worked out of a measurement: all pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from numpy import float64
from numpy.typing import NDArray

from edgeprune.bench import stats
from edgeprune.bench.measure import Measurement, Samples
from edgeprune.bench.stats import Percentile, Ratio
from edgeprune.runtime.manifest import Manifest

SCHEMA = "edgeprune-bench/1"
MAX_REASONS = 4  # in the notes; the result holds all
RatioClock = Literal["cpu", "wall"]
_CLOCK_TEXTS: dict[RatioClock, str] = {"wall": "wall time", "cpu": "processor time"}
LABELS = {
    "dense": "dense graph of the same target",
    "pruned": "pruned graph",
    "random": "same token counts, constant positions, no scores",
    "naive": "dense, torch.onnx export in its defaults, random weights",
}


@dataclass(frozen=True)
class RunnerResult:
    """One graph's samples and what they say.

    Attributes:
        wall_ms, cpu_ms: raw samples, one run of the whole batch each.
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


@dataclass(frozen=True)
class MacsResult:
    """Multiply-accumulates of one image, in giga.

    Attributes:
        ratio: dense / pruned as the literature counts both.
        ideal_speedup: dense / pruned as the two graphs execute them; time would follow it if every
            multiply-accumulate cost the same.
    """

    dense_g: float
    pruned_g: float
    dense_executed_g: float
    pruned_executed_g: float
    ratio: float
    ideal_speedup: float


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
        speedup: dense / pruned, paired; None for a dense bundle.
        naive_over_dense, naive_over_pruned: paired ratios, None without the naive baseline.
        efficiency_nominal: measured speed-up / nominal MACs ratio.
        efficiency_own: measured speed-up / ratio of the MACs both graphs execute.
        selection_overhead: (pruned - random) / pruned, a share.
        random_weights: the weights were drawn at random; speed is real, outputs mean nothing.
        unstable: why not to trust the numbers; empty when they are steady.
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

    def runner(self, name: str) -> RunnerResult | None:
        """Return a graph's result by name, None when it was not measured."""
        return next((r for r in self.runners if r.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class BenchSetting:
    """What was asked for; `clock` is the one ratios are made of."""

    batch: int
    threads: int
    quick: bool
    seed: int
    clock: RatioClock


def summarise(
    manifest: Manifest,
    measurement: Measurement,
    setting: BenchSetting,
    *,
    machine: MachineResult,
    fingerprint: Mapping[str, Any],
    created: str,
    warnings: list[str] | None = None,
) -> BenchResult:
    """Work the result of a bench out of its samples.

    Args:
        manifest: of the bundle.
        measurement: of the runners "dense" and, as far as there are, "pruned", "random", "naive".
        setting: batch, threads and the like.
        machine: what else ran.
        fingerprint: of the environment.
        created: UTC time of the run.
        warnings: to pass on.
    """
    blocks = {name: _blocks(s, setting.clock, measurement) for name, s in measurement.samples.items()}

    def ratio(top: str, bottom: str) -> Ratio | None:
        if top not in blocks or bottom not in blocks:
            return None
        return stats.paired_ratio(blocks[top], blocks[bottom], seed=setting.seed)

    speedup, rest = ratio("dense", "pruned"), ratio("random", "pruned")
    macs = _macs(manifest) if "pruned" in blocks else None
    return BenchResult(
        schema=SCHEMA,
        created=created,
        bundle=_bundle_fields(manifest),
        random_weights=manifest.weights.source == "random",
        batch=setting.batch,
        threads=setting.threads,
        quick=setting.quick,
        seed=setting.seed,
        clock=setting.clock,
        rounds=measurement.rounds,
        blocks=measurement.rounds // 2,
        calls_per_visit=measurement.calls_per_visit,
        warmup_rounds=measurement.warmup_rounds,
        elapsed_s=measurement.elapsed_s,
        runners=[
            _runner(name, samples, measurement, setting, ratio("dense", name) if name != "dense" else None)
            for name, samples in measurement.samples.items()
        ],
        speedup=speedup,
        naive_over_dense=ratio("naive", "dense"),
        naive_over_pruned=ratio("naive", "pruned"),
        macs=macs,
        efficiency_nominal=speedup.scaled(1 / macs.ratio) if speedup and macs else None,
        efficiency_own=speedup.scaled(1 / macs.ideal_speedup) if speedup and macs else None,
        selection_overhead=rest.complement() if rest else None,
        unstable=_unstable(measurement, machine),
        warnings=[*manifest.warnings, *(warnings or [])],
        machine=machine,
        fingerprint=dict(fingerprint),
    )


def _blocks(samples: Samples, clock: RatioClock, measurement: Measurement) -> NDArray[float64]:
    times = samples.cpu_ms if clock == "cpu" else samples.wall_ms
    return stats.block_values(times, measurement.calls_per_visit)


def _runner(
    name: str, samples: Samples, measurement: Measurement, setting: BenchSetting, speedup: Ratio | None
) -> RunnerResult:
    median_wall = stats.median(samples.wall_ms)
    return RunnerResult(
        name=name,
        label=LABELS.get(name, name),
        n=len(samples.wall_ms),
        median_wall_ms=median_wall,
        median_cpu_ms=stats.median(samples.cpu_ms),
        percentiles={f"p{q}": stats.percentile(samples.wall_ms, q) for q in stats.PERCENTILE_MIN_SAMPLES},
        max_wall_ms=max(samples.wall_ms),
        outliers=stats.count_outliers(samples.wall_ms),
        cv_wall=stats.coefficient_of_variation(_blocks(samples, "wall", measurement)),
        cv_cpu=stats.coefficient_of_variation(_blocks(samples, "cpu", measurement)),
        images_per_s=setting.batch * 1000 / median_wall,
        speedup=speedup,
        wall_ms=samples.wall_ms,
        cpu_ms=samples.cpu_ms,
    )


def _macs(manifest: Manifest) -> MacsResult | None:
    macs = manifest.macs
    if macs is None:
        return None
    return MacsResult(
        dense_g=macs.dense / 1e9,
        pruned_g=macs.pruned / 1e9,
        dense_executed_g=macs.dense_executed / 1e9,
        pruned_executed_g=macs.pruned_executed / 1e9,
        ratio=macs.dense / macs.pruned,
        ideal_speedup=macs.dense_executed / macs.pruned_executed,
    )


def _bundle_fields(manifest: Manifest) -> dict[str, Any]:
    """Return what identifies the bundle in a report."""
    return {
        "model": manifest.model.name,
        "parameters": manifest.model.parameters,
        "method": manifest.method.model_dump(mode="json"),
        "target": manifest.target,
        "precision": manifest.precision,
        "lowering": manifest.lowering,
        "selection": manifest.selection,
        "dead_rows": manifest.dead_rows,
        "weights": manifest.weights.model_dump(mode="json"),
        "tool_version": manifest.tool_version,
    }


def _unstable(measurement: Measurement, machine: MachineResult) -> list[str]:
    reasons = []
    if not measurement.warm:
        reasons.append("times still moved when the warm-up ended")
    for name, samples in measurement.samples.items():
        for clock, text in _CLOCK_TEXTS.items():
            reasons += stats.unstable_reasons(_blocks(samples, clock, measurement), what=f"{text} of {name}")
    return [
        *reasons,
        *stats.machine_reasons(machine.other_cores, machine.steal),
        *stats.clock_reasons(machine.mhz),
    ]


def report_table(result: BenchResult) -> list[dict[str, str]]:
    """Return the rows of the result's table, dense first; the keys are the headings."""
    macs = result.macs
    per_graph = {
        "dense": (f"{macs.dense_g:.2f}", "1.00", "1.00") if macs else None,
        "pruned": (f"{macs.pruned_g:.2f}", f"{macs.ratio:.2f}", f"{macs.ideal_speedup:.2f}") if macs else None,
    }
    rows = []
    for runner in result.runners:
        giga, ratio, ideal = per_graph.get(runner.name) or ("", "", "")
        rows.append(
            {
                "graph": runner.name,
                "MACs/image (G)": giga,
                f"median (ms, batch {result.batch})": f"{runner.median_wall_ms:.3f}",
                "p90 (ms)": format_percentile(runner.percentiles["p90"]),
                "p99 (ms)": format_percentile(runner.percentiles["p99"]),
                "n": str(runner.n),
                "MACs ratio (x)": ratio,
                "ideal (x)": ideal,
                "measured (x) [95 % CI]": format_ratio(runner.speedup) if runner.speedup else "1.00",
            }
        )
    return rows


def report_notes(result: BenchResult) -> list[str]:
    """Return the sentences that belong under the table."""
    clock = "processor time of one thread" if result.clock == "cpu" else "wall time"
    notes = [
        f"measured: dense time / this graph's time, paired over {result.blocks} interleaved blocks, {clock}; "
        f"medians are wall time; {result.threads or 'all'} thread(s)"
    ]
    if result.efficiency_nominal and result.efficiency_own:
        notes.append(f"efficiency against the nominal MACs ratio: {format_ratio(result.efficiency_nominal)}")
        notes.append(f"efficiency against the MACs the graphs execute: {format_ratio(result.efficiency_own)}")
    if result.selection_overhead:
        share = format_ratio(result.selection_overhead, percent=True)
        notes.append(f"selection and scoring take {share} of the pruned run")
    if result.naive_over_pruned:
        notes.append(f"pruned against the naive torch export: {format_ratio(result.naive_over_pruned)} times faster")
    if result.random_weights:
        notes.append("random weights: the speed is real, accuracy is not measured")
    if result.quick:
        notes.append("quick run: fewer samples than a full one")
    shown, more = result.unstable[:MAX_REASONS], len(result.unstable) - MAX_REASONS
    notes += [f"unstable: {reason}" for reason in shown]
    return [*notes, f"unstable: {more} more reasons in the JSON result"] if more > 0 else notes


def format_ratio(ratio: Ratio, *, percent: bool = False) -> str:
    """Return "1.58 [1.56, 1.60]", or the bare estimate when there is no interval."""
    text = (lambda x: f"{x * 100:.2f} %") if percent else (lambda x: f"{x:.3f}")
    if ratio.low is None or ratio.high is None:
        return text(ratio.estimate)
    return f"{text(ratio.estimate)} [{text(ratio.low)}, {text(ratio.high)}]"


def format_percentile(value: Percentile) -> str:
    """Return milliseconds, or why there is no value."""
    return value.reason or "" if value.value is None else f"{value.value:.3f}"
