"""Bench a bundle: its pruned graph, its baselines, in turns, in one process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeprune.bench import fingerprint as env
from edgeprune.bench.adaptive import RunSetting, mean_macs, summarise_runs
from edgeprune.bench.callers import BLOCKS, measure_callers
from edgeprune.bench.energy import QUICK_WINDOW_S, WINDOW_S, measure_energy
from edgeprune.bench.images import make_images
from edgeprune.bench.layers import check_profiled, profile_layers
from edgeprune.bench.measure import QUICK, Clock, Measurement, MeasurePlan, Progress, SystemClock, measure
from edgeprune.bench.naive import export_naive_dense
from edgeprune.bench.result import BenchResult, BenchSetting, Extras, RatioClock
from edgeprune.bench.runners import Contest, switch_us, take_density
from edgeprune.bench.scenarios import Scenario, parse_scenario, query_batch, scenario_result
from edgeprune.bench.stats import MIN_BLOCKS
from edgeprune.bench.summary import pruned_runners, summarise
from edgeprune.bench.telemetry_nvml import describe_nvml
from edgeprune.bench.watch import MachineWatch, Sensors, find_sensors
from edgeprune.checks.parity import config_from_manifest, macs_by_counts
from edgeprune.errors import InputError
from edgeprune.export.targets.registry import TARGETS
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.manifest import Manifest
from edgeprune.runtime.processor import processor_name
from edgeprune.runtime.timing import DeviceTimer

BASELINES = ("dense", "random", "naive", "float")
IMAGES, QUICK_IMAGES = 16, 8


def bench_bundle(
    bundle: Bundle | Path | str,
    *,
    batch: int | None = None,
    threads: int = 1,
    rounds: int | None = None,
    duration: float | None = None,
    quick: bool = False,
    against: Sequence[str] = ("dense", "random", "float"),
    data: str | None = None,
    images: int | None = None,
    callers: int | None = None,
    scenario: str = "single-stream",
    layers: bool = False,
    seed: int = 0,
    sensors: Sensors | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a bundle's pruned graph and its baselines interleaved.

    Where the image decides how many tokens stay, a sample is a pass over all images, divided by its runs, so that
    all graphs are measured on the same images. Other graphs take as long for any image and run one batch. A sample of
    the scenario multi-stream is a query, one of fixed-fps a frame: a batch.

    What the machine's sensors tell is taken down meanwhile; where they tell its power, each graph then runs alone for
    some seconds to learn the energy of an image.

    Args:
        bundle: a bundle or its directory.
        batch: images per run, within the bundle's batch range; None takes its smallest, or with the scenario
            multi-stream the largest that divides the query.
        threads: of every session; 0 lets ONNX Runtime choose. Idle sessions never spin.
        rounds: exact number of rounds instead of a duration.
        duration: seconds of measuring, warm-up not included; 10 by default, 3 when quick.
        quick: a short run, marked as such.
        against: "dense" and "random" from the bundle; "naive" exported on the spot (needs torch); "float" the pruned
            graph without its quantization, of a bundle that has one and runs on the processor.
        data: "digits" or "imagefolder:PATH"; None makes noise.
        images: of a pass over an adaptive bundle and of the callers, rounded up to full batches; 16 by default, 8 when
            quick.
        callers: also measure so many threads on one session, beside a single one.
        scenario: how runs follow each other: "single-stream", "multi-stream:8", "fixed-fps:30", "sustained:10m".
        layers: also tell where the time of each graph goes.
        seed: of the images, the naive model's weights and the bootstrap.
        sensors: what the machine tells; None looks for them.
        clock: source of time.
        progress: called with (step, share done).

    Raises:
        InputError: `bench-against` for an unknown baseline, `bench-batch`, `bench-naive`, `bench-images`,
            `bench-callers`, `bench-scenario`, `bench-layers`, or what the session or opening the data refuses.
        CheckFailed: `bench-callers` when callers at once get other results than a single one.
        EnvironmentLackError: `package-missing` without onnxruntime, or without torch when "naive" is asked.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    asked, manifest = parse_scenario(scenario), bundle.manifest
    batch = query_batch(asked.query, batch, manifest.batch) if asked.query else batch or manifest.batch[0]
    _check_request(bundle, batch, against, callers)
    _check_scenario(asked, duration)
    if layers:
        check_profiled(manifest.target)
    on_device = device_of(manifest.target) is not None
    count = asked.query or ((QUICK_IMAGES if quick else IMAGES) if images is None else images)
    inputs = make_images(data, manifest.preprocessing, count=count, batch=batch, seed=seed)
    sample = inputs if asked.query or manifest.adaptive is not None else inputs.first()
    runs = 1 if asked.query or asked.fps else len(sample.batches)
    per_sample = asked.query or batch
    plan = QUICK if quick else MeasurePlan()
    plan = asked.plan(replace(plan, duration_s=plan.duration_s if duration is None else duration), quick=quick)
    plan, clock = replace(plan, rounds=rounds), clock or SystemClock()
    with ExitStack() as stack:
        timer = DeviceTimer() if on_device else None
        contest = Contest(sample, threads, singly=asked.fps is not None, timer=timer)
        session = contest.add_bundle(bundle, against)
        if "float" in against and manifest.quantization is not None and not on_device:
            contest.add_float(bundle)
        if "naive" in against:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-naive-"))
            path = export_naive_dense(config_from_manifest(manifest), Path(directory), batch=batch, seed=seed)
            contest.add_onnx("naive", path)
        watch, sensors = MachineWatch(progress), sensors or find_sensors(stack, on_device=on_device)
        with sensors.monitor() as monitor:
            measurement = measure(contest.runners, plan, clock=clock, progress=watch.step, device=timer)
            machine = watch.result()
            telemetry = monitor.result(measurement.started_s, measurement.elapsed_s, sensors.lacking)
            energy = measure_energy(
                contest.runners,
                monitor,
                sensors.counters,
                images_per_call=per_sample if asked.query or asked.fps else batch * runs,
                window_s=QUICK_WINDOW_S if quick else WINDOW_S,
                progress=watch.step,
            )
        extras = replace(
            _extras(manifest, contest, measurement, batch),
            switch_us=switch_us(session),
            scenario=scenario_result(asked, measurement.per_run(runs), telemetry, samples_per_query=per_sample),
            telemetry=telemetry,
            energy=energy,
        )
        if layers:
            watch.step("layers", 0.0)
            extras = replace(extras, layers=profile_layers(bundle, contest, quick=quick))
        if callers is not None:
            watch.step("several callers", 0.0)
            take_density(session, next(iter(pruned_runners(manifest).values())))
            blocks = max(1, rounds // 2) if rounds else MIN_BLOCKS if quick else BLOCKS
            several = measure_callers(session.run, inputs.batches, callers, blocks=blocks, seed=seed)
            extras = replace(extras, callers=several)
    return summarise(
        manifest,
        measurement.per_run(runs),
        BenchSetting(
            batch,
            threads,
            quick,
            seed,
            ratio_clock(threads, on_device),
            sample.data,
            sample.different,
            runs,
            per_sample,
            on_device,
        ),
        machine=machine,
        fingerprint=fingerprint_of(on_device),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        warnings=contest.warnings,
        extras=extras,
    )


def _extras(manifest: Manifest, contest: Contest, measurement: Measurement, batch: int) -> Extras:
    """Return what the sessions tell beside their times."""
    runs = {name: log.measured(measurement.warmup_rounds) for name, log in contest.logs.items()}
    adaptive, macs = None, {}
    if manifest.adaptive is not None and runs:
        stages = {d.keep_rate: d.stages for d in manifest.densities} | {None: manifest.method.stages}
        rates = pruned_runners(manifest)
        first = next(iter(runs))
        setting = RunSetting(first, contest.images.different, batch, contest.threads, processor_name())
        slots = [stage.kept for stage in stages[rates[first]]]
        adaptive = summarise_runs(manifest.adaptive, slots, runs[first], setting)
        if manifest.model.config is not None:
            macs = {name: mean_macs(r, macs_by_counts(manifest, stages[rates[name]])) for name, r in runs.items()}
    return Extras(adaptive, macs, memory=contest.memory)


def fingerprint_of(on_device: bool) -> dict[str, Any]:
    """Return what a bench was made on."""
    found = env.take_fingerprint().to_dict() | env.describe_board()
    if on_device:
        found |= env.describe_gpu()
        found["gpu"] |= describe_nvml(os.getpid())
    return found


def ratio_clock(threads: int, on_device: bool = False) -> RatioClock:
    """Return the clock ratios are made of.

    One thread: processor time, which other work on the machine moves far less than wall time. Several threads
    wait for each other, as the processor waits for a device, so only wall time counts; and some systems account
    processor time too coarsely.
    """
    fine = time.get_clock_info("process_time").resolution <= 1e-5
    return "cpu" if threads == 1 and fine and not on_device else "wall"


def device_of(target: str) -> str | None:
    """Return what a target runs on when that is not this machine's processor: "tensorrt" or "cuda"."""
    known = TARGETS.get(target)
    return None if known is None else known.device


def _check_scenario(asked: Scenario, duration: float | None) -> None:
    if asked.duration_s is not None and duration is not None:
        raise InputError(
            f"a duration of {duration:g} s beside the scenario {asked.text}",
            code="bench-scenario",
            expected="the duration in the scenario alone",
            hint=f"--scenario sustained:{duration:g}s",
        )


def _check_request(bundle: Bundle, batch: int, against: Sequence[str], callers: int | None) -> None:
    unknown = [name for name in against if name not in BASELINES]
    if unknown:
        raise InputError(
            f"unknown baseline '{unknown[0]}'",
            code="bench-against",
            expected=f"some of {', '.join(BASELINES)}",
        )
    if "naive" in against and device_of(bundle.manifest.target) is not None:
        raise InputError(
            f"the naive baseline runs on the processor, a bundle for {bundle.manifest.target} does not",
            code="bench-naive",
            expected="a bundle for a CPU target",
            hint="bench without the naive baseline",
        )
    if "naive" in against and bundle.manifest.model.config is None:
        raise InputError(
            f"the bundle of '{bundle.manifest.model.name}' was traced and does not record its architecture",
            code="bench-naive",
            expected="a bundle of a model that `edgeprune models` lists",
            hint="bench without the naive baseline",
        )
    if callers is not None and callers < 2:
        raise InputError(f"{callers} callers at once", code="bench-callers", expected="at least 2")
    low, high = bundle.manifest.batch
    if not low <= batch <= high:
        raise InputError(
            f"batch {batch} does not fit the bundle",
            code="bench-batch",
            expected=f"{low}" if low == high else f"{low} to {high}",
            hint=f"export with --batch {batch}" if low == high else None,
        )
