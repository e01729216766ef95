"""Labelled images by name: "digits" or "imagefolder:PATH"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgeprune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from edgeprune.data.augment import Augmentation
    from edgeprune.runtime.manifest import PreprocessInfo

DIGITS = "digits"
FOLDER_PREFIX = "imagefolder:"

Batches = Iterator["tuple[np.ndarray, np.ndarray]"]  # images float32 [B, 3, H, W] normalised, labels int64 [B]


class Dataset(Protocol):
    """A fixed list of labelled images.

    Attributes:
        labels: class names; an image's label is an index into them.
    """

    labels: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batches(self, size: int, preprocessing: PreprocessInfo, *, shard: tuple[int, int] = (0, 1)) -> Batches:
        """Yield all images once, in order; the last batch may be smaller.

        With `shard` (i, n) only batches number i, i + n, i + 2n and so on.
        """
        ...


class TrainingData(Protocol):
    """Labelled images that change from epoch to epoch: shuffled, augmented, or drawn anew.

    Attributes:
        labels: class names; an image's label is an index into them.
    """

    labels: list[str]

    def __len__(self) -> int:
        """Return the number of images of one epoch."""
        ...

    def batch(
        self,
        number: int,
        size: int,
        preprocessing: PreprocessInfo,
        *,
        epoch: int,
        seed: int,
        difficulty: float = 1.0,
        rows: slice = slice(None),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `rows` of batch `number` of an epoch, the same for the same arguments; no other image is made.

        An epoch has `len(self) // size` batches. `difficulty` from 0 to 1 makes tasks that can be made easier so;
        others ignore it.
        """
        ...


def open_dataset(spec: str, split: str = "test", *, limit: int | None = None, labelled: bool = True) -> Dataset:
    """Return the images a model is evaluated on.

    Args:
        spec: "digits" or "imagefolder:PATH". PATH holds one directory per class, or `train` and `val` (or `test`)
            with one directory per class each.
        split: "test" or "train".
        limit: at most this many images, of a directory spread evenly over it; None takes all.
        labelled: without labels a directory may hold images at any depth, and every label is 0.

    Raises:
        InputError: `data-unknown`, `data-not-found`, `data-empty`, `data-split`.
        EnvironmentLackError: `package-missing` for digits without scikit-learn.
    """
    if spec == DIGITS:
        from edgeprune.data.digits import DigitsSet

        return DigitsSet(split, limit)
    from edgeprune.data.folder import FolderSet

    return FolderSet(folder_of(spec, split), limit, labelled=labelled)


def open_training_data(spec: str, augmentation: Augmentation | None = None) -> TrainingData:
    """Return the images a model is trained on.

    Args:
        spec: "digits" or "imagefolder:PATH"; PATH holds `train` and `val` (or `test`), so that no model is judged by
            what it was trained on.
        augmentation: of the images of a directory besides cropping and mirroring; digits need none.

    Raises:
        InputError: `data-unknown`, `data-not-found`, `data-empty`, `data-split`.
        EnvironmentLackError: `package-missing` for digits without scikit-learn.
    """
    if spec == DIGITS:
        from edgeprune.data.digits import DigitsStream

        return DigitsStream()
    from edgeprune.data.folder import FolderTraining, split_path

    return FolderTraining(split_path(_folder_path(spec), "train", required=True), augmentation)


def folder_of(spec: str, split: str) -> Path:
    """Return the directory of a split of "imagefolder:PATH"; that of both where it is not divided.

    Raises:
        InputError: `data-unknown`, `data-split`.
    """
    from edgeprune.data.folder import split_path

    return split_path(_folder_path(spec), split)


def shown_name(spec: str) -> str:
    """Return "digits", or "imagefolder:" and the directory's name without what leads there."""
    return spec if spec == DIGITS else FOLDER_PREFIX + Path(_folder_path(spec)).name


def _folder_path(spec: str) -> str:
    path = spec.removeprefix(FOLDER_PREFIX)
    if not spec.startswith(FOLDER_PREFIX) or not path:
        raise InputError(
            f"unknown data '{spec}'",
            code="data-unknown",
            expected=f"'{DIGITS}' or '{FOLDER_PREFIX}PATH'",
            hint=f"for a directory of images write {FOLDER_PREFIX}{path or 'PATH'}",
        )
    return path
