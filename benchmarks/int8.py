"""What 8-bit integers gain on top of pruning on this processor, and what they cost on the digits.

Latency: every case takes turns with the naive dense export (torch.onnx in its defaults, float32); the weights are
random, so these graphs say nothing of accuracy. A visit is several runs in a row and counts by its median: a network
that runs alone keeps the small integer weights in the processor's cache, which single runs in turns would empty.

Accuracy: the shipped digits checkpoints, calibrated on training images, judged on 2,000 others; the TensorRT graphs are
emulated, no engine is involved.

    python benchmarks/int8.py [--model NAME...] [--batch 1 8] [--threads 1 2] [--only latency|accuracy]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import (
    Goal,
    Group,
    Workshop,
    add_measure_options,
    exact,
    markdown_table,
    measure_group,
    measure_plan,
    pinned,
    print_group,
    random_images,
    say,
    write_result,
)

from edgeprune.bench.measure import MeasurePlan, Runner
from edgeprune.bench.naive import export_naive_dense
from edgeprune.bench.runners import session_runner
from edgeprune.export import ExportRequest, export_model
from edgeprune.models.registry import get_model_config
from edgeprune.runtime.ort import OrtBackend

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
MODELS = ["deit_small_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_224"]
NAIVE, FLOAT = "naive dense", "float"
SCHEMES = ("dynamic", "static")
SPEED_GOALS = {("deit_small_patch16_224", 0.7): 2.9, ("deit_small_patch16_224", 0.5): 3.9}
DIGITS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dynamicvit": {"keep_rate": 0.7},
    "evit": {"keep_rate": 0.7, "stages": "0,2,3"},
    "ats": {},
}
ACCURACY_TARGETS = ("ort-cpu-int8", "trt-int8", "trt-fp8")
DROP_GOAL = 0.5  # points of top-1
VISIT_S = 0.15


@dataclass(frozen=True)
class Case:
    """A model to measure."""

    method: str
    keep_rate: float = 1.0
    stages: str | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        at = "" if self.stages is None else f" at blocks {self.stages}"
        return self.method if self.method == "dense" else f"{self.method} {self.keep_rate}{at}"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its export request."""
        options = {"fuse": "false"} if self.method == "evit" else {}
        fields = {"method": self.method, "keep_rate": self.keep_rate, "method_options": options}
        return fields if self.stages is None else {**fields, "stages": self.stages}


CASES = (
    Case("dense"),
    *(Case("evit", rate) for rate in (0.7, 0.5)),
    Case("dynamicvit", 0.7),
    # a block before EViT's own places: about as many operations as choosing behind the third, sixth and ninth
    *(Case("evit", rate, "2,5,8") for rate in (0.7, 0.5)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measure_options(parser)
    parser.set_defaults(model=MODELS, threads=[1, 2], rounds=10)
    next(action for action in parser._actions if action.dest == "model").nargs = "+"
    parser.add_argument("--only", choices=["latency", "accuracy"], help="half of it")
    arguments = parser.parse_args()
    plan = replace(measure_plan(arguments), visit_s=VISIT_S)
    goals: list[Goal] = []
    cases: list[dict[str, Any]] = []
    for model in arguments.model if arguments.only != "accuracy" else []:
        for batch in arguments.batch:
            rows: list[dict[str, str]] = []
            with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
                bench = Integers(model, batch, plan, Path(directory))
                for case in CASES:
                    for threads in arguments.threads:
                        with pinned(threads):
                            group = bench.measure(case, threads)
                        goals += bench.goals(case, group)
                        rows.append(bench.row(case, group))
                        cases.append(group.to_dict())
            print(f"\n## {model}, batch {batch}: times faster than the naive dense float32 export\n")
            print(markdown_table(rows), flush=True)
    accuracy = [] if arguments.only == "latency" else judge_digits(goals)
    write_result("int8", arguments, goals, [*cases, *accuracy])


class Integers:
    """The graphs of one model at one batch size."""

    def __init__(self, model: str, batch: int, plan: MeasurePlan, directory: Path) -> None:
        config = get_model_config(model)
        self.model, self.batch, self.plan = model, batch, plan
        self.workshop = Workshop(directory)
        self.images = random_images(batch, config.image_size)
        self.naive = export_naive_dense(config, directory, batch=batch)

    def measure(self, case: Case, threads: int) -> Group:
        """Measure the forms of a case in turns with the naive dense export."""
        naive = OrtBackend(self.naive, threads=threads, spinning=False)
        common: dict[str, Any] = {"model": self.model, "batch": (self.batch, self.batch), **case.fields}
        bundles = {FLOAT: self.workshop.bundle(**common, target="ort-cpu")}
        bundles |= {s: self.workshop.bundle(**common, target="ort-cpu-int8", quantization=s) for s in SCHEMES}
        runners: dict[str, Runner] = {NAIVE: lambda: naive.run({"images": self.images})}
        runners |= {n: session_runner(b, "model", self.images, threads=threads) for n, b in bundles.items()}
        name = f"{self.model} {case.name}"
        group = measure_group(name, runners, batch=self.batch, threads=threads, plan=self.plan)
        group.values = {f"{form} over {NAIVE}": group.ratio(NAIVE, form) for form in bundles}
        group.values |= {f"{form} over {FLOAT}": group.ratio(FLOAT, form) for form in SCHEMES}
        print_group(group, NAIVE)
        return group

    def goals(self, case: Case, group: Group) -> list[Goal]:
        """Return what is to be reached: by the faster scheme, which is the one an export with images chooses."""
        wanted = SPEED_GOALS.get((self.model, case.keep_rate))
        if wanted is None or case.method != "evit":
            return []
        form = max(SCHEMES, key=lambda scheme: group.values[f"{scheme} over {NAIVE}"].estimate)
        where = f"{self.model} {case.name}, {form}, batch {self.batch}, {group.threads} thread(s)"
        return [
            Goal(f"int8 over the naive dense float32 export: {where}", group.values[f"{form} over {NAIVE}"], wanted)
        ]

    def row(self, case: Case, group: Group) -> dict[str, str]:
        """Return the case as a row of the summary."""
        forms = {form: f"{group.values[f'{form} over {NAIVE}'].estimate:.2f}" for form in (FLOAT, *SCHEMES)}
        gains = {f"{s} / float": f"{group.values[f'{s} over {FLOAT}'].estimate:.2f}" for s in SCHEMES}
        return {
            "case": case.name,
            "threads": str(group.threads),
            **forms,
            **gains,
            "unstable": str(len(group.unstable)),
        }


def judge_digits(goals: list[Goal]) -> list[dict[str, Any]]:
    """Export the digits checkpoints with calibration and take down what their manifests say of the cost."""
    cases, rows = [], []
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
        for method, fields in DIGITS.items():
            for target in ACCURACY_TARGETS:
                say(f"digits, {method}, {target}")
                checkpoint = str(CHECKPOINTS / f"vit_digits_{method}.safetensors")
                request = ExportRequest(
                    "vit_digits", method, target=target, checkpoint=checkpoint, calibration="digits", **fields
                )
                manifest = export_model(request, Path(directory) / f"{method}-{target}").manifest
                info = manifest.quantization
                assert info is not None
                found = info.accuracy
                assert found is not None and found.float_top1 is not None and found.top1 is not None
                goals.append(
                    Goal(
                        f"points of top-1 lost on the digits, {method}, {target}",
                        exact(found.drop),
                        DROP_GOAL,
                        at_least=False,
                        unit="",
                    )
                )
                cases.append({"digits": method, "target": target, "quantization": info.model_dump(mode="json")})
                rows.append(
                    {
                        "method": method,
                        "target": target,
                        "scheme": info.scheme,
                        "float (%)": f"{100 * found.float_top1:.2f}",
                        "quantized (%)": f"{100 * found.top1:.2f}",
                        "same class (%)": f"{100 * found.top1_agreement:.2f}",
                        "kept overlap (%)": "" if found.kept_overlap is None else f"{100 * found.kept_overlap:.1f}",
                    }
                )
    print("\n## Top-1 on 2,000 digits\n")
    print(markdown_table(rows), flush=True)
    return cases


if __name__ == "__main__":
    main()
