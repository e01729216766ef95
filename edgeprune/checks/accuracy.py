"""Top-1 and top-5 of a graph on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.runtime.session import Session

Report = Callable[[str, float], None]


class Dataset(Protocol):
    """Labelled images, see `edgeprune.data`."""

    @property
    def labels(self) -> Sequence[str] | None:
        """Class names by index."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, preprocessing: PreprocessInfo
    ) -> Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yield images [B, 3, H, W] normalised and class indices [B]."""


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] over `images`; `top5` is None when there are no more than five classes."""

    top1: float
    top5: float | None
    images: int


def evaluate(session: Session, dataset: Dataset, *, limit: int | None = None, report: Report | None = None) -> Accuracy:
    """Return the accuracy of a session on a dataset.

    Args:
        session: runs the graph; batches are as large as it allows.
        dataset: brings its own order.
        limit: stop after this many images; None takes all.
        report: called with (step, share done).

    Raises:
        InputError: `data-classes` when the classes of data and model cannot be matched; `data-empty`.
    """
    low, high = session.manifest.batch
    total = min(len(dataset), limit or len(dataset))
    if total == 0:
        raise InputError("there is no image to evaluate on", code="data-empty", expected="at least one image")
    groups = _limited(dataset.batches(high, session.manifest.preprocessing), total)
    seen = top1 = top5 = classes = 0
    mapping: NDArray[np.int64] | None = None
    for images, labels in groups:
        padded = np.concatenate([images, np.repeat(images[-1:], max(low - len(images), 0), 0)])
        logits = session.run(padded).logits[: len(images)]
        if mapping is None:
            classes = logits.shape[1]
            mapping = match_classes(dataset.labels, session.labels, classes)
        ranks = rank_of(logits, mapping[labels])
        top1, top5, seen = top1 + int((ranks < 1).sum()), top5 + int((ranks < 5).sum()), seen + len(images)
        if report is not None:
            report("evaluating", seen / total)
    return Accuracy(top1 / seen, top5 / seen if classes > 5 else None, seen)


def rank_of(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return how many classes stand before the right one, [B]; equal logits and NaN count as before it."""
    right = np.take_along_axis(logits, labels[:, None], axis=1)
    before = ~(logits < right)
    return before.sum(1) - ~np.isnan(right[:, 0])  # the right class itself is no competitor


def match_classes(data: Sequence[str] | None, model: Sequence[str] | None, classes: int) -> NDArray[np.int64]:
    """Return the model's class index for every class of the data.

    Names decide when both sides have them and agree; else the order, when there are as many.

    Raises:
        InputError: `data-classes` when neither works.
    """
    if data is not None and model is not None and set(data) <= set(model):
        index = {name: i for i, name in enumerate(model)}
        return np.array([index[name] for name in data], np.int64)
    if data is None or len(data) == classes:
        return np.arange(classes)
    raise InputError(
        f"the data has {len(data)} classes, the model {classes}, and their names do not match",
        code="data-classes",
        expected="as many classes in the same order, or class names that are the bundle's labels",
        hint="export with --labels FILE so that folders are found by name",
    )


def _limited(
    groups: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]], total: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield the groups up to `total` images."""
    for images, labels in groups:
        yield images[:total], labels[:total]
        total -= len(images)
        if total <= 0:
            return
