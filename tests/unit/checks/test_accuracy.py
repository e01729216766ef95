from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.checks.accuracy import evaluate, rank_of
from edgeprune.data.classes import match_classes
from edgeprune.errors import InputError


class Data:
    """`count` images whose first pixel is their class."""

    def __init__(self, count: int, labels: list[str]) -> None:
        self.labels, self.count = labels, count

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, preprocessing: Any) -> Any:
        for start in range(0, self.count, size):
            y = np.arange(start, min(start + size, self.count)) % len(self.labels)
            yield np.broadcast_to(y[:, None, None, None], (len(y), 3, 2, 2)).astype(np.float32), y


class Model:
    """Finds the class of `Data`, except of the classes in `wrong`, which come second."""

    def __init__(
        self, batch: tuple[int, int], classes: int = 10, labels: Any = None, wrong: Any = (), counts: bool = False
    ) -> None:
        self.manifest = SimpleNamespace(batch=batch, preprocessing=None)
        self.classes, self.labels, self.wrong = classes, labels, wrong
        self.counts = counts
        self.sizes: list[int] = []

    def run(self, images: np.ndarray) -> Any:
        self.sizes.append(len(images))
        assert self.manifest.batch[0] <= len(images) <= self.manifest.batch[1]
        logits = np.zeros((len(images), self.classes), np.float32)
        for i, c in enumerate(images[:, 0, 0, 0].astype(int)):
            logits[i, c] = 2
            logits[i, (c + 1) % self.classes] = 3 if c in self.wrong else 1
        if not self.counts:
            return SimpleNamespace(logits=logits, kept_counts=None, overflow=None)
        kept = images[:, 0, 0, 0].astype(np.int32)[:, None] + np.array([[1, 2]], np.int32)  # class c keeps c+1, c+2
        return SimpleNamespace(logits=logits, kept_counts=kept, overflow=kept[:, 0] > 8)


NAMES = [str(i) for i in range(10)]


def test_every_image_counts_once_when_the_last_batch_is_filled_up() -> None:
    model = Model((4, 4))
    found = evaluate(model, Data(10, NAMES))  # type: ignore[arg-type]
    assert (found.top1, found.top5, found.images) == (1.0, 1.0, 10)
    assert model.sizes == [4, 4, 4]


def test_wrong_classes_lower_top1_but_not_top5() -> None:
    found = evaluate(Model((1, 8), wrong={3, 7}), Data(20, NAMES))  # type: ignore[arg-type]
    assert (found.top1, found.top5) == (0.8, 1.0)


def test_top5_is_left_out_when_five_classes_are_all() -> None:
    assert evaluate(Model((1, 1), 4), Data(8, NAMES[:4])).top5 is None  # type: ignore[arg-type]


def test_kept_tokens_are_averaged_and_overflow_is_counted() -> None:
    found = evaluate(Model((4, 4), counts=True), Data(10, NAMES))  # type: ignore[arg-type]
    assert (found.kept, found.overflow, found.mean_macs) == ([5.5, 6.5], 2, None)


def test_operations_are_averaged_over_images_not_taken_at_the_mean_count() -> None:
    asked: list[tuple[int, ...]] = []

    def macs(counts: tuple[int, ...]) -> float:
        asked.append(counts)
        return counts[0] ** 2

    found = evaluate(Model((4, 4), counts=True), Data(20, NAMES), macs=macs)  # type: ignore[arg-type]
    assert found.mean_macs == 38.5
    assert sorted(asked) == [(c + 1, c + 2) for c in range(10)]


def test_counts_that_are_not_told_are_none() -> None:
    found = evaluate(Model((1, 8)), Data(10, NAMES), macs=lambda counts: 1.0)  # type: ignore[arg-type]
    assert (found.kept, found.overflow, found.mean_macs) == (None, 0, None)


def test_classes_are_found_by_name() -> None:
    assert match_classes(["dog", "cat"], ["ant", "cat", "dog"], 3).tolist() == [2, 1]


def test_classes_are_found_by_order_when_names_differ() -> None:
    assert match_classes(["n01", "n02"], ["cat", "dog"], 2).tolist() == [0, 1]
    assert match_classes(["n01", "n02"], None, 2).tolist() == [0, 1]


def test_classes_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(InputError) as raised:
        match_classes(["n01", "n02"], None, 1000)
    assert raised.value.code == "data-classes"


def test_rank_takes_the_worst_of_equal_logits() -> None:
    logits = np.array([[3, 1, 2], [1, 1, 1], [np.nan, 0, 1], [np.nan] * 3], np.float32)
    assert rank_of(logits, np.array([0, 1, 2, 0])).tolist() == [0, 2, 1, 3]
