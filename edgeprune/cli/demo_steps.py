"""The steps of `edgeprune demo`, each of them a call a user could make too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeprune.bench import BenchResult
from edgeprune.checks.accuracy import Accuracy
from edgeprune.cli.common import write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.run import write_overlays
from edgeprune.cli.ui import Report, Ui
from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import ParityInfo

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"  # in a checkout; not part of the package
PRUNED, DENSE = "vit_digits_dynamicvit.safetensors", "vit_digits_dense.safetensors"
BENCH_SECONDS = 5.0
OVERLAYS = 6


@dataclass
class Demo:
    """What the steps found.

    Attributes:
        pruned, unpruned: accuracy of the pruned graph, and of the same weights without pruning.
        dense: accuracy of the dense checkpoint beside it, None when there is none.
    """

    bundle: Bundle
    parity: ParityInfo
    pruned: Accuracy
    unpruned: Accuracy
    dense: Accuracy | None
    bench: BenchResult


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError `output-exists` when something is in the way."""
    if output.exists() and not (overwrite and output.is_dir()):
        raise InputError(
            f"'{output}' exists",
            code="output-exists",
            expected="a directory that does not exist",
            hint="choose another -o DIR, or add --overwrite to replace an earlier demo's files",
        )


def find_checkpoint(given: Path | None) -> Path:
    """Return the checkpoint to use, which must have its record beside it.

    Raises:
        InputError: `demo-checkpoint`.
    """
    source = given or CHECKPOINTS / PRUNED
    if not source.is_file() or not source.with_suffix(".json").is_file():
        absent = source if not source.is_file() else source.with_suffix(".json")
        raise InputError(
            f"there is no '{absent}'" if given else "the shipped checkpoints are not here: this is no checkout",
            code="demo-checkpoint",
            expected="a checkout of the edgeprune repository, or --checkpoint with a file `edgeprune finetune` wrote",
            hint="clone the repository and run `make demo` in it",
        )
    return source


def run_steps(ui: Ui, source: Path, output: Path, report: Report) -> Demo:
    """Export, verify, evaluate and bench."""
    from edgeprune.bench import bench_bundle
    from edgeprune.checks.accuracy import evaluate
    from edgeprune.checks.parity import check_parity, model_from_manifest, verify_bundle
    from edgeprune.data import open_dataset
    from edgeprune.runtime.session import Session

    report("exporting", 0.0)
    bundle = export(source, output / "bundle")
    ui.written.append(bundle.path)
    report("verifying against PyTorch", 0.2)
    parity = verify_bundle(bundle, model_from_manifest(bundle.manifest, source), images=16)
    check_parity(parity, bundle.manifest.precision)
    digits = open_dataset("digits")
    accuracies = {}
    for graph in ("model", "dense"):
        report(f"evaluating the {graph} graph on {len(digits)} held-out digits", 0.3)
        accuracies[graph] = evaluate(Session(bundle, graph=graph, check_hashes=False), digits)
    dense_source = source.with_name(DENSE)
    dense = None
    if dense_source.is_file():
        report("exporting and evaluating the dense checkpoint", 0.5)
        dense = evaluate(Session(export(dense_source, output / "dense")), digits)
    report("measuring both graphs, interleaved", 0.7)
    bench = bench_bundle(bundle, threads=1, duration=BENCH_SECONDS, quick=True, against=("dense",))
    write_text(ui, output / "bench.json", json.dumps(plain(bench.to_dict()), indent=1) + "\n")
    return Demo(bundle, parity, accuracies["model"], accuracies["dense"], dense, bench)


def export(source: Path, out: Path) -> Bundle:
    """Export a checkpoint as its record says."""
    from edgeprune.data.digits import LABELS
    from edgeprune.export import ExportRequest, export_model

    record = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    stages = ",".join(str(stage["block"]) for stage in record["stages"])
    request = ExportRequest(
        model=record["model"],
        method=record["method"],
        keep_rate=record["keep_rate"],
        stages=stages or None,
        method_options=record["method_options"],
        checkpoint=str(source),
        token_outputs=bool(stages),
        labels=list(LABELS),
        overwrite=True,
    )
    bundle = export_model(request, out)
    if [stage.kept for stage in bundle.manifest.method.stages] != [stage["kept"] for stage in record["stages"]]:
        raise InputError(
            f"'{source}' was trained with a keep rate for each stage, which the demo does not know",
            code="demo-checkpoint",
            expected="a checkpoint trained with one --keep-rate",
            hint="use edgeprune export with the --stages it was trained with",
        )
    return bundle


def draw_overlays(ui: Ui, bundle: Bundle, output: Path) -> list[Path]:
    """Write a few held-out images and the same with dropped patches dimmed; return the latter."""
    from PIL import Image

    from edgeprune.data.digits import make_split
    from edgeprune.runtime.session import Session

    images, labels = make_split("test", OVERLAYS, 0)
    directory = output / "images"
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{i}_digit_{label}.png" for i, label in enumerate(labels)]
    for file, pixels in zip(files, images, strict=True):
        Image.fromarray(pixels).save(file)
    kept = [(p.path, p.kept) for p in Session(bundle, check_hashes=False).classify(files)]
    return write_overlays(ui, bundle.manifest, kept, output / "overlays")


def write_report(ui: Ui, demo: Demo, output: Path) -> Path | None:
    """Write the report of everything the demo found and return its path; None, with a note, without jinja2."""
    from edgeprune.bench.html import Accuracies, GraphAccuracy, ReportInput, draw_overlays, render

    graphs = {
        name: GraphAccuracy(found.top1, found.top5, found.images)
        for name, found in (("dense", demo.dense or demo.unpruned), ("model", demo.pruned))
    }
    note = (
        "accuracy: dense is the same weights without pruning"
        if demo.dense is None
        else "accuracy: dense has a checkpoint of its own"
    )
    accuracies = Accuracies("bundle", None, "digits", None, graphs, note)
    report = ReportInput([demo.bench], [accuracies], [demo.bundle])
    path = output / "report.html"
    try:
        overlays = [draw_overlays(demo.bundle, data="digits", count=OVERLAYS)] if tells_tokens(demo.bundle) else []
        write_text(ui, path, render(report, overlays))
    except EnvironmentLackError as error:
        ui.note(f"no report: {error.message}")
        return None
    return path


def tells_tokens(bundle: Bundle) -> bool:
    """Tell whether the pruned graph says what it keeps; a dense one has nothing to say."""
    return bool(bundle.manifest.method.stages)
