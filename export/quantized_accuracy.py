"""Images to calibrate and to judge a quantized network by, and the judgement: against labels and the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.checks.compare import jaccard
from edgeprune.data import DIGITS, Dataset, folder_of, open_dataset, shown_name
from edgeprune.data.classes import match_classes
from edgeprune.data.folder import has_classes
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import PreprocessInfo, QuantizedAccuracy

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

CHUNK = 8  # images per run of the torch model
JUDGED_IMAGES = 2000
LEAST_IMAGES = 2
Images = NDArray[np.float32]
Run = Callable[[Images], Mapping[str, NDArray[Any]]]
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Attributes:
        name: what they are, without a path.
        images: [n, C, H, W].
        labels: [n] classes of the model, None when they are not known.
        held_out: they have no part in choosing anything.
    """

    name: str
    images: Images
    labels: NDArray[np.int64] | None
    held_out: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def groups(self, size: int) -> Iterator[slice]:
        """Yield the places of one group of images after the other."""
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def batches(self) -> list[Images]:
        """Return the images in groups for the torch model."""
        return [self.images[group] for group in self.groups(CHUNK)]

    def first(self, count: int) -> ImageSet:
        """Return some of the images, spread evenly."""
        count = min(count, len(self))
        at = np.arange(count) * len(self) // count
        return ImageSet(self.name, self.images[at], None if self.labels is None else self.labels[at], self.held_out)


def open_images(
    spec: str, preprocessing: PreprocessInfo, count: int, *, classes: int, labels: Sequence[str] | None
) -> tuple[ImageSet, ImageSet]:
    """Return images to calibrate by and others to judge by.

    A directory without `train` and `val` gives every second image to each side.

    Args:
        spec: "digits" or "imagefolder:PATH".
        preprocessing: of the images.
        count: most images to calibrate by.
        classes: of the model.
        labels: their names, if known.

    Raises:
        InputError: `calibration` for less than two images or images of a single class; those of opening the data.
    """
    alone = spec != DIGITS and folder_of(spec, "train") == folder_of(spec, "test")
    labelled = spec == DIGITS or has_classes(folder_of(spec, "train"))
    limits = (2 * count, None) if alone else (count, JUDGED_IMAGES)
    first = open_dataset(spec, "train", limit=limits[0], labelled=labelled)
    _check(first, spec, labelled)
    name = shown_name(spec)
    seen = _load(first, name, preprocessing, classes, labels if labelled else None, labelled)
    if alone:
        return _every_second(seen, 0), _every_second(seen, 1)
    others = open_dataset(spec, "test", limit=limits[1], labelled=labelled)
    judged = _load(others, name, preprocessing, classes, labels, labelled)
    return seen, ImageSet(name, judged.images, judged.labels, held_out=True)


def _check(data: Dataset, spec: str, labelled: bool) -> None:
    if len(data) < LEAST_IMAGES:
        raise InputError(
            f"{len(data)} image is too few to calibrate with",
            code="calibration",
            expected="at least two images, better some hundred",
        )
    if labelled and len(data.labels) == 1:
        raise InputError(
            f"all images of '{spec}' are of one class, '{data.labels[0]}'",
            code="calibration",
            expected="images of every class the model tells apart, or a directory without classes",
            hint="check the path behind imagefolder:, which holds one directory per class",
        )


def _load(
    data: Dataset,
    name: str,
    preprocessing: PreprocessInfo,
    classes: int,
    names: Sequence[str] | None,
    labelled: bool,
) -> ImageSet:
    parts = list(data.batches(CHUNK, preprocessing))
    images, labels = np.concatenate([p for p, _ in parts]), np.concatenate([labels for _, labels in parts])
    mapping = None
    if labelled:
        try:
            mapping = match_classes(data.labels, names, classes)
        except InputError:  # images of other things serve as well; they just cannot be right or wrong
            mapping = None
    return ImageSet(name, images, None if mapping is None else mapping[labels])


def _every_second(images: ImageSet, first: int) -> ImageSet:
    labels = None if images.labels is None else images.labels[first::2]
    return ImageSet(images.name, images.images[first::2], labels, held_out=bool(first))


@dataclass(frozen=True)
class Reference:
    """What the float model says of some images.

    Attributes:
        best: [n] class.
        kept: per stage the original patch numbers [n, K].
    """

    images: ImageSet
    best: NDArray[np.int64]
    kept: list[NDArray[np.int64]]


def refer(model: PrunedViT, images: ImageSet, batch: int, report: Report) -> Reference:
    """Return what the float model says.

    Args:
        model: in eval mode.
        images: to run.
        batch: images that a graph runs at once, for methods whose counts are of a batch.
        report: called with (step, share done).

    Raises:
        InputError: `calibration` when an output is not finite.
    """
    import torch

    size = CHUNK if model.exact_in_batch else batch
    best, kept = [], [list[NDArray[np.int64]]() for _ in model.stages]
    for group in images.groups(size):
        with torch.inference_mode():
            found = model.run(torch.from_numpy(filled_up(images.images[group], 1 if model.exact_in_batch else batch)))
        count, logits = group.stop - group.start, found.logits.numpy()
        if not np.isfinite(logits).all():
            raise InputError(
                "the float model's outputs are not finite on the calibration images",
                code="calibration",
                expected="images and weights that belong together",
                hint="check the images, and the checkpoint with `edgeprune verify` of a float32 bundle",
            )
        best.append(logits[:count].argmax(1))
        for stage, ids in zip(kept, found.kept, strict=True):
            stage.append(ids.numpy()[:count])
        report("running the float model", group.stop / len(images))
    return Reference(images, np.concatenate(best), [np.concatenate(stage) for stage in kept])


def filled_up(images: Images, batch: int) -> Images:
    """Return images, and copies of the last one up to a batch."""
    return np.concatenate([images, np.repeat(images[-1:], max(batch - len(images), 0), 0)])


def judge(run: Run, reference: Reference, batch: int, report: Report) -> QuantizedAccuracy:
    """Return what a quantized graph gets right, beside what the float model does.

    Args:
        run: images [batch, C, H, W] -> outputs by name, `kept_indices_<s>` among them when there are stages.
        reference: the float model's answers.
        batch: of the graph; the last group is filled up.
        report: called with (step, share done).
    """
    best, overlaps, images = [], list[float](), reference.images
    for group in images.groups(batch):
        outputs = run(filled_up(images.images[group], batch))
        best.append(outputs["logits"][: group.stop - group.start].argmax(1))
        for stage, kept in enumerate(reference.kept):
            overlaps += map(jaccard, outputs[f"kept_indices_{stage}"], kept[group])
        report("judging by images", group.stop / len(images))
    found, labels = np.concatenate(best), images.labels
    return QuantizedAccuracy(
        data=images.name,
        images=len(images),
        held_out=images.held_out,
        float_top1=None if labels is None else float((reference.best == labels).mean()),
        top1=None if labels is None else float((found == labels).mean()),
        top1_agreement=float((found == reference.best).mean()),
        kept_overlap=float(np.mean(overlaps)) if overlaps else None,
    )
