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
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.bench import fingerprint as env
from edgeprune.bench.measure import QUICK, Clock, MeasurePlan, Progress, Runner, measure
from edgeprune.bench.naive import export_naive_dense
from edgeprune.bench.result import BenchResult, BenchSetting, MachineResult, RatioClock, summarise
from edgeprune.checks.parity import config_from_manifest
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    from numpy.typing import NDArray

BASELINES = ("dense", "random", "naive")


def bench_bundle(
    bundle: Bundle | Path | str,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int | None = None,
    duration: float | None = None,
    quick: bool = False,
    against: Sequence[str] = ("dense", "random"),
    seed: int = 0,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a bundle's pruned graph and its baselines interleaved.

    Args:
        bundle: a bundle or its directory.
        batch: images per run, within the bundle's batch range.
        threads: of every session; 0 lets ONNX Runtime choose. Idle sessions never spin.
        rounds: exact number of rounds instead of a duration.
        duration: seconds of measuring, warm-up not included; 10 by default, 3 when quick.
        quick: a short run, marked as such.
        against: "dense" and "random" from the bundle, "naive" exported on the spot (needs torch).
        seed: of the images, the naive model's weights and the bootstrap.
        clock: source of time.
        progress: called with (step, share done).

    Raises:
        InputError: `bench-against` for an unknown baseline, `bench-batch`, `bench-naive`, or what the session
            refuses.
        EnvironmentLackError: `package-missing` without onnxruntime, or without torch when "naive" is asked.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    _check_request(bundle, batch, against)
    manifest = bundle.manifest
    config = manifest.preprocessing
    images = np.random.default_rng(seed).standard_normal((batch, 3, *config.image_size), dtype=np.float32)
    plan = QUICK if quick else MeasurePlan()
    plan = replace(plan, rounds=rounds, duration_s=plan.duration_s if duration is None else duration)
    with ExitStack() as stack:
        runners, warnings = bundle_runners(bundle, images, threads=threads, against=against)
        if "naive" in against:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-naive-"))
            path = export_naive_dense(config_from_manifest(manifest), Path(directory), batch=batch, seed=seed)
            runners["naive"] = onnx_runner(path, images, threads=threads)
        watch = _MachineWatch(progress)
        measurement = measure(runners, plan, clock=clock, progress=watch.step)
    return summarise(
        manifest,
        measurement,
        BenchSetting(batch, threads, quick, seed, ratio_clock(threads)),
        machine=watch.result(),
        fingerprint=env.take_fingerprint().to_dict(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        warnings=warnings,
    )


def bundle_runners(
    bundle: Bundle, images: NDArray[np.float32], *, threads: int, against: Sequence[str] = ("dense", "random")
) -> tuple[dict[str, Runner], list[str]]:
    """Return the runners of a bundle's graphs, dense first, and warnings about those it does not hold."""
    has = bundle.manifest.graphs
    if bundle.manifest.method.stages:
        graphs = {"dense": "dense", "pruned": "model", "random": "random"}
        wanted = [name for name in graphs if name == "pruned" or name in against]
    else:  # the only graph of a dense bundle is the dense one
        graphs, wanted = {"dense": "model"}, ["dense"]
    missing = [name for name in wanted if graphs[name] not in has]
    runners = {
        name: session_runner(bundle, graphs[name], images, threads=threads) for name in wanted if name not in missing
    }
    return runners, [f"the bundle holds no {name} graph; it was not measured" for name in missing]


def session_runner(bundle: Bundle, graph: str, images: NDArray[np.float32], *, threads: int) -> Runner:
    """Return a runner of one graph of a bundle; its session does not spin between runs."""
    from edgeprune.runtime.session import Session

    session = Session(bundle, graph=graph, threads=threads, spinning=False, check_hashes=False)
    return lambda: session.run(images)


def onnx_runner(path: Path, images: NDArray[np.float32], *, threads: int) -> Runner:
    """Return a runner of an ONNX file in ONNX Runtime's defaults, without spinning between runs."""
    from edgeprune.runtime.ort import OrtBackend

    backend = OrtBackend(path, threads=threads, spinning=False)
    feeds = {backend.inputs[0].name: images}
    return lambda: backend.run(feeds)


def ratio_clock(threads: int) -> RatioClock:
    """Return the clock ratios are made of.

    One thread: processor time, which other work on the machine moves far less than wall time. Several threads
    wait for each other, so only wall time counts; and some systems account processor time too coarsely.
    """
    fine = time.get_clock_info("process_time").resolution <= 1e-5
    return "cpu" if threads == 1 and fine else "wall"


def _check_request(bundle: Bundle, batch: int, against: Sequence[str]) -> None:
    unknown = [name for name in against if name not in BASELINES]
    if unknown:
        raise InputError(
            f"unknown baseline '{unknown[0]}'",
            code="bench-against",
            expected=f"some of {', '.join(BASELINES)}",
        )
    if "naive" in against and bundle.manifest.model.config is None:
        raise InputError(
            f"the bundle of '{bundle.manifest.model.name}' was traced and does not record its architecture",
            code="bench-naive",
            expected="a bundle of a model that `edgeprune models` lists",
            hint="bench without the naive baseline",
        )
    low, high = bundle.manifest.batch
    if not low <= batch <= high:
        raise InputError(
            f"batch {batch} does not fit the bundle",
            code="bench-batch",
            expected=f"{low}" if low == high else f"{low} to {high}",
            hint=f"export with --batch {batch}" if low == high else None,
        )


class _MachineWatch:
    """Notes what else the machine does; its steps lie between the timed calls."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.load = env.read_load()
        self.before: env.CpuTimes | None = None
        self.mhz: list[float] = []

    def step(self, name: str, share: float) -> None:
        """Start the accounts with the first step and read the clock after every block."""
        if self.before is None:
            self.before = env.read_cpu_times()
        mhz = env.read_mhz() if name == "measure" else None
        if mhz is not None:
            self.mhz.append(mhz)
        if self.progress:
            self.progress(name, share)

    def result(self) -> MachineResult:
        """Return the accounts since the first step."""
        other = steal = None
        after = env.read_cpu_times()
        if after is not None and self.before is not None:
            other = round(after.other_cores(self.before), 3)
            steal = round(after.steal_share(self.before, os.cpu_count() or 1), 4)
        return MachineResult(
            load_1min_before=self.load,
            load_1min_after=env.read_load(),
            other_cores=other,
            steal=steal,
            mhz=self.mhz,
        )
