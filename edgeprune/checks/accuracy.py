"""Top-1 and top-5 of a graph on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.data import Dataset
from edgeprune.data.classes import match_classes
from edgeprune.runtime.session import Session

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] over `images`; `top5` is None when there are no more than five classes.

    Attributes:
        kept: mean tokens kept per stage, None when the graph does not tell; an image that overflows counts with what
            it wanted.
        overflow: images that wanted more tokens than the graph has slots.
        mean_macs: multiply-accumulates of an image at its own counts, the mean over images; None when nobody asked or
            the graph does not tell the counts.
    """

    top1: float
    top5: float | None
    images: int
    kept: list[float] | None = None
    overflow: int = 0
    mean_macs: float | None = None


def evaluate(
    session: Session,
    dataset: Dataset,
    *,
    report: Report | None = None,
    macs: Callable[[tuple[int, ...]], float] | None = None,
) -> Accuracy:
    """Return the accuracy of a session on a dataset.

    Args:
        session: runs the graph; batches are as large as it allows.
        dataset: labelled images, see `edgeprune.data`.
        report: called with (step, share done).
        macs: multiply-accumulates of an image by the tokens it keeps per stage; the mean over images is reported.

    Raises:
        InputError: `data-classes` when the classes of data and model cannot be matched.
    """
    low, high = session.manifest.batch
    seen = top1 = top5 = classes = overflow = 0
    kept: NDArray[np.int64] | None = None
    cost = 0.0
    macs_of = None if macs is None else cache(macs)
    mapping: NDArray[np.int64] | None = None
    for images, labels in dataset.batches(high, session.manifest.preprocessing):
        padded = np.concatenate([images, np.repeat(images[-1:], max(low - len(images), 0), 0)])
        result = session.run(padded)
        logits = result.logits[: len(images)]
        if result.kept_counts is not None:
            counts = result.kept_counts[: len(images)]
            kept = counts.sum(0, dtype=np.int64) + (0 if kept is None else kept)
            cost += 0 if macs_of is None else sum(macs_of(tuple(image)) for image in counts.tolist())
        overflow += 0 if result.overflow is None else int(result.overflow[: len(images)].sum())
        if mapping is None:
            classes = logits.shape[1]
            mapping = match_classes(dataset.labels, session.labels, classes)
        ranks = rank_of(logits, mapping[labels])
        top1, top5, seen = top1 + int((ranks < 1).sum()), top5 + int((ranks < 5).sum()), seen + len(images)
        if report is not None:
            report("evaluating", seen / len(dataset))
    means = None if kept is None else [round(float(total) / seen, 2) for total in kept]
    mean_macs = None if macs is None or kept is None else cost / seen
    return Accuracy(top1 / seen, top5 / seen if classes > 5 else None, seen, means, overflow, mean_macs)


def rank_of(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return how many classes stand before the right one, [B]; equal logits and NaN count as before it."""
    right = np.take_along_axis(logits, labels[:, None], axis=1)
    before = ~(logits < right)
    return before.sum(1) - ~np.isnan(right[:, 0])  # the right class itself is no competitor
