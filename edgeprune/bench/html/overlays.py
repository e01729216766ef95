"""Kept tokens over images: what a bundle keeps at every stage and density, as cells for a drawing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from edgeprune.checks.parity import open_for_checks
from edgeprune.data import open_dataset
from edgeprune.data.classes import match_classes
from edgeprune.data.preprocess import load_image, preprocess
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Manifest, PreprocessInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.runtime.session import Result

MOST_IMAGES = 12
MOST_SIDE = 256  # pixels of an image in the report
PNG_SIDE = 96  # images up to this size are kept exactly
QUALITY = 84

PLACES = {"pre_block": "in front of"}

Progress = Callable[[str, float], None]


class Truth(NamedTuple):
    """The right class: its place in the class names of the data."""

    labels: Sequence[str]
    place: int


@dataclass(frozen=True)
class Drop:
    """What one stage drops of one image.

    Attributes:
        path: SVG path of the dropped patches, a patch is 1 x 1.
        kept: patches that are left.
    """

    path: str
    kept: int


@dataclass(frozen=True)
class Keep:
    """One image at one density.

    Attributes:
        stages: in order; a stage drops what the ones before it left.
        told: class and probability, as the graph says it.
        right: whether it is the right class, None where that is not known.
        overflow: the image wanted more tokens than there are slots.
    """

    stages: list[Drop]
    told: str
    right: bool | None
    overflow: bool


@dataclass(frozen=True)
class Picture:
    """One image: its name, a data URI, and what is kept at each density."""

    name: str
    source: str
    pixelated: bool
    keeps: list[Keep]


@dataclass(frozen=True)
class Overlays:
    """The kept tokens of a bundle.

    Attributes:
        title: model and method.
        rows, columns: of the grid of patches.
        densities: keep rates.
        first: place of the density that is shown first, the first that drops anything.
        stages: place of every stage; of the density with the most.
        emulated: why the graphs did not run on what they were made for, None when they did.
        random_weights: what is kept means nothing.
    """

    title: str
    rows: int
    columns: int
    densities: list[str]
    stages: list[str]
    pictures: list[Picture]
    emulated: str | None
    random_weights: bool
    first: int = 0


def draw_overlays(
    bundle: Bundle,
    images: Sequence[Path] = (),
    *,
    data: str | None = None,
    count: int = 6,
    progress: Progress | None = None,
) -> Overlays:
    """Run a bundle on images at each of its densities and take down what every stage keeps.

    Args:
        bundle: exported with token outputs.
        images: files.
        data: "digits" or "imagefolder:PATH", beside the files.
        count: images of the data.
        progress: called with (step, share done).

    Raises:
        InputError: `token-outputs` for a bundle that does not tell what it keeps, `report-images` for none or too
            many images, `data-classes` when the classes of data and model do not match; those of opening the data and
            of reading the files.
        EnvironmentLackError: as of `open_for_checks`.
    """
    manifest = bundle.manifest
    _check_bundle(manifest)
    chosen = list(_images(manifest.preprocessing, images, data, count))
    if not 1 <= len(chosen) <= MOST_IMAGES:
        raise InputError(
            f"{len(chosen)} images to draw kept tokens on",
            code="report-images",
            expected=f"1 to {MOST_IMAGES}, so that the report stays small",
        )
    rates: list[float | None] = [d.keep_rate for d in manifest.densities] or [None]
    grid = _grid(manifest)
    keeps: list[list[Keep]] = [[] for _ in chosen]
    emulated: str | None = None
    for i, rate in enumerate(rates):
        session, emulated = open_for_checks(bundle, graph="model", density=rate)
        for j, (_, image, truth) in enumerate(chosen):
            if progress is not None:
                progress("drawing what is kept", (i * len(chosen) + j) / (len(rates) * len(chosen)))
            result = session.run(np.repeat(image[None], manifest.batch[0], 0))
            keeps[j].append(_keep(result, truth, session.labels, grid))
    stages = max((d.stages for d in manifest.densities), key=len, default=manifest.method.stages)
    return Overlays(
        title=f"{manifest.model.name}, {manifest.method.name}",
        rows=grid[0],
        columns=grid[1],
        densities=[f"{rate:g}" for rate in rates if rate is not None] or [f"{manifest.method.keep_rate:g}"],
        stages=[f"{PLACES.get(stage.where, 'inside')} block {stage.block}" for stage in stages],
        pictures=[_picture(name, image, manifest, k) for (name, image, _), k in zip(chosen, keeps, strict=True)],
        emulated=emulated,
        random_weights=manifest.weights.source == "random",
        first=next((i for i, d in enumerate(manifest.densities) if d.stages), 0),
    )


def _check_bundle(manifest: Manifest) -> None:
    buckets = [] if manifest.adaptive is None else manifest.adaptive.buckets
    graph = manifest.graphs.get(buckets[0].graph if buckets else "model")
    if graph is not None and not any(t.name.startswith("kept_indices") for t in graph.outputs):
        raise InputError(
            f"the bundle of {manifest.model.name} does not say which patches it keeps, so there is nothing to draw",
            code="token-outputs",
            expected="a pruned bundle exported with --token-outputs",
            hint="export again with --token-outputs, or leave out the images",
        )


def _grid(manifest: Manifest) -> tuple[int, int]:
    config = manifest.model.config or {}
    if "image_size" not in config or "patch_size" not in config:
        raise InputError(
            f"the bundle of '{manifest.model.name}' was traced and does not record its patches",
            code="token-outputs",
            expected="a bundle of a model that `edgeprune models` lists",
        )
    rows, columns = (side // patch for side, patch in zip(config["image_size"], config["patch_size"], strict=True))
    return rows, columns


def _images(
    info: PreprocessInfo, files: Sequence[Path], data: str | None, count: int
) -> Iterator[tuple[str, NDArray[np.float32], Truth | None]]:
    """Yield (name, normalised image [3, H, W], right class where it is known)."""
    for file in files:
        yield file.name, preprocess(load_image(file), info), None
    if data is not None:
        dataset = open_dataset(data, limit=count)
        for batch, labels in dataset.batches(count, info):
            for image, index in zip(batch, labels.tolist(), strict=True):
                yield f"{data.partition(':')[0]} “{dataset.labels[index]}”", image, Truth(dataset.labels, index)


def _keep(result: Result, truth: Truth | None, labels: list[str] | None, grid: tuple[int, int]) -> Keep:
    logits = result.logits[0].astype(np.float64)
    weights = np.exp(logits - logits.max())
    best = int(logits.argmax())
    name = labels[best] if labels and best < len(labels) else str(best)
    right = None if truth is None else best == int(match_classes(truth.labels, labels, len(logits))[truth.place])
    alive = np.ones(grid[0] * grid[1], bool)
    stages = []
    for stage in result.kept:
        patches = stage[0][stage[0] >= 0]
        stays = np.zeros_like(alive)
        stays[patches] = True
        gone = alive & ~stays
        alive &= stays
        stages.append(Drop(cells_path(gone.reshape(grid)), int(alive.sum())))
    overflow = result.overflow is not None and bool(result.overflow[0])
    return Keep(stages, f"{name} ({100 * weights[best] / weights.sum():.1f} %)", right, overflow)


def cells_path(cells: NDArray[np.bool_]) -> str:
    """Return an SVG path of the cells that are set, runs of a row joined; a cell is 1 x 1."""
    parts = []
    for y, row in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        parts += [f"M{a} {y}h{b - a}v1h{a - b}z" for a, b in edges.reshape(-1, 2).tolist()]
    return "".join(parts)


def _picture(name: str, image: NDArray[Any], manifest: Manifest, keeps: list[Keep]) -> Picture:
    """Return what the model saw as a data URI, with what was kept of it."""
    info = manifest.preprocessing
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (info.mean, info.std))
    pixels = ((image * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    shown = Image.fromarray(pixels)
    small = max(shown.size) <= PNG_SIDE
    if max(shown.size) > MOST_SIDE:
        shown.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": QUALITY}))
    kind = "png" if small else "jpeg"
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small, keeps)
