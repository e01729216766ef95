"""What it costs to follow the image: adaptive forms against static graphs that keep exactly as many tokens.

Runners, each one pass over the same images, batch 1 unless said:
  dense               every token kept
  masked              one static graph with a slot for every token, those an image does not keep masked ("slots")
  static, own counts  for each image a graph built for exactly its counts: what nobody can ship, and the floor
  computed            one graph whose shapes follow the image
  ragged              (batches) one graph, the rows of all images one behind the other
  buckets             stem, router, one of four rests; free slots masked
  buckets, next-best  the same, free slots hold the next best tokens
  static, bucket      for each image the whole network as a static graph of its bucket's size, nothing masked

DeiT-S with random weights whose attention is sharpened (queries and keys scaled up), so that counts differ from image
to image; images are drawn at random with different contrasts, some to calibrate with and others to measure.

    python benchmarks/adaptive.py [--model NAME] [--images 8] [--rounds 24] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from _common import (
    Goal,
    Group,
    Images,
    add_output_options,
    exact,
    markdown_table,
    measure_group,
    measure_plan,
    pinned,
    print_group,
    relative_error,
    say,
    write_result,
)
from _sharpened import write_sharpened
from PIL import Image

from edgeprune.bench.measure import Runner
from edgeprune.checks.compare import draw_images
from edgeprune.data.preprocess import as_input
from edgeprune.export import ExportRequest, export_model
from edgeprune.export.api import load_reference
from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.graphs import make_plan
from edgeprune.export.pipeline import lower
from edgeprune.export.request import resolve
from edgeprune.export.writer import WeightStore
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.adaptive import with_capacities
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.router import IMAGES, Trace
from edgeprune.runtime.session import Session

METHODS: dict[str, dict[str, str]] = {"sait": {"mass": "0.9"}, "asvit": {}, "ats": {}}
CONTRASTS = (0.25, 0.5, 1.0)
TOLERANCE = 1e-4
DENSITIES = (1.0, 0.7, 0.5, 0.3)
SWITCHES = 200
COMPUTED_GOAL, BUCKET_GOAL, MEMORY_GOAL, SWITCH_GOAL_MS = 1.01, 1.03, 1.3, 1.0

DENSE, MASKED, OWN, COMPUTED = "dense", "masked", "static, own counts", "computed"
RAGGED = "ragged"
BUCKETS, FILLED, STATIC = "buckets", "buckets, next-best", "static, bucket"

MEMORY_SCRIPT = """
import json, sys
import numpy as np
from edgeprune.runtime.session import Session
def pss():
    rows = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return {name: int(rows[name].split()[0]) / 1024 for name in ("Pss", "Rss")}
images = np.zeros((1, *json.loads(sys.argv[2])), np.float32)
before = pss()
session = Session(sys.argv[1], threads=1, check_hashes=False)
session.warmup()
after = pss()
print(json.dumps({name: after[name] - before[name] for name in before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a name that `edgeprune models` lists")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    parser.add_argument("--images", type=int, default=8, help="images of a pass (default: 8)")
    parser.add_argument("--calibration-images", type=int, default=192, help="(default: 192)")
    parser.add_argument("--sharpness", type=float, default=3.0, help="factor of the attention's logits (default: 3)")
    parser.add_argument("--rounds", type=int, default=24, help="rounds per group; two make a block (default: 24)")
    add_output_options(parser)
    arguments = parser.parse_args()
    goals: list[Goal] = []
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as directory:
        for method in arguments.methods:
            case = Case(arguments, method, METHODS[method], Path(directory) / method)
            with pinned(1):
                groups = [case.single(), case.mixed_batch()]
            cases += [{**group.to_dict(), "case": case.describe()} for group in groups]
            goals += case.goals(groups[0])
        memory = measure_memory(arguments.model, Path(directory))
        switches = measure_switches(arguments.model, Path(directory))
    goals += memory.pop("goals") + switches.pop("goals")
    cases += [{"name": "memory", **memory}, {"name": "density switch", **switches}]
    write_result("adaptive", arguments, goals, cases)


class Case:
    """One method: its bundles in every form, and static graphs for every image."""

    def __init__(self, arguments: argparse.Namespace, method: str, options: dict[str, str], folder: Path) -> None:
        self.arguments, self.method, self.folder = arguments, method, folder
        folder.mkdir()
        self.request = ExportRequest(
            model=arguments.model, method=method, method_options=options, random_weights=True, verify=False
        )
        self.resolved = resolve(self.request)
        self.model, _, _ = load_reference(self.resolved)
        self.checkpoint = folder / "sharpened.safetensors"
        write_sharpened(self.model, arguments.sharpness, self.checkpoint)
        self.calibration = folder / "images"
        self.calibration.mkdir()
        self._draw(arguments.calibration_images, seed=1, folder=self.calibration)
        self.forms: dict[str, Bundle] = {
            MASKED: self._export("masked", adaptive="slots"),
            COMPUTED: self._export("computed", adaptive="computed"),
            BUCKETS: self._export("buckets", **self._calibrated()),
            FILLED: self._export("filled", fill="next-best", **self._calibrated()),
        }
        info = self.forms[MASKED].manifest.preprocessing
        self.images = np.stack([as_input(image, info) for image in self._draw(arguments.images, seed=2)])
        with torch.inference_mode():
            self.reference = self.model.run(torch.from_numpy(self.images))
        self.counts = torch.stack(self.reference.counts, 1).numpy()
        say(f"{method}: tokens kept by the first stage {self.counts[:, 0].tolist()}")

    def single(self) -> Group:
        """Measure every form image by image, and check that those that must agree do."""
        sessions = {name: session(bundle) for name, bundle in self.forms.items()}
        where = np.array([int(sessions[BUCKETS].run(image[None]).bucket[0]) for image in self.images])
        adaptive = self.forms[BUCKETS].manifest.adaptive
        assert adaptive is not None
        self.where = where
        sizes = [tuple(adaptive.buckets[b].capacities) for b in where]
        own = [self._static(tuple(np.maximum(c, 1).tolist())) for c in self.counts]
        fitted = {size: self._static(size) for size in sorted(set(sizes))}
        self._check(own, sessions)
        graphs = {DENSE: session(self.forms[MASKED], graph="dense"), **sessions}
        runners: dict[str, Runner] = {name: partial(self._pass, found.run) for name, found in graphs.items()}
        runners[OWN] = lambda: [graph.run({IMAGES: image[None]}) for graph, image in zip(own, self.images, strict=True)]
        runners[STATIC] = lambda: [
            fitted[size].run({IMAGES: image[None]}) for size, image in zip(sizes, self.images, strict=True)
        ]
        group = measure_group(f"{self.method}, {len(self.images)} images one by one", runners, batch=1, threads=1,
                              plan=measure_plan(self.arguments))  # fmt: skip
        for top, bottom in (
            (COMPUTED, OWN), (BUCKETS, OWN), (BUCKETS, STATIC), (FILLED, STATIC), (MASKED, COMPUTED), (MASKED, BUCKETS),
            (DENSE, COMPUTED), (DENSE, BUCKETS), (DENSE, OWN),
        ):  # fmt: skip
            group.values[f"{top} / {bottom}"] = group.ratio(top, bottom)
        group.values["masked / computed by MACs"] = exact(self._saved())
        group.values["router overhead, share of a run"] = self._overhead(sessions[BUCKETS])
        group.values["images that ran again"] = exact(self._again(sessions[BUCKETS]))
        print_group(group, DENSE)
        return group

    def mixed_batch(self) -> Group:
        """Measure the same images as one batch, which the adaptive forms take apart."""
        batch = (len(self.images), len(self.images))
        forms = {
            MASKED: self._export("masked-batch", adaptive="slots", batch=batch),
            COMPUTED: self._export("computed-batch", adaptive="computed", batch=batch),
            RAGGED: self._export("ragged-batch", adaptive="ragged", batch=batch),
            BUCKETS: self._export("buckets-batch", batch=batch, **self._calibrated()),
        }
        graphs = {DENSE: session(forms[MASKED], graph="dense"), **{name: session(b) for name, b in forms.items()}}
        runners: dict[str, Runner] = {name: partial(found.run, self.images) for name, found in graphs.items()}
        group = measure_group(f"{self.method}, a mixed batch", runners, batch=len(self.images), threads=1,
                              plan=measure_plan(self.arguments))  # fmt: skip
        for top, bottom in (
            (MASKED, COMPUTED),
            (MASKED, RAGGED),
            (RAGGED, COMPUTED),
            (MASKED, BUCKETS),
            (DENSE, COMPUTED),
        ):
            group.values[f"{top} / {bottom}"] = group.ratio(top, bottom)
        print_group(group, DENSE)
        return group

    def goals(self, group: Group) -> list[Goal]:
        """Return what the issue of this benchmark asks for."""
        values = group.values
        return [
            Goal(f"{self.method}: computed / static, own counts", values[f"{COMPUTED} / {OWN}"], COMPUTED_GOAL, False),
            Goal(f"{self.method}: buckets / static, bucket", values[f"{BUCKETS} / {STATIC}"], BUCKET_GOAL, False),
            Goal(f"{self.method}: masked / computed", values[f"{MASKED} / {COMPUTED}"], 1.0),
        ]

    def describe(self) -> dict[str, Any]:
        """Return what was measured."""
        adaptive = self.forms[BUCKETS].manifest.adaptive
        assert adaptive is not None
        return {
            "method": self.method,
            "counts": self.counts.tolist(),
            "buckets": [bucket.model_dump() for bucket in adaptive.buckets],
            "bucket_of_image": self.where.tolist(),
            "dense_tokens": self.resolved.config.num_patches,
        }

    def _pass(self, run: Callable[[Images], object]) -> None:
        for image in self.images:
            run(image[None])

    def _check(self, own: list[OrtBackend], sessions: dict[str, Session]) -> None:
        """Stop unless every exact form gives the torch result of the image."""
        wanted = self.reference.logits.numpy()
        for i, image in enumerate(self.images):
            found = {name: sessions[name].run(image[None]).logits for name in (MASKED, COMPUTED, BUCKETS)}
            found[OWN] = own[i].run({IMAGES: image[None]})["logits"]
            for name, logits in found.items():
                error = relative_error(logits, wanted[i : i + 1])
                if not error <= TOLERANCE:
                    raise SystemExit(f"{self.method}, image {i}: {name} differs from PyTorch by {error:.1e}")

    def _saved(self) -> float:
        """Return how many times the multiply-accumulates the masked graph executes, over the images' own counts."""
        stages = self.resolved.stages
        full = tuple(stage.counts.kept for stage in stages)
        own = [make_plan(self.resolved, with_capacities(stages, np.maximum(c, 1).tolist())).macs() for c in self.counts]
        return make_plan(self.resolved, with_capacities(stages, full)).macs() / float(np.mean(own))

    def _again(self, routed: Session) -> float:
        """Return the share of images that run in more than one bucket."""
        again = 0
        for image in self.images:
            trace = Trace()
            routed.run(image[None], trace=trace)
            again += len(trace.runs) > 1
        return again / len(self.images)

    def _overhead(self, routed: Session) -> Any:
        """Return the share of a run that is neither stem nor rest, the median over runs."""
        shares = []
        for _ in range(5):
            for image in self.images:
                trace, start = Trace(), perf_counter()
                routed.run(image[None], trace=trace)
                total = perf_counter() - start
                shares.append((total - trace.stem_s - trace.rest_s) / total)
        return exact(float(np.median(shares)))

    def _calibrated(self) -> dict[str, Any]:
        return {"buckets": "auto:4", "calibration": f"imagefolder:{self.calibration}"}

    def _export(self, name: str, **fields: Any) -> Bundle:
        say(f"exporting {self.method}, {name}")
        request = replace(self.request, random_weights=False, checkpoint=str(self.checkpoint), **fields)
        return export_model(request, self.folder / name)

    def _static(self, capacities: tuple[int, ...]) -> OrtBackend:
        """Return the whole network as a static graph that keeps exactly so many tokens at each stage."""
        folder = self.folder / "-".join(map(str, capacities))
        path = folder / "static.onnx"
        if not folder.exists():
            folder.mkdir()
            plan = make_plan(self.resolved, with_capacities(self.resolved.stages, capacities, fill=True))
            with WeightStore(folder / "static.onnx.data") as store:
                lower(plan, weight_arrays(self.model), self.resolved.target, [path], store, opset=self.resolved.opset)
        return OrtBackend(path, threads=1, spinning=False)

    def _draw(self, count: int, *, seed: int, folder: Path | None = None) -> list[Image.Image]:
        """Return random images of several contrasts, and write them where asked to."""
        rng = np.random.default_rng(seed)
        drawn = draw_images((3, *self.resolved.config.image_size), count, rng)
        made = []
        for i, pixels in enumerate(drawn):
            contrast = CONTRASTS[i % len(CONTRASTS)]
            grey = np.clip(127.5 + 64 * contrast * pixels, 0, 255).astype(np.uint8)
            made.append(Image.fromarray(grey.transpose(1, 2, 0)))
            if folder is not None:
                made[-1].save(folder / f"{i:03d}.png")
        return made


def session(bundle: Bundle, **options: Any) -> Session:
    """Return a session on one thread that does not spin."""
    return Session(bundle, threads=1, spinning=False, check_hashes=False, **options)


def measure_memory(model: str, directory: Path) -> dict[str, Any]:
    """Return how much memory opening a bundle and running all of it takes, each in a process of its own, MiB."""
    common: dict[str, Any] = {"model": model, "random_weights": True, "verify": False}
    adaptive = {**common, "method": "sait", "method_options": {"mass": "0.9"}}
    quarter = get_model_config(model).num_patches // 4
    sizes = f"{quarter},{2 * quarter},{3 * quarter},{4 * quarter}"
    requests = {
        "ort-cpu, computed": ExportRequest(**adaptive),
        "ort-cpu, four buckets": ExportRequest(**adaptive, buckets=sizes),
        "onnx, masked": ExportRequest(**adaptive, target="onnx"),
        "onnx, four buckets": ExportRequest(**adaptive, target="onnx", buckets=sizes),
        "ort-cpu, one density": ExportRequest(**common, method="evit", keep_rate=0.7),
        "ort-cpu, four densities": ExportRequest(**common, method="evit", densities=DENSITIES),
        "onnx, four densities": ExportRequest(**common, method="evit", target="onnx", densities=DENSITIES),
    }
    found = {}
    for name, request in requests.items():
        bundle = export_model(request, directory / "memory" / name.replace(", ", "-").replace(" ", "-"))
        sides = json.dumps([3, *bundle.manifest.preprocessing.image_size])
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(bundle.path), sides]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("\n### Memory of an open bundle (MiB)\n")
    rows = [{"bundle": name, **{k: f"{v:.0f}" for k, v in value.items()}} for name, value in found.items()]
    print(markdown_table(rows))
    goals = [
        Goal(f"{target}: memory (Pss) of four buckets / one graph", exact(found[many]["Pss"] / found[one]["Pss"]),
             MEMORY_GOAL, False)
        for target, many, one in (
            ("ort-cpu", "ort-cpu, four buckets", "ort-cpu, computed"),
            ("onnx", "onnx, four buckets", "onnx, masked"),
        )
    ]  # fmt: skip
    return {"mib": found, "goals": goals}


def measure_switches(model: str, directory: Path) -> dict[str, Any]:
    """Return what switching the density takes, milliseconds."""
    request = ExportRequest(model=model, method="evit", densities=DENSITIES, random_weights=True, verify=False)
    opened = session(export_model(request, directory / "switch"))
    times = []
    for i in range(SWITCHES):
        start = perf_counter()
        opened.density = DENSITIES[i % len(DENSITIES)]
        times.append((perf_counter() - start) * 1000)
    worst = float(np.max(times))
    print(f"\nswitching the density: median {np.median(times) * 1000:.1f} us, worst {worst * 1000:.1f} us")
    goal = Goal("switching the density, worst of 200", exact(worst), SWITCH_GOAL_MS, False, "ms")
    return {"switch_ms": times, "goals": [goal]}


if __name__ == "__main__":
    main()
