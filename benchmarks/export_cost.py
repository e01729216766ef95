"""What an export costs: seconds and memory of the export step alone, and of the whole command.

The export step is everything after the weights are in memory: lowering, streaming the weights to disk,
hashing, moving into place. Its extra memory is the growth of the resident set's peak during the step, in copies
of the weights. Each run is a process of its own. Parity is not part of the step; the whole command includes it.

    python benchmarks/export_cost.py [--model NAME ...] [--repeats 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import Goal, add_output_options, exact, markdown_table, say, write_result

from edgeprune.bench import stats
from edgeprune.export import ExportRequest, export_model

STEP_GOALS_S = {"deit_small_patch16_224": 1.0, "vit_large_patch16_224": 6.0}
COMMAND_GOAL_S = 15.0
COPIES_GOAL = 0.2
METHODS: dict[str, dict[str, Any]] = {"dense": {}, "evit 0.7": {"method": "evit", "keep_rate": 0.7}}


@dataclass(frozen=True)
class Step:
    """One export step.

    Attributes:
        lowering_s: graphs built and written, weights streamed.
        total_s: the same, files hashed, synced and moved into place.
        weights_mib: size of the weight file.
        extra_mib: growth of the resident set's peak; None where the system does not tell.
    """

    lowering_s: float
    total_s: float
    weights_mib: float
    extra_mib: float | None


@dataclass(frozen=True)
class Command:
    """One run of the command line tool: seconds, and the peak of its resident set."""

    seconds: float
    peak_mib: float


class StepWatch:
    """Notes time and memory when the export reports its steps."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self.base_mib: float | None = None

    def __call__(self, text: str, share: float) -> None:
        """Take the marks that matter."""
        step = text.split()[0]
        if step == "lowering" and step not in self.marks:
            self.base_mib = reset_peak()
        self.marks.setdefault(step, time.perf_counter())

    def step(self, weights: Path) -> Step:
        """Return the costs after the export returned."""
        done, peak = time.perf_counter(), status_mib("VmHWM")
        start, hashing = self.marks["lowering"], self.marks["hashing"]
        extra = None if peak is None or self.base_mib is None else peak - self.base_mib
        return Step(hashing - start, done - start, weights.stat().st_size / 2**20, extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(STEP_GOALS_S), help="models to export")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians count (default: 3)")
    parser.add_argument("--step", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(asdict(measure_step(*arguments.step))))
        return
    repeats = 1 if arguments.quick else arguments.repeats
    goals: list[Goal] = []
    cases: list[dict[str, Any]] = []
    for model in arguments.model:
        for method in METHODS:
            say(f"{model}, {method}")
            steps = [run_step(model, method) for _ in range(repeats)]
            commands = [run_command(model, method) for _ in range(repeats)]
            goals += case_goals(f"{model}, {method}", STEP_GOALS_S.get(model), steps, commands)
            cases.append(
                {
                    "model": model,
                    "method": method,
                    "steps": [asdict(step) for step in steps],
                    "commands": [asdict(command) for command in commands],
                }
            )
    print("\n## Export cost (medians)\n")
    print(markdown_table([row(case) for case in cases]))
    del arguments.step
    write_result("export_cost", arguments, goals, cases)


def measure_step(model: str, method: str) -> Step:
    """Export in this process and return the costs of the step."""
    request = ExportRequest(model=model, random_weights=True, verify=False, **METHODS[method])
    watch = StepWatch()
    with tempfile.TemporaryDirectory(prefix="edgeprune-export-") as directory:
        bundle = export_model(request, Path(directory) / "bundle", progress=watch)
        return watch.step(bundle.path / "model.onnx.data")


def run_step(model: str, method: str) -> Step:
    """Return the costs of an export step in a process of its own."""
    command = [sys.executable, __file__, "--step", model, method]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Step(**json.loads(done.stdout.splitlines()[-1]))


def run_command(model: str, method: str) -> Command:
    """Return the costs of `edgeprune export` with everything it does."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-export-") as directory:
        fields = METHODS[method]
        options = ["--model", model, "--random-weights", "--target", "ort-cpu", "-o", f"{directory}/bundle"]
        if fields:
            options += ["--method", fields["method"], "--keep-rate", str(fields["keep_rate"])]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "edgeprune", "export", *options, "--quiet"])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"edgeprune export {' '.join(options)} ended with exit code {process.returncode}")
    return Command(seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def case_goals(label: str, step_goal: float | None, steps: Sequence[Step], commands: Sequence[Command]) -> list[Goal]:
    """Return the goals of one model and method."""
    seconds = exact(stats.median([step.total_s for step in steps]))
    command = exact(stats.median([command.seconds for command in commands]))
    goals = [Goal(f"whole command, {label}", command, COMMAND_GOAL_S, at_least=False, unit="s")]
    if step_goal is not None:
        goals.insert(0, Goal(f"export step alone, {label}", seconds, step_goal, at_least=False, unit="s"))
    copies = [step.extra_mib / step.weights_mib for step in steps if step.extra_mib is not None]
    if copies:
        value = exact(stats.median(copies))
        goals.append(Goal(f"extra memory of the step, {label}", value, COPIES_GOAL, at_least=False, unit="copies"))
    return goals


def row(case: dict[str, Any]) -> dict[str, str]:
    """Return a case as a row of the table."""
    steps, commands = case["steps"], case["commands"]

    def middle(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{stats.median(known):.2f}" if known else "n/a"

    return {
        "model": case["model"],
        "method": case["method"],
        "weights (MiB)": middle([s["weights_mib"] for s in steps]),
        "lowering (s)": middle([s["lowering_s"] for s in steps]),
        "export step (s)": middle([s["total_s"] for s in steps]),
        "extra memory (MiB)": middle([s["extra_mib"] for s in steps]),
        "whole command (s)": middle([c["seconds"] for c in commands]),
        "its peak (MiB)": middle([c["peak_mib"] for c in commands]),
        "n": str(len(steps)),
    }


def reset_peak() -> float | None:
    """Make the resident set's peak start from now; return the resident set in MiB, None where impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return status_mib("VmRSS")


def status_mib(field: str) -> float | None:
    """Return a memory field of this process in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    main()
