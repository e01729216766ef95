"""What a lower precision changes: typed graphs against the same graphs in float32, before any GPU.

Typed graphs are emulated on the processor, see `edgeprune.export.emulate`: float32 arithmetic, every float16 or
bfloat16 tensor rounded to its type. Kept sets and best classes are compared as they are; nothing is set aside as a tie.

- digits: the shipped checkpoints on the 2,000 held-out images of their task.
- photographs: DeiT-S with random weights whose attention is sharpened, on random crops of the two photographs that
  scikit-learn ships. Top-1 is the best of 1,000 random logits: harder to keep than a trained model's.

    python benchmarks/typed_parity.py [--precisions fp16 bf16] [--images 2000] [--crops 128] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, Images, add_output_options, exact, markdown_table, say, write_result
from _sharpened import SHARPNESS, write_sharpened
from PIL import Image

from edgeprune.checks.compare import jaccard
from edgeprune.data import open_dataset
from edgeprune.data.preprocess import as_input
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.api import load_reference
from edgeprune.export.emulate import open_emulated
from edgeprune.export.request import resolve
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.session import Result, Session

DIGITS_METHODS = ("dense", "dynamicvit", "evit", "ats", "asvit", "sait", "cropr", "tome")
PHOTO_METHODS = ("dense", "dynamicvit", "evit", "ats")
DEIT = "deit_small_patch16_224"
KEEP_RATE = {"dynamicvit": 0.7, "evit": 0.7, "ats": 0.7}
TOP1_GOAL, OVERLAP_GOAL = 0.995, 0.98
QUICK_IMAGES = 32
BATCH = 8
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=["fp16", "bf16"], default=["fp16", "bf16"])
    parser.add_argument("--images", type=int, default=2000, help="of the digits task (default: 2000)")
    parser.add_argument("--crops", type=int, default=128, help="of the photographs (default: 128)")
    parser.add_argument(
        "--sharpness", type=float, default=SHARPNESS, help="factor of DeiT's attention logits (default: 3)"
    )
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.crops = min(arguments.images, QUICK_IMAGES), min(arguments.crops, QUICK_IMAGES)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
        folder = Path(directory)
        for method in DIGITS_METHODS:
            request = {"model": "vit_digits", "checkpoint": str(CHECKPOINTS / f"vit_digits_{method}.safetensors")}
            cases += compare_precisions("digits", method, request, arguments, folder)
        for method in PHOTO_METHODS:
            request = {"model": DEIT, "checkpoint": str(sharpened(method, arguments.sharpness, folder))}
            cases += compare_precisions("photographs", method, request, arguments, folder)
    print(markdown_table([row(case) for case in cases]))
    goals = [goal for case in cases if case["precision"] == "fp16" for goal in goals_of(case)]
    write_result("typed_parity", arguments, goals, cases)


def compare_precisions(
    data: str, method: str, request: dict[str, Any], arguments: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the figures of every precision against float32."""

    def run(precision: str) -> tuple[Bundle, list[Result]]:
        bundle = export(method, request, precision, folder)
        session = Session(bundle, open_graph=open_emulated, check_hashes=False)
        return bundle, [session.run(batch) for batch in images.split(bundle)]

    images = Inputs(data, arguments)
    _, wanted = run("fp32")
    for precision in arguments.precisions:
        bundle, found = run(precision)
        case = {"data": data, "method": method, "model": request["model"], "precision": precision}
        case |= figures(found, wanted, images.targets) | {"kept": [s.kept for s in bundle.manifest.method.stages]}
        say(f"{data} {method} {precision}: top-1 {case['top1_agreement']:.4f}, overlap {case['overlap']}")
        yield case


def export(method: str, request: dict[str, Any], precision: str, folder: Path) -> Bundle:
    """Return a bundle of typed graphs that tells what it keeps."""
    rate = {"keep_rate": KEEP_RATE[method]} if method in KEEP_RATE else {}
    made = ExportRequest(
        method=method, target=f"trt-{precision}", selection="native", batch=(1, BATCH), token_outputs=method != "dense",
        verify=precision == "fp32", overwrite=True, **rate, **request,
    )  # fmt: skip
    return export_model(made, folder / f"{request['model']}-{method}-{precision}")


def sharpened(method: str, sharpness: float, folder: Path) -> Path:
    """Write random weights of DeiT whose queries and keys are scaled up, and return the file."""
    rate = {"keep_rate": KEEP_RATE[method]} if method in KEEP_RATE else {}
    model, _, _ = load_reference(resolve(ExportRequest(model=DEIT, method=method, random_weights=True, **rate)))
    path = folder / f"{method}.safetensors"
    write_sharpened(model, sharpness, path)
    return path


class Inputs:
    """The images of one comparison; `targets` are their classes, None where there are none."""

    def __init__(self, data: str, arguments: argparse.Namespace) -> None:
        self.data, self.arguments = data, arguments
        self.targets: np.ndarray | None = None

    def split(self, bundle: Bundle) -> Iterator[Images]:
        """Yield the batches as a bundle takes them."""
        info = bundle.manifest.preprocessing
        if self.data == "digits":
            labels = []
            for batch, targets in open_dataset("digits", "test", limit=self.arguments.images).batches(BATCH, info):
                labels.append(targets)
                yield batch
            self.targets = np.concatenate(labels)
            return
        crops = [as_input(crop, info) for crop in photographs(self.arguments.crops)]
        for at in range(0, len(crops), BATCH):
            yield np.stack(crops[at : at + BATCH])


def photographs(count: int) -> Iterator[Image.Image]:
    """Yield random crops of the photographs of scikit-learn, mirrored or not, of different sizes."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(count):
        source = sources[i % len(sources)]
        side = int(rng.integers(128, min(source.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in source.size)
        crop = source.crop((left, top, left + side, top + side))
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def figures(found: Sequence[Result], wanted: Sequence[Result], targets: np.ndarray | None) -> dict[str, Any]:
    """Return how two precisions agree."""
    ours, theirs = (np.concatenate([result.logits for result in results]) for results in (found, wanted))
    best, reference = ours.argmax(1), theirs.argmax(1)
    gap = np.take_along_axis(theirs, reference[:, None], 1) - np.take_along_axis(theirs, best[:, None], 1)
    sets = [
        [[jaccard(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(f.kept, w.kept, strict=True)]
        for f, w in zip(found, wanted, strict=True)
    ]
    overlap = [float(np.mean(np.concatenate(stage))) for stage in zip(*sets, strict=True)]
    return {
        "images": len(ours),
        "top1_agreement": float((best == reference).mean()),
        "largest_gap_of_a_disagreement": float(gap.max() / np.abs(theirs).max()),
        "max_relative_error": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "median_relative_error": float(np.median(np.abs(ours - theirs).max(1)) / np.abs(theirs).max()),
        "overlap": overlap,
        "mean_overlap": float(np.mean(overlap)) if overlap else None,
        "top1": None if targets is None else float((best == targets).mean()),
        "top1_fp32": None if targets is None else float((reference == targets).mean()),
    }


def goals_of(case: dict[str, Any]) -> Iterator[Goal]:
    """Yield what fp16 is to reach."""
    name = f"{case['data']}, {case['method']}, fp16"
    yield Goal(f"{name}: top-1 agreement with fp32", exact(case["top1_agreement"]), TOP1_GOAL, unit="%")
    if case["mean_overlap"] is not None:
        yield Goal(f"{name}: kept sets overlap", exact(case["mean_overlap"]), OVERLAP_GOAL, unit="%")


def row(case: dict[str, Any]) -> dict[str, str]:
    """Return a case as a row of a table."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}"

    return {
        "data": case["data"],
        "method": case["method"],
        "precision": case["precision"],
        "images": str(case["images"]),
        "top-1 agreement (%)": percent(case["top1_agreement"]),
        "overlap of kept sets (%)": percent(case["mean_overlap"]),
        "by stage": " ".join(percent(value) for value in case["overlap"]),
        "relative error of logits, median": f"{case['median_relative_error']:.1e}",
        "top-1, fp32 (%)": f"{percent(case['top1'])}, {percent(case['top1_fp32'])}" if case["top1"] is not None else "",
    }


if __name__ == "__main__":
    main()
