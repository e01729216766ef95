"""What real images keep, how long the rest takes at several sizes, and the buckets that follow from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeprune.data import DIGITS, FOLDER_PREFIX, open_dataset
from edgeprune.errors import InputError
from edgeprune.export.buckets import (
    Asked,
    Buckets,
    FlatCurve,
    choose_buckets,
    cross_validated,
    given_buckets,
    histogram,
)
from edgeprune.export.buckets import simulate as expect
from edgeprune.pruning.base import Stage
from edgeprune.runtime.manifest import BucketInfo, CalibrationInfo, PreprocessInfo
from edgeprune.runtime.processor import processor_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.pruning.model import PrunedViT

    Counts = NDArray[np.int64]

CHUNK = 8  # images per run of the torch model
GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the slots: where the curve is measured
ROUNDS = 12
Report = Callable[[str, float], None]
Bucket = tuple[int, ...]
K = TypeVar("K")


@dataclass(frozen=True)
class Rests:
    """The network behind the first adaptive stage, at any size.

    Attributes:
        stem: runs the stem on some images.
        rest: capacities -> a call that runs the rest on what the stem gave for the same images.
    """

    stem: Callable[[], object]
    rest: Callable[[Bucket], Callable[[], object]]


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
    counts = count_tokens(model, (group for group, _ in data.batches(CHUNK, preprocessing)), len(data), report)
    grid = sorted({max(1, round(share * slots[0])) for share in GRID})
    report("measuring latency against tokens", 0.6)
    at = {n: tuple(min(n, k) for k in slots) for n in grid}
    ms = measure_in_turns({n: rests.rest(capacities) for n, capacities in at.items()})
    curve = FlatCurve.measured(list(ms.items()), blocks_per_stage(model.stages, model.config.depth), slots)
    if asked.count is None:
        choose = partial(_given, asked.sizes, slots, multiple=multiple, latency=curve)
    else:
        choose = partial(_chosen, asked.count, slots, multiple=multiple, latency=curve)
    buckets = choose(counts)
    held_out = cross_validated(counts, choose, curve)
    report("measuring the chosen buckets", 0.8)
    timed = measure_in_turns({(): rests.stem, **{b: rests.rest(b) for b in buckets}})
    stem_ms = timed.pop(())
    expected = expect(counts, buckets, Measured(timed), stem_ms)
    infos = [
        BucketInfo(capacities=list(b), graph="rest", share=share, latency_ms=timed[b])
        for b, share in zip(buckets, expected.shares, strict=True)
    ]
    info = CalibrationInfo(
        data=spec if spec == DIGITS else FOLDER_PREFIX + Path(spec.removeprefix(FOLDER_PREFIX)).name,
        images=len(counts),
        histograms=histogram(counts),
        curve=list(ms.items()),
        stem_ms=stem_ms,
        expected_ms=expected.expected_ms,
        overflow=expected.overflow,
        held_out_ms=held_out.expected_ms + stem_ms,
        held_out_overflow=held_out.overflow,
        batch=batch,
        threads=threads,
        cpu=processor_name(),
    )
    return infos, info


def _chosen(count: int, slots: Bucket, counts: Counts, *, multiple: int, latency: FlatCurve) -> Buckets:
    return choose_buckets(counts, slots, count, latency, multiple=multiple)


def _given(sizes: Sequence[int], slots: Bucket, counts: Counts, *, multiple: int, latency: FlatCurve) -> Buckets:
    return given_buckets(sizes, slots, counts=counts, multiple=multiple, latency=latency)


def count_tokens(model: PrunedViT, groups: Iterator[np.ndarray], total: int, report: Report) -> Counts:
    """Return the tokens every image wants to keep at every stage [n, S].

    Raises:
        InputError: `calibration` below two images, or when the model gives no number for one of them.
    """
    import torch

    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for group in groups:
            out = model.run(torch.from_numpy(group))
            if not bool(out.logits.isfinite().all()):
                raise InputError(
                    "the model's outputs are not finite on the calibration images",
                    code="calibration",
                    expected="images and weights that belong together",
                    hint="check the images, and the checkpoint with `edgeprune verify`",
                )
            rows.append(torch.stack(out.counts, 1).numpy())
            done = sum(map(len, rows))
            report(f"counting tokens of {total} images", 0.1 + 0.4 * done / total)
    if sum(map(len, rows)) < 2:
        raise InputError(
            f"{total} image is too few to calibrate with",
            code="calibration",
            expected="at least two images, better some hundred",
        )
    return np.concatenate(rows)


def blocks_per_stage(stages: Sequence[Stage], depth: int) -> list[int]:
    """Return how many blocks run with the tokens each stage leaves."""
    starts = [stage.block for stage in stages]
    return [end - start for start, end in zip(starts, [*starts[1:], depth], strict=True)]


def measure_in_turns(calls: Mapping[K, Callable[[], object]], rounds: int = ROUNDS) -> dict[K, float]:
    """Return the median milliseconds of each call, all taking turns; the first round does not count."""
    samples: dict[K, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if i:
                samples[name].append((perf_counter() - start) * 1000)
    return {name: float(np.median(values)) for name, values in samples.items()}
