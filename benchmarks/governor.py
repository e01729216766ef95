"""Deadline misses with and without the governor while other processes take the processor away and give it back.

One session of several densities runs frame after frame on one thread: a quiet phase, one in which busy processes
compete, and a quiet one again. This is done at the densest keep rate without a deadline, and with one, in turns. A
frame that takes longer than the deadline is a miss.

    python benchmarks/governor.py [--model NAME] [--method evit] [--fps 10] [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, add_output_options, exact, markdown_table, random_images, say, write_result

from edgeprune.bench.fingerprint import usable_cores
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.session import Session

DENSITIES = (1.0, 0.7, 0.5, 0.3)
PHASES = ("quiet before", "load", "quiet after")
DEADLINE = 1.5  # times the median of the densest keep rate on the quiet machine
TRIAL_RUNS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a name that `edgeprune models` lists")
    parser.add_argument("--method", default="evit", help="takes a keep rate (default: evit)")
    parser.add_argument("--fps", type=float, default=10.0, help="frames per second (default: 10)")
    parser.add_argument("--seconds", type=float, nargs=3, default=[15, 30, 45], help="of the phases")
    parser.add_argument("--busy", type=int, help="busy processes (default: twice the usable cores)")
    parser.add_argument("--repeats", type=int, default=2, help="of both runs, in turns (default: 2)")
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.repeats = [2, 3, 4], 1
    busy = 2 * len(usable_cores()) if arguments.busy is None else arguments.busy
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
        request = ExportRequest(
            model=arguments.model, method=arguments.method, densities=DENSITIES, random_weights=True, verify=False
        )
        bundle = export_model(request, Path(directory) / "bundle")
        images = random_images(1, bundle.manifest.preprocessing.image_size)
        deadline = DEADLINE * quiet_median(bundle, images)
        say(f"deadline {deadline:.1f} ms, {busy} busy processes")
        runs = []
        for _ in range(arguments.repeats):
            for governed in (False, True):
                runs.append(run(bundle, images, deadline if governed else None, arguments, busy))
                say(f"{'governor' if governed else 'no governor'}: {misses(runs[-1], deadline)}")
    print("\n## Deadline misses\n")
    print(markdown_table([row(r, deadline) for r in runs]))
    for r in runs:
        for step in r["steps"]:
            print(f"- {step['time_s']:.1f} s: {step['before']:g} -> {step['after']:g}: {step['reason']}")
    without, with_governor = (total(runs, deadline, governed) for governed in (False, True))
    goals = [
        Goal(
            "share of frames under load that miss, with the governor / without",
            exact(with_governor / without),
            0.5,
            False,
        ),
        Goal("runs that end at the densest keep rate", exact(share_recovered(runs)), 1.0, True, "%"),
    ]
    write_result("governor", arguments, goals, [{"deadline_ms": deadline, "busy": busy, "runs": runs}])


def quiet_median(bundle: Bundle, images: np.ndarray) -> float:
    """Return the median milliseconds of a run at the densest keep rate."""
    session = Session(bundle, threads=1, spinning=False, density=DENSITIES[0])
    times = []
    for _ in range(TRIAL_RUNS):
        start = time.perf_counter()
        session.run(images)
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times))


def run(
    bundle: Bundle, images: np.ndarray, deadline: float | None, arguments: argparse.Namespace, busy: int
) -> dict[str, Any]:
    """Run the three phases and return every frame's latency by phase, and the governor's steps."""
    session = Session(bundle, threads=1, spinning=False, deadline_ms=deadline)
    frames: dict[str, list[tuple[float, float | None]]] = {phase: [] for phase in PHASES}
    begin = time.monotonic()
    for phase, seconds in zip(PHASES, arguments.seconds, strict=True):
        with busy_processes(busy if phase == "load" else 0):
            end = time.monotonic() + seconds
            while (now := time.monotonic()) < end:
                density = session.density
                start = time.perf_counter()
                session.run(images)
                frames[phase].append(((time.perf_counter() - start) * 1000, density))
                time.sleep(max(0.0, now + 1 / arguments.fps - time.monotonic()))
    steps = [{**asdict(step), "time_s": step.time_s - begin} for step in session.density_steps]
    return {"governed": deadline is not None, "frames": frames, "steps": steps, "last_density": session.density}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    made = [multiprocessing.Process(target=spin, daemon=True) for _ in range(count)]
    for process in made:
        process.start()
    try:
        yield
    finally:
        for process in made:
            process.terminate()
            process.join()


def spin() -> None:
    """Use a core for nothing."""
    while True:
        pass


def misses(found: dict[str, Any], deadline: float) -> dict[str, str]:
    """Return per phase the share of frames that missed."""
    return {
        phase: f"{sum(ms > deadline for ms, _ in frames)} of {len(frames)}" for phase, frames in found["frames"].items()
    }


def row(found: dict[str, Any], deadline: float) -> dict[str, str]:
    """Return a run as a row of the table."""
    loaded = [density for _, density in found["frames"]["load"]]
    return {
        "run": "governor" if found["governed"] else "densest keep rate",
        **misses(found, deadline),
        "p95 under load (ms)": f"{np.percentile([ms for ms, _ in found['frames']['load']], 95):.1f}",
        "mean keep rate under load": f"{np.mean(loaded):.2f}",
        "steps": str(len(found["steps"])),
        "last keep rate": f"{found['last_density']:g}",
    }


def total(runs: list[dict[str, Any]], deadline: float, governed: bool) -> float:
    """Return the share of all loaded frames that missed."""
    frames = [ms for r in runs if r["governed"] is governed for ms, _ in r["frames"]["load"]]
    return sum(ms > deadline for ms in frames) / len(frames)


def share_recovered(runs: list[dict[str, Any]]) -> float:
    """Return the share of governed runs that are back at the densest keep rate at the end."""
    ends = [r["last_density"] == DENSITIES[0] for r in runs if r["governed"]]
    return sum(ends) / len(ends)


if __name__ == "__main__":
    main()
