"""How the result of a bench is worked out of a measurement: all pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy import float64
from numpy.typing import NDArray

from edgeprune.bench import stats
from edgeprune.bench.measure import Measurement, Samples
from edgeprune.bench.result import (
    SCHEMA,
    BenchResult,
    BenchSetting,
    DensityResult,
    Extras,
    MachineResult,
    MacsResult,
    RatioClock,
    RunnerResult,
)
from edgeprune.bench.stats import Ratio
from edgeprune.bench.telemetry import telemetry_reasons
from edgeprune.runtime.manifest import DensityInfo, Macs, Manifest

_CLOCK_TEXTS: dict[RatioClock, str] = {"wall": "wall time", "cpu": "processor time"}
LABELS = {
    "dense": "dense graph of the same target",
    "pruned": "pruned graph",
    "random": "same token counts, constant positions, no scores",
    "float": "the same graph in float32",
    "naive": "dense, torch.onnx export in its defaults, random weights",
}


def summarise(
    manifest: Manifest,
    measurement: Measurement,
    setting: BenchSetting,
    *,
    machine: MachineResult,
    fingerprint: Mapping[str, Any],
    created: str,
    warnings: list[str] | None = None,
    extras: Extras | None = None,
) -> BenchResult:
    """Work the result of a bench out of its samples.

    Args:
        manifest: of the bundle.
        measurement: of the runners "dense" and, as far as there are, the pruned ones, "random", "naive", "float".
        setting: batch, threads and the like.
        machine: what else ran.
        fingerprint: of the environment.
        created: UTC time of the run.
        warnings: to pass on.
        extras: what else was measured.
    """
    extras = extras or Extras()
    blocks = {name: _blocks(s, setting.clock, measurement) for name, s in measurement.samples.items()}

    def ratio(top: str, bottom: str) -> Ratio | None:
        if top not in blocks or bottom not in blocks:
            return None
        return stats.paired_ratio(blocks[top], blocks[bottom], seed=setting.seed)

    rates = pruned_runners(manifest)
    pruned = next(iter(rates))
    speedup, rest = ratio("dense", pruned), ratio("random", pruned)
    macs = _macs(manifest, manifest.macs, extras.mean_macs.get(pruned)) if pruned in blocks else None
    nominal, own = _efficiency(speedup, macs)
    gain = ratio("float", pruned if pruned in blocks else "dense")
    return BenchResult(
        schema=SCHEMA,
        created=created,
        bundle=bundle_fields(manifest),
        random_weights=manifest.weights.source == "random",
        batch=setting.batch,
        threads=setting.threads,
        quick=setting.quick,
        seed=setting.seed,
        clock=setting.clock,
        data=setting.data,
        images=setting.images,
        runs_per_sample=setting.runs_per_sample,
        rounds=measurement.rounds,
        blocks=measurement.rounds // 2,
        calls_per_visit=measurement.calls_per_visit,
        warmup_rounds=measurement.warmup_rounds,
        elapsed_s=measurement.elapsed_s,
        runners=[
            _runner(name, samples, measurement, setting, ratio("dense", name) if name != "dense" else None, extras)
            for name, samples in measurement.samples.items()
        ],
        speedup=speedup,
        naive_over_dense=ratio("naive", "dense"),
        naive_over_pruned=ratio("naive", pruned),
        macs=macs,
        efficiency_nominal=nominal,
        efficiency_own=own,
        selection_overhead=rest.complement() if rest else None,
        unstable=_unstable(measurement, machine, setting, extras),
        warnings=[*manifest.warnings, *(warnings or []), *_quantization_warnings(manifest, gain)],
        machine=machine,
        fingerprint=dict(fingerprint),
        adaptive=extras.adaptive,
        densities=[
            _density(manifest, density, ratio("dense", density_runner(density)), extras.mean_macs)
            for density in manifest.densities
        ],
        switch_us=extras.switch_us,
        memory=list(extras.memory),
        callers=extras.callers,
        scenario=extras.scenario,
        warmup=measurement.warmup,
        telemetry=extras.telemetry,
        layers=list(extras.layers),
        quantization_gain=gain,
    )


def _quantization_warnings(manifest: Manifest, gain: Ratio | None) -> list[str]:
    if gain is None or gain.estimate > 1:
        return []
    return [f"{manifest.precision} is not faster here: {gain.estimate:.2f} times as fast as float32"]


def _blocks(samples: Samples, clock: RatioClock, measurement: Measurement) -> NDArray[float64]:
    times = samples.cpu_ms if clock == "cpu" else samples.wall_ms
    return stats.block_values(times, measurement.calls_per_visit)


def _runner(
    name: str,
    samples: Samples,
    measurement: Measurement,
    setting: BenchSetting,
    speedup: Ratio | None,
    extras: Extras,
) -> RunnerResult:
    gpu_ms, enqueue_ms = (
        times if times and len(times) == len(samples.wall_ms) else None
        for times in (samples.gpu_ms, samples.enqueue_ms)
    )
    sustained = extras.scenario is not None and extras.scenario.kind == "sustained"
    images = setting.images_per_sample or setting.batch
    return RunnerResult(
        name=name,
        label=LABELS.get(name.partition(" at ")[0], name),
        n=len(samples.wall_ms),
        median_wall_ms=stats.median(samples.wall_ms),
        median_cpu_ms=stats.median(samples.cpu_ms),
        percentiles={f"p{q}": stats.percentile(samples.wall_ms, q) for q in stats.PERCENTILE_MIN_SAMPLES},
        max_wall_ms=max(samples.wall_ms),
        outliers=stats.count_outliers(samples.wall_ms),
        cv_wall=stats.coefficient_of_variation(_blocks(samples, "wall", measurement)),
        cv_cpu=stats.coefficient_of_variation(_blocks(samples, "cpu", measurement)),
        images_per_s=images * 1000 / stats.median(samples.run_ms or samples.wall_ms),
        speedup=speedup,
        wall_ms=samples.wall_ms,
        cpu_ms=samples.cpu_ms,
        median_gpu_ms=None if gpu_ms is None else stats.median(gpu_ms),
        median_enqueue_ms=None if enqueue_ms is None else stats.median(enqueue_ms),
        gpu_ms=gpu_ms,
        enqueue_ms=enqueue_ms,
        at_s=[at - measurement.started_s for at in samples.at_s] if sustained else None,
        energy=extras.energy.get(name),
    )


def pruned_runners(manifest: Manifest) -> dict[str, float | None]:
    """Return the names of the pruned runners and the density of each; the first is the one `macs` describes."""
    rates: dict[str, float | None] = {density_runner(d): d.keep_rate for d in manifest.densities if d.stages}
    return rates or {"pruned": None}


def density_runner(density: DensityInfo) -> str:
    """Return the name of the runner of a density."""
    return f"pruned at {density.keep_rate:g}" if density.stages else "dense"


def _density(
    manifest: Manifest, density: DensityInfo, speedup: Ratio | None, mean_macs: Mapping[str, float]
) -> DensityResult:
    name = density_runner(density)
    if not density.stages:
        return DensityResult(density.keep_rate, name, None, None, None, None)
    macs = _macs(manifest, density.macs, mean_macs.get(name))
    return DensityResult(density.keep_rate, name, macs, speedup, *_efficiency(speedup, macs))


def _efficiency(speedup: Ratio | None, macs: MacsResult | None) -> tuple[Ratio | None, Ratio | None]:
    """Return the measured speed-up over the nominal ratio and over that of the MACs executed."""
    if speedup is None or macs is None:
        return None, None
    own = None if macs.ideal_speedup is None else speedup.scaled(1 / macs.ideal_speedup)
    return speedup.scaled(1 / macs.ratio), own


def _macs(manifest: Manifest, macs: Macs | None, mean: float | None) -> MacsResult | None:
    """Return the MACs of a graph; with `mean`, those of an image on average, of which only the nominal are known."""
    if macs is None:
        return None
    if manifest.adaptive is not None and manifest.adaptive.form != "slots":
        if mean is None:
            return None
        return MacsResult(macs.dense / 1e9, mean / 1e9, None, None, macs.dense / mean, None)
    return MacsResult(
        dense_g=macs.dense / 1e9,
        pruned_g=macs.pruned / 1e9,
        dense_executed_g=macs.dense_executed / 1e9,
        pruned_executed_g=macs.pruned_executed / 1e9,
        ratio=macs.dense / macs.pruned,
        ideal_speedup=macs.dense_executed / macs.pruned_executed,
    )


def bundle_fields(manifest: Manifest) -> dict[str, Any]:
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


def _unstable(measurement: Measurement, machine: MachineResult, setting: BenchSetting, extras: Extras) -> list[str]:
    reasons = []
    if not measurement.warm:
        reasons.append("times still moved when the warm-up ended")
    for name, samples in measurement.samples.items():
        for clock, text in _CLOCK_TEXTS.items():
            reasons += stats.unstable_reasons(_blocks(samples, clock, measurement), what=f"{text} of {name}")
    telemetry = extras.telemetry
    told = [] if telemetry is None else telemetry_reasons(telemetry, on_device=setting.on_device)
    return [
        *reasons,
        *stats.machine_reasons(machine.other_cores, machine.steal),
        *(stats.clock_reasons(machine.mhz) if not any("clock" in reason for reason in told) else []),
        *told,
    ]
