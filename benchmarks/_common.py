"""What the benchmark scripts share: runners of other engines, interleaved groups, goals, the result file."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bench import stats
from edgeprune.bench.bench import ratio_clock
from edgeprune.bench.fingerprint import read_cpu_times, take_fingerprint, usable_cores
from edgeprune.bench.measure import QUICK, Measurement, MeasurePlan, Runner, measure
from edgeprune.bench.report import format_ratio
from edgeprune.bench.result import RatioClock
from edgeprune.bench.stats import Ratio
from edgeprune.errors import missing_package
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.ort import import_onnxruntime

SCHEMA = "edgeprune-benchmark/1"
RESULTS = Path(__file__).resolve().parent / "results"
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Goal:
    """A number to reach and what was measured.

    Attributes:
        what: in words, with the case it was measured in.
        measured: with its interval where there is one.
        goal: to reach or exceed when `at_least`, else not to exceed.
    """

    what: str
    measured: Ratio
    goal: float
    at_least: bool = True
    unit: str = "x"

    @property
    def reached(self) -> bool:
        """The estimate meets the goal; the interval stands beside it."""
        return self.measured.estimate >= self.goal if self.at_least else self.measured.estimate <= self.goal

    def row(self) -> dict[str, str]:
        """Return the goal as a row of a table."""
        return {
            "goal": self.what,
            "measured [95 % CI]": format_value(self.measured, self.unit),
            "wanted": f"{'>=' if self.at_least else '<='} {format_number(self.goal, self.unit)}",
            "reached": "yes" if self.reached else "no",
        }


@dataclass
class Group:
    """Runners measured in turns, and every ratio between two of them.

    Attributes:
        values: derived figures by name.
        unstable: why not to trust the group; empty when it was steady.
    """

    name: str
    batch: int
    threads: int
    clock: RatioClock
    measurement: Measurement
    unstable: list[str]
    values: dict[str, Ratio] = field(default_factory=dict)

    def ratio(self, top: str, bottom: str) -> Ratio:
        """Return time of `top` / time of `bottom`, paired."""
        return stats.paired_ratio(self.blocks(top), self.blocks(bottom))

    def blocks(self, name: str) -> NDArray[np.float64]:
        """Return the block values of a runner on the group's clock."""
        samples = self.measurement.samples[name]
        times = samples.cpu_ms if self.clock == "cpu" else samples.wall_ms
        return stats.block_values(times, self.measurement.calls_per_visit)

    def rows(self, base: str) -> list[dict[str, str]]:
        """Return a table: every runner with its median and how many times faster than `base` it is."""
        rows = []
        for name, samples in self.measurement.samples.items():
            rows.append(
                {
                    "runner": name,
                    f"median {self.clock} (ms, batch {self.batch})": f"{np.median(self.times(name)):.2f}",
                    "n": str(len(samples.wall_ms)),
                    f"x faster than {base} [95 % CI]": format_ratio(self.ratio(base, name)) if name != base else "1",
                }
            )
        return rows

    def times(self, name: str) -> list[float]:
        """Return a runner's samples on the group's clock, ms."""
        samples = self.measurement.samples[name]
        return samples.cpu_ms if self.clock == "cpu" else samples.wall_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; samples to a tenth of a microsecond."""
        return {
            "name": self.name,
            "batch": self.batch,
            "threads": self.threads,
            "clock": self.clock,
            "rounds": self.measurement.rounds,
            "calls_per_visit": self.measurement.calls_per_visit,
            "warmup_rounds": self.measurement.warmup_rounds,
            "unstable": self.unstable,
            "values": {name: asdict(value) for name, value in self.values.items()},
            "runners": {
                name: {
                    "wall_ms": [round(t, 4) for t in samples.wall_ms],
                    "cpu_ms": [round(t, 4) for t in samples.cpu_ms],
                }
                for name, samples in self.measurement.samples.items()
            },
        }


def measure_group(name: str, runners: Mapping[str, Runner], *, batch: int, threads: int, plan: MeasurePlan) -> Group:
    """Measure runners in turns, on as many cores as they have threads."""
    say(f"{name}, batch {batch}, {threads} thread(s): {', '.join(runners)}")
    before = read_cpu_times()
    measurement = measure(runners, plan)
    after = read_cpu_times()
    clock = ratio_clock(threads)
    group = Group(name, batch, threads, clock, measurement, [])
    for runner in runners:
        group.unstable += stats.unstable_reasons(group.blocks(runner), what=f"{clock} time of {runner}")
    if before is not None and after is not None:
        others, steal = after.other_cores(before), after.steal_share(before, os.cpu_count() or 1)
        group.unstable += stats.machine_reasons(others, steal)
    return group


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on the last `threads` usable cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = usable_cores()
    os.sched_setaffinity(0, cores[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def openvino_runner(path: Path, images: Images, *, threads: int) -> Runner:
    """Return a runner of an ONNX file in OpenVINO; each run returns its outputs.

    Float32 is asked for: on CPUs with bfloat16 OpenVINO would compute in that by default.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_package("openvino", "dev", "the OpenVINO comparison") from error
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({model.inputs[0]: list(images.shape)})
    request = core.compile_model(model, "CPU", options).create_infer_request()
    feed = {0: images}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def profile_share(path: Path, images: Images, *, runs: int, part: str) -> float:
    """Return the share of node time that nodes with `part` in their name take, by ONNX Runtime's profiler.

    Per node the median over the runs counts, so that a run that was interrupted does not.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="edgeprune-profile-") as directory:
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"])
    typical = {name: stats.median(durations) for name, durations in times.items()}
    selected = [time for name, time in typical.items() if part in name]
    if not selected:
        raise SystemExit(f"no node of {path.name} has '{part}' in its name: the profile says nothing")
    return sum(selected) / sum(typical.values())


class Workshop:
    """Exports bundles into a temporary directory, each once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bundles: dict[str, Bundle] = {}

    def bundle(self, **fields: Any) -> Bundle:
        """Return the bundle of an export request with random weights; `edgeprune verify` checks parity."""
        request = ExportRequest(random_weights=True, verify=False, **fields)
        key = re.sub(r"[^a-z0-9.]+", "-", " ".join(f"{k} {v}" for k, v in sorted(fields.items())).lower())
        if key not in self._bundles:
            say(f"exporting {', '.join(f'{k}={v}' for k, v in fields.items())}")
            self._bundles[key] = export_model(request, self.directory / f"{len(self._bundles):02d}")
        return self._bundles[key]


def random_images(batch: int, size: Sequence[int], seed: int = 0) -> Images:
    """Return normalised noise [B, 3, H, W]."""
    return np.random.default_rng(seed).standard_normal((batch, 3, *size), dtype=np.float32)


def relative_error(a: Images, b: Images) -> float:
    """Return the largest difference over the largest reference value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every latency script has."""
    parser.add_argument("--model", default="deit_small_patch16_224", help="a name that `edgeprune models` lists")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads per session (default: 1)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds per group; two make a block (default: 40)")
    add_output_options(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every script has."""
    parser.add_argument("--quick", action="store_true", help="few rounds; the result is marked as such")
    parser.add_argument("--out", type=Path, help="result file (default: results/<script>.<cpu>.json)")


def measure_plan(arguments: argparse.Namespace) -> MeasurePlan:
    """Return the plan the options ask for."""
    if arguments.quick:
        return replace(QUICK, rounds=2 * stats.MIN_BLOCKS)
    return MeasurePlan(rounds=arguments.rounds)


def write_result(
    script: str,
    arguments: argparse.Namespace,
    goals: Sequence[Goal],
    cases: Sequence[Mapping[str, Any]],
    *,
    machine: str | None = None,
    extra: Mapping[str, Any] | None = None,
    random_weights: bool = True,
) -> Path:
    """Write the result file, print the table of goals and return the path.

    Args:
        script: its name.
        arguments: its options; paths are not written.
        goals: what was to be reached.
        cases: what was measured.
        machine: names the file; the CPU when None.
        extra: joins the fingerprint.
        random_weights: whether accuracy means nothing.
    """
    fingerprint = take_fingerprint()
    cpu = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", fingerprint.cpu_model.lower())).strip("-")
    path = arguments.out or RESULTS / f"{script}.{machine or cpu}.json"
    options = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path) and k != "out"}
    content = {
        "schema": SCHEMA,
        "script": f"benchmarks/{script}.py",
        "arguments": options,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "random_weights": random_weights,
        "fingerprint": {**fingerprint.to_dict(), **(extra or {})},
        "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals],
        "cases": list(cases),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print("\n## Goals\n")
    print(markdown_table([goal.row() for goal in goals]))
    if arguments.quick:
        print("\nQuick run: few samples.")
    say(f"wrote {path.name}")
    return path


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    if not rows:
        return "(none)"
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_group(group: Group, base: str) -> None:
    """Print a group's table, its derived values and why not to trust it."""
    print(f"\n### {group.name}, batch {group.batch}, {group.threads} thread(s)\n")
    print(markdown_table(group.rows(base)))
    for name, value in group.values.items():
        print(f"\n- {name}: {format_ratio(value)}", end="")
    for reason in group.unstable:
        print(f"\n- unstable: {reason}", end="")
    print(flush=True)


def format_value(value: Ratio, unit: str) -> str:
    """Return a measured value with its interval and unit."""
    if unit == "%":
        return format_ratio(value, percent=True)
    return f"{format_ratio(value)} {unit}" if unit else f"{value.estimate:.1e}"


def format_number(value: float, unit: str) -> str:
    """Return a number with its unit; shares are printed in percent."""
    return f"{value * 100:g} %" if unit == "%" else f"{value:g} {unit}".strip()


def exact(value: float) -> Ratio:
    """Return a value that has no interval."""
    return Ratio(value, None, None, 0.95, 1)


def say(text: str) -> None:
    """Tell people what happens, beside the result."""
    print(text, file=sys.stderr, flush=True)
