"""Our pruned graphs at keep rate 0.7 against what else a user could run, on the CPU.

Rivals: the dense model in OpenVINO, DynamicViT's published inference path through both torch exporters, and
ToMe with r = 13 through torch's dynamo exporter. Weights are random, so only speed is compared; all models
have one architecture.

    python benchmarks/ort_cpu_peers.py [--model NAME] [--batch 1 8] [--threads 1] [--rounds 40] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import (
    Goal,
    Group,
    Images,
    Workshop,
    add_measure_options,
    measure_group,
    measure_plan,
    openvino_runner,
    pinned,
    print_group,
    random_images,
    write_result,
)
from _peers import MergingViT, OfficialStyleDynamicViT

from edgeprune.bench.measure import Runner
from edgeprune.bench.naive import Exporter, export_naive
from edgeprune.bench.runners import onnx_runner, session_runner
from edgeprune.export import ExportRequest, load_torch_model
from edgeprune.models.registry import get_model_config

KEEP_RATE = 0.7
TOME_R = 13
NAIVE_DENSE = "naive dense"
OPENVINO_DENSE = ("openvino (naive dense)", "openvino (portable dense)")
DYNAMICVIT = ("dynamicvit (legacy export)", "dynamicvit (dynamo export)")
TOME = f"tome r={TOME_R} (dynamo export)"
OURS: dict[str, dict[str, Any]] = {
    "ours (evit)": {"method": "evit", "method_options": {"fuse": "false"}},
    "ours (evit fused)": {"method": "evit", "method_options": {"fuse": "true"}},
    "ours (dynamicvit)": {"method": "dynamicvit"},
}
GOALS = {"OpenVINO dense": 1.7, "the naive DynamicViT export": 1.15, "the ToMe export": 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measure_options(parser)
    arguments = parser.parse_args()
    plan = measure_plan(arguments)
    goals: list[Goal] = []
    groups: list[Group] = []
    for batch in arguments.batch:
        with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
            workshop = Workshop(Path(directory))
            files = export_rivals(arguments.model, batch, workshop)
            images = random_images(batch, get_model_config(arguments.model).image_size)
            for threads in arguments.threads:
                with pinned(threads):
                    runners = make_runners(arguments.model, batch, threads, workshop, files, images)
                    group = measure_group("peers", runners, batch=batch, threads=threads, plan=plan)
                for ours in OURS:
                    group.values.update({f"{ours} over {what}": r for what, r in rivals(group, ours).items()})
                print_group(group, NAIVE_DENSE)
                groups.append(group)
                if threads == 1:
                    goals += [
                        Goal(f"{ours} over {what}, batch {batch}", ratio, GOALS[what])
                        for ours in OURS
                        for what, ratio in rivals(group, ours).items()
                    ]
    write_result("ort_cpu_peers", arguments, goals, [group.to_dict() for group in groups])


def export_rivals(model: str, batch: int, workshop: Workshop) -> dict[str, Path]:
    """Return the ONNX files of the other ways, by runner name."""
    config = get_model_config(model)
    dense = load_torch_model(ExportRequest(model=model, random_weights=True))
    pruned = load_torch_model(ExportRequest(model=model, method="dynamicvit", keep_rate=KEEP_RATE, random_weights=True))
    official, tome = OfficialStyleDynamicViT(pruned).eval(), MergingViT(dense, TOME_R).eval()
    legacy: Exporter = "legacy"
    dynamo: Exporter = "dynamo"
    wanted = (
        (NAIVE_DENSE, dense, legacy),
        (DYNAMICVIT[0], official, legacy),
        (DYNAMICVIT[1], official, dynamo),
        (TOME, tome, dynamo),
    )
    return {
        name: export_naive(module, workshop.directory / f"rival-{i}.onnx", config, batch=batch, exporter=exporter)
        for i, (name, module, exporter) in enumerate(wanted)
    }


def make_runners(
    model: str, batch: int, threads: int, workshop: Workshop, files: Mapping[str, Path], images: Images
) -> dict[str, Runner]:
    """Return every runner of the group."""
    common: dict[str, Any] = {"model": model, "batch": (batch, batch)}
    portable = workshop.bundle(**common, target="onnx", dead_rows=False).graph_path("model")
    runners = {name: onnx_runner(path, images, threads=threads) for name, path in files.items()}
    for name, path in zip(OPENVINO_DENSE, (files[NAIVE_DENSE], portable), strict=True):
        runners[name] = openvino_runner(path, images, threads=threads)
    for name, fields in OURS.items():
        bundle = workshop.bundle(**common, target="ort-cpu", keep_rate=KEEP_RATE, **fields)
        runners[name] = session_runner(bundle, "model", images, threads=threads)
    return runners


def rivals(group: Group, ours: str) -> dict[str, Any]:
    """Return how many times faster `ours` is than each rival, the faster of its variants."""
    variants = {
        "OpenVINO dense": OPENVINO_DENSE,
        "the naive DynamicViT export": DYNAMICVIT,
        "the ToMe export": (TOME,),
    }
    return {
        what: min((group.ratio(name, ours) for name in names), key=lambda ratio: ratio.estimate)
        for what, names in variants.items()
    }


if __name__ == "__main__":
    main()
