"""What real images keep, how long the rest takes at several sizes, and the buckets that follow from both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.data import Dataset, open_dataset, shown_name
from edgeprune.errors import InputError
from edgeprune.export.buckets import (
    MARGINS,
    Asked,
    Bucket,
    Buckets,
    FlatCurve,
    choose_buckets,
    cross_validated,
    given_buckets,
    histogram,
)
from edgeprune.export.buckets import simulate as expect
from edgeprune.export.turns import measure_in_turns
from edgeprune.pruning.adaptive import with_capacities
from edgeprune.pruning.base import Stage
from edgeprune.runtime.manifest import BucketInfo, CalibrationInfo, PreprocessInfo
from edgeprune.runtime.processor import processor_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.pruning.model import PrunedViT

    Counts = NDArray[np.int64]

CHUNK = 8  # images per run of the torch model
GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the slots: where the curve is measured
FIT_IMAGES = 64  # with filled slots every bucket is tried out, on so many images in all
FILL_MARGIN = 1.1
Report = Callable[[str, float], None]
STEM: Bucket = ()
DENSE: Bucket = (0,)


@dataclass(frozen=True)
class Rests:
    """The network behind the first adaptive stage, at any size.

    Attributes:
        stem: runs the stem on some images.
        rest: capacities -> a call that runs the rest on what the stem gave for the same images.
        dense: runs the dense graph on `dense_images` images.
    """

    stem: Callable[[], object]
    rest: Callable[[Bucket], Callable[[], object]]
    dense: Callable[[], object]
    dense_images: int


@dataclass(frozen=True)
class Measured:
    """Latencies by exact capacities, as measured; a `LatencyModel`."""

    ms: Mapping[Bucket, float]

    def latency(self, capacities: Bucket) -> float:
        """Return the milliseconds of one run with these capacities."""
        return self.ms[capacities]


def calibrate(
    model: PrunedViT,
    asked: Asked,
    spec: str,
    rests: Rests,
    preprocessing: PreprocessInfo,
    *,
    fill: bool,
    images: int,
    multiple: int,
    batch: int,
    threads: int,
    report: Report,
) -> tuple[list[BucketInfo], CalibrationInfo]:
    """Choose buckets for real images; the graphs they name are filled in by the caller.

    Args:
        model: the method, in eval mode; all stages adaptive.
        asked: how many buckets, or which.
        spec: "digits" (its training images) or "imagefolder:PATH" (its `train` directory if there is one).
        rests: runs stem and rest.
        preprocessing: of the images.
        fill: slots an image does not need hold its next best tokens, which later stages count too.
        images: at most so many.
        multiple: capacities are rounded up to it.
        batch: of the measured runs, for the record.
        threads: of the measured runs, for the record.
        report: called with (step, share done).

    Raises:
        InputError: `calibration` below two images; `buckets`; those of opening the data.
    """
    slots = tuple(stage.counts.kept for stage in model.stages)
    data = open_dataset(spec, "train", limit=images, labelled=False)
    counts, first_images = count_tokens(model, data, preprocessing, report)
    report("measuring latency against tokens", 0.6)
    at = {n: tuple(min(n, k) for k in slots) for n in sorted({max(1, round(share * slots[0])) for share in GRID})}
    ms = measure_in_turns({n: rests.rest(capacities) for n, capacities in at.items()})
    curve = FlatCurve.measured(list(ms.items()), blocks_per_stage(model.stages, model.config.depth), slots)
    choose = partial(_choose, asked, slots, curve, multiple)
    # which margin holds for other images only other images can tell
    held_out = {margin: cross_validated(counts, partial(choose, margin), curve) for margin in MARGINS}
    margin = min(MARGINS, key=lambda m: held_out[m].expected_ms)
    buckets = choose(margin, counts)
    report("measuring the chosen buckets", 0.8)
    if fill:
        buckets = fit_filled(model, buckets, counts, first_images, multiple)
    timed = measure_in_turns({STEM: rests.stem, DENSE: rests.dense, **{b: rests.rest(b) for b in buckets}})
    stem_ms, dense_ms = timed.pop(STEM), timed.pop(DENSE) * batch / rests.dense_images
    if fill:
        counts = count_filled(model, buckets, counts, first_images)
    expected = expect(counts, buckets, Measured(timed), stem_ms)
    infos = [
        BucketInfo(capacities=list(b), graph="rest", share=share, latency_ms=timed[b])
        for b, share in zip(buckets, expected.shares, strict=True)
    ]
    info = CalibrationInfo(
        data=shown_name(spec),
        images=len(counts),
        histograms=histogram(counts),
        curve=list(ms.items()),
        stem_ms=stem_ms,
        dense_ms=dense_ms,
        expected_ms=expected.expected_ms,
        overflow=expected.overflow,
        held_out_overflow=None if fill else held_out[margin].overflow,
        batch=batch,
        threads=threads,
        cpu=processor_name(),
    )
    return infos, info


def _choose(asked: Asked, slots: Bucket, curve: FlatCurve, multiple: int, margin: float, counts: Counts) -> Buckets:
    if asked.count is None:
        return given_buckets(asked.sizes, slots, counts=counts, multiple=multiple, latency=curve, margins=(margin,))
    return choose_buckets(counts, slots, asked.count, curve, multiple=multiple, margins=(margin,))


def fit_filled(model: PrunedViT, buckets: Buckets, counts: Counts, images: np.ndarray, multiple: int) -> Buckets:
    """Return the buckets with later capacities that suit filled slots: the tokens they add move later counts.

    Stage by stage, the most that some of a bucket's images want once the slots before are filled, and a margin.

    Args:
        model: the method.
        buckets: as chosen for masked slots.
        counts: tokens that each image keeps at each stage [n, S].
        images: the first of them.
        multiple: capacities are rounded up to it.
    """
    fitted: list[list[int]] = []
    for bucket, own in zip(buckets[:-1], of_buckets(buckets, counts[: len(images)]), strict=False):
        sizes = list(bucket)
        for stage in range(1, len(sizes)):
            sizes[stage:] = [min(sizes[stage - 1], k) for k in buckets[-1][stage:]]
            if len(own):
                most = int(FILL_MARGIN * filled_counts(model, tuple(sizes), images[own])[:, stage].max()) + 1
                sizes[stage] = min(sizes[stage], -(-most // multiple) * multiple)
            if fitted:
                sizes[stage] = max(sizes[stage], fitted[-1][stage])
        fitted.append(sizes)
    return (*dict.fromkeys(tuple(sizes) for sizes in fitted if tuple(sizes) != buckets[-1]), buckets[-1])


def count_filled(model: PrunedViT, buckets: Buckets, counts: Counts, images: np.ndarray) -> Counts:
    """Return what images want at each stage of the bucket they start in, [n, S], falling from stage to stage."""
    found = counts[: len(images)].copy()
    for bucket, own in zip(buckets, of_buckets(buckets, found), strict=True):
        if len(own):
            found[own] = filled_counts(model, bucket, images[own])
    return np.minimum.accumulate(found, axis=1)


def of_buckets(buckets: Buckets, counts: Counts) -> list[NDArray[np.intp]]:
    """Return for each bucket the images that start in it."""
    starts = np.searchsorted([bucket[0] for bucket in buckets], np.minimum(counts[:, 0], buckets[-1][0]))
    return [np.flatnonzero(starts == number) for number in range(len(buckets))]


def filled_counts(model: PrunedViT, capacities: Bucket, images: np.ndarray) -> Counts:
    """Return what images want at each stage [n, S] when every slot before it is filled."""
    import torch

    filled = model.with_stages(with_capacities(model.stages, capacities, fill=True))
    with torch.inference_mode():
        groups = torch.from_numpy(images).split(CHUNK)
        return np.concatenate([torch.stack(filled.run(group).counts, 1).numpy() for group in groups])


def count_tokens(
    model: PrunedViT, data: Dataset, preprocessing: PreprocessInfo, report: Report
) -> tuple[Counts, np.ndarray]:
    """Return the tokens every image wants to keep at every stage [n, S], and the first `FIT_IMAGES` images.

    Raises:
        InputError: `calibration` below two images, or when the model gives no number for one of them.
    """
    import torch

    rows: list[np.ndarray] = []
    first: list[np.ndarray] = []
    with torch.inference_mode():
        for group, _ in data.batches(CHUNK, preprocessing):
            out = model.run(torch.from_numpy(group))
            if not bool(out.logits.isfinite().all()):
                raise InputError(
                    "the model's outputs are not finite on the calibration images",
                    code="calibration",
                    expected="images and weights that belong together",
                    hint="check the images, and the checkpoint with `edgeprune verify`",
                )
            rows.append(torch.stack(out.counts, 1).numpy())
            if len(first) < FIT_IMAGES // CHUNK:
                first.append(group)
            report(f"counting tokens of {len(data)} images", 0.1 + 0.4 * sum(map(len, rows)) / len(data))
    if sum(map(len, rows)) < 2:
        raise InputError(
            f"{len(data)} image is too few to calibrate with",
            code="calibration",
            expected="at least two images, better some hundred",
        )
    return np.concatenate(rows), np.concatenate(first)


def blocks_per_stage(stages: Sequence[Stage], depth: int) -> list[int]:
    """Return how many blocks run with the tokens each stage leaves."""
    starts = [stage.block for stage in stages]
    return [end - start for start, end in zip(starts, [*starts[1:], depth], strict=True)]
