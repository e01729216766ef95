"""How much of the saved arithmetic becomes saved time on ONNX Runtime CPU.

Three denominators are kept apart:
  best dense      the dense graph in the target's best form, every row computed (no dead-row elimination)
  shipped dense   what `edgeprune export --method dense` writes: the same with dead-row elimination
  naive dense     the same weights through torch.onnx's legacy exporter in its defaults
Nominal efficiency = measured speed-up / MACs ratio of the plain pruned model.

    python benchmarks/ort_cpu_efficiency.py [--model NAME] [--batch 1 8] [--threads 1] [--rounds 40] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import (
    Goal,
    Group,
    Images,
    Workshop,
    add_measure_options,
    exact,
    markdown_table,
    measure_group,
    measure_plan,
    openvino_runner,
    pinned,
    print_group,
    profile_share,
    random_images,
    relative_error,
    write_result,
)

from edgeprune.bench.measure import MeasurePlan, Runner
from edgeprune.bench.naive import export_naive
from edgeprune.bench.runners import session_runner
from edgeprune.export import ExportRequest, load_torch_model
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.dynamicvit import PredictorScorer
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Macs
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.session import Session

BEST, SHIPPED, NAIVE = "best dense", "shipped dense", "naive dense"
OPENVINO_PRUNED = "openvino (portable pruned)"
NOMINAL_GOALS = {1: {0.7: 1.05, 0.5: 1.08, 0.3: 1.10}, 8: {0.7: 1.10, 0.5: 1.14, 0.3: 1.18}}
SELECTION_GOALS = {1: 0.007, 8: 0.0035}
PREDICTOR_GOAL = 0.97
PROFILED_RUNS = 20
MAX_LOSS = 1e-4


@dataclass(frozen=True)
class Case:
    """A pruned model to measure."""

    name: str
    method: str
    keep_rate: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its export request."""
        return {"method": self.method, "keep_rate": self.keep_rate, "method_options": self.options}


CASES = (
    *(Case(f"evit {rate}", "evit", rate, {"fuse": "false"}) for rate in (0.7, 0.5, 0.3)),
    *(Case(f"evit fused {rate}", "evit", rate, {"fuse": "true"}) for rate in (0.7, 0.5, 0.3)),
    Case("dynamicvit 0.7", "dynamicvit", 0.7),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measure_options(parser)
    arguments = parser.parse_args()
    plan = measure_plan(arguments)
    goals: list[Goal] = []
    cases: list[dict[str, Any]] = []
    for batch in arguments.batch:
        with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
            bench = Efficiency(arguments.model, batch, plan, Workshop(Path(directory)))
            for threads in arguments.threads:
                with pinned(threads):
                    groups = [bench.dense(threads), *(bench.pruned(case, threads) for case in CASES)]
                cases += [group.to_dict() for group in groups]
                print(f"\n## Batch {batch}, {threads} thread(s)\n")
                print(markdown_table([bench.row(case, group) for case, group in zip(CASES, groups[1:], strict=True)]))
            goals += bench.goals
    write_result("ort_cpu_efficiency", arguments, goals, cases)


class Efficiency:
    """The graphs of one model at one batch size, and the goals they meet or miss."""

    def __init__(self, model: str, batch: int, plan: MeasurePlan, workshop: Workshop) -> None:
        self.model, self.batch, self.plan = model, batch, plan
        self.common: dict[str, Any] = {"model": model, "batch": (batch, batch)}
        self.goals: list[Goal] = []
        self.images = random_images(batch, get_model_config(model).image_size)
        self.best = workshop.bundle(**self.common, target="ort-cpu", dead_rows=False)
        self.shipped = workshop.bundle(**self.common, target="ort-cpu")
        self.portable = workshop.bundle(**self.common, target="onnx", dead_rows=False)
        self.portable_shipped = workshop.bundle(**self.common, target="onnx")
        self.bundles = {case.name: workshop.bundle(**self.common, target="ort-cpu", **case.fields) for case in CASES}
        self.portable_pruned = {
            case.name: workshop.bundle(**self.common, target="onnx", **case.fields)
            for case in CASES
            if case.keep_rate == 0.7
        }
        torch_model = load_torch_model(ExportRequest(model=model, random_weights=True))
        path = workshop.directory / "naive.onnx"
        self.naive = export_naive(torch_model, path, get_model_config(model), batch=batch)

    def dense(self, threads: int) -> Group:
        """Measure the dense graphs against each other and against other ways to run the model."""
        openvino = {
            "openvino (naive dense)": self.naive,
            "openvino (portable dense)": self.portable.graph_path("model"),
            "openvino (portable dense without dead rows)": self.portable_shipped.graph_path("model"),
        }
        naive = OrtBackend(self.naive, threads=threads, spinning=False)
        runners: dict[str, Runner] = {
            BEST: self.runner(self.best, "model", threads),
            SHIPPED: self.runner(self.shipped, "model", threads),
            NAIVE: lambda: naive.run({"images": self.images}),
            **{name: openvino_runner(path, self.images, threads=threads) for name, path in openvino.items()},
        }
        group = self.measure("dense", runners, threads)
        rival = min(list(openvino)[:2], key=lambda name: group.ratio(name, BEST).estimate)
        over_naive, over_openvino = (group.ratio(SHIPPED, other).complement() for other in (NAIVE, rival))
        loss = exact(self.loss(naive))
        group.values = {
            "time saved by shipped dense over naive dense": over_naive,
            "time saved by shipped dense over OpenVINO's faster dense": over_openvino,
            "time saved by best dense over naive dense": group.ratio(BEST, NAIVE).complement(),
            "relative difference of logits, shipped dense and naive dense": loss,
        }
        print_group(group, NAIVE)
        if threads == 1:
            where = f"batch {self.batch}"
            self.goals += [
                Goal(f"time saved by shipped dense over naive dense, {where}", over_naive, 0.08, unit="%"),
                Goal(f"time saved by shipped dense over OpenVINO dense, {where}", over_openvino, 0.06, unit="%"),
                Goal(f"the same logits (relative difference), {where}", loss, MAX_LOSS, at_least=False, unit=""),
            ]
        return group

    def pruned(self, case: Case, threads: int) -> Group:
        """Measure a pruned graph against the dense ones and against constant positions."""
        bundle = self.bundles[case.name]
        runners = {
            BEST: self.runner(self.best, "model", threads),
            SHIPPED: self.runner(bundle, "dense", threads),
            case.name: self.runner(bundle, "model", threads),
            "random": self.runner(bundle, "random", threads),
        }
        if case.name in self.portable_pruned:
            path = self.portable_pruned[case.name].graph_path("model")
            runners[OPENVINO_PRUNED] = openvino_runner(path, self.images, threads=threads)
        group = self.measure(case.name, runners, threads)
        macs = manifest_macs(bundle)
        speedup, shipped = group.ratio(BEST, case.name), group.ratio(SHIPPED, case.name)
        profiled = profile_share(bundle.graph_path("model"), self.images, runs=PROFILED_RUNS, part="select")
        group.values = {
            "MACs ratio": exact(macs.dense / macs.pruned),
            "speed-up over best dense": speedup,
            "speed-up over shipped dense": shipped,
            "nominal efficiency over best dense": speedup.scaled(macs.pruned / macs.dense),
            "nominal efficiency over shipped dense": shipped.scaled(macs.pruned / macs.dense),
            "own efficiency over best dense": speedup.scaled(macs.pruned_executed / macs.dense),
            "own efficiency over shipped dense": shipped.scaled(macs.pruned_executed / macs.dense_executed),
            "selection against random": group.ratio("random", case.name).complement(),
            "selection by profiler": exact(profiled),
        }
        if OPENVINO_PRUNED in runners:
            ratio = group.ratio(OPENVINO_PRUNED, case.name)
            group.values["speed-up over OpenVINO on the portable pruned graph"] = ratio
        print_group(group, BEST)
        if threads == 1:
            self.goals += self.pruned_goals(case, group)
        return group

    def pruned_goals(self, case: Case, group: Group) -> list[Goal]:
        """Return the goals that concern a pruned graph."""
        label, selection = f"{case.name}, batch {self.batch}", SELECTION_GOALS.get(self.batch)
        predictors = case.method == "dynamicvit"
        kind, wanted = "nominal", NOMINAL_GOALS.get(self.batch, {}).get(case.keep_rate)
        if predictors:
            kind, wanted = "own", PREDICTOR_GOAL
        goals = []
        if wanted is not None:
            goals.append(
                Goal(
                    f"{kind} efficiency over best dense, {label}",
                    group.values[f"{kind} efficiency over best dense"],
                    wanted,
                )
            )
        if selection is not None:
            allowed = selection + (predictor_share(self.bundles[case.name]) if predictors else 0)
            goals += [
                Goal(f"{how}, {label}", group.values[how], allowed, at_least=False, unit="%")
                for how in ("selection by profiler", "selection against random")
            ]
        return goals

    def row(self, case: Case, group: Group) -> dict[str, str]:
        """Return the case as a row of the summary."""
        names = {
            "MACs ratio (x)": "MACs ratio",
            "vs best dense (x)": "speed-up over best dense",
            "vs shipped dense (x)": "speed-up over shipped dense",
            "nominal eff. vs best": "nominal efficiency over best dense",
            "nominal eff. vs shipped": "nominal efficiency over shipped dense",
            "own eff. vs best": "own efficiency over best dense",
            "own eff. vs shipped": "own efficiency over shipped dense",
        }
        cells = {head: f"{group.values[name].estimate:.3f}" for head, name in names.items()}
        shares = ("selection by profiler", "selection against random")
        return {
            "case": case.name,
            **cells,
            **{f"{name} (%)": f"{group.values[name].estimate * 100:.2f}" for name in shares},
            "n": str(group.measurement.rounds * group.measurement.calls_per_visit),
        }

    def runner(self, bundle: Bundle, graph: str, threads: int) -> Runner:
        """Return a runner of a graph in ONNX Runtime."""
        return session_runner(bundle, graph, self.images, threads=threads)

    def measure(self, name: str, runners: dict[str, Runner], threads: int) -> Group:
        """Measure a group at this batch."""
        return measure_group(name, runners, batch=self.batch, threads=threads, plan=self.plan)

    def loss(self, naive: OrtBackend) -> float:
        """Return how far the shipped dense graph is from the naive export of the same weights."""
        ours: Images = Session(self.shipped, threads=1, spinning=False).run(self.images).logits
        return relative_error(ours, naive.run({"images": self.images})["logits"])


def predictor_share(bundle: Bundle) -> float:
    """Return the share of a DynamicViT graph's multiply-accumulates that its predictors make up."""
    config = get_model_config(bundle.manifest.model.name)
    stages = bundle.manifest.method.stages
    predictors = sum(PredictorScorer().macs(config, stage.tokens_in) for stage in stages)
    return predictors / manifest_macs(bundle).pruned_executed


def manifest_macs(bundle: Bundle) -> Macs:
    """Return the multiply-accumulates a manifest records."""
    if bundle.manifest.macs is None:
        raise SystemExit(f"the bundle of {bundle.manifest.model.name} does not record its MACs")
    return bundle.manifest.macs


if __name__ == "__main__":
    main()
