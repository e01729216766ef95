"""Directories of images, one per class, as torchvision's `ImageFolder` reads them.

numpy and Pillow only; `edgeprune.data.augment` needs more when training augments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from edgeprune.data.augment import Augmentation, augment
from edgeprune.data.preprocess import batches, load_image, preprocess
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.runtime.manifest import PreprocessInfo

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "test": ("val", "test")}
CROP_SCALE, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
CROP_TRIES = 10


def image_folder(path: Path | str) -> tuple[list[tuple[Path, int]], list[str]]:
    """Return the images below the class directories of `path`, and the class names in sorted order.

    Images lie at any depth; hidden files and other suffixes are passed over.

    Returns:
        (image file, class index) sorted by class, then by path; class names.

    Raises:
        InputError: `data-not-found` when `path` is no directory; `data-empty` when it has no class directories or a
            class has no image.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"no directory '{path}'" if not path.exists() else f"'{path}' is not a directory",
            code="data-not-found",
            expected="a directory with one directory of images per class",
            hint="check the path behind imagefolder:",
        )
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    samples: list[tuple[Path, int]] = []
    empty = []
    for index, name in enumerate(names):
        found = sorted(p for p in (path / name).rglob("*") if _is_image(p))
        samples += [(p, index) for p in found]
        empty += [] if found else [name]
    if empty or not names:
        raise InputError(
            f"no image in class '{empty[0]}' of '{path}'" if empty else f"'{path}' has no class directories",
            code="data-empty",
            expected=f"one directory per class with files ending in {', '.join(SUFFIXES)}",
            hint="remove empty class directories"
            if empty
            else "put the images of each class in a directory of its own",
            details={"path": str(path), "empty": empty},
        )
    return samples, names


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def split_path(path: Path | str, split: str, *, required: bool = False) -> Path:
    """Return the directory of a split: `train`, or `val` or `test`, below `path`; else `path` itself.

    Args:
        path: what stands behind `imagefolder:`.
        split: "train" or "test".
        required: refuse a directory without both splits.

    Raises:
        InputError: `data-split` for an unknown split, or when both are required and not there.
    """
    path = Path(path)
    if split not in SPLITS:
        raise InputError(f"no split '{split}'", code="data-split", expected=f"one of {', '.join(SPLITS)}")
    found = {s: [path / name for name in names if (path / name).is_dir()] for s, names in SPLITS.items()}
    if all(found.values()):
        return found[split][0]
    if required and path.is_dir():
        raise InputError(
            f"'{path}' is not divided into images to train on and images to judge by",
            code="data-split",
            expected="the directories 'train' and 'val' in it, with one directory per class each",
            hint="move a share of every class's images into 'val'",
        )
    return path


def has_classes(path: Path) -> bool:
    """Return whether a directory holds others, one per class, and not just images."""
    return path.is_dir() and any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir())


def every_image(path: Path) -> list[Path]:
    """Return the images of a directory at any depth, sorted.

    Raises:
        InputError: `data-not-found` when `path` is no directory, `data-empty` when it has no image.
    """
    found = sorted(p for p in path.rglob("*") if _is_image(p)) if path.is_dir() else []
    if not found:
        there = path.is_dir()
        raise InputError(
            f"no image in '{path}'" if there else f"no directory '{path}'",
            code="data-empty" if there else "data-not-found",
            expected=f"a directory of files ending in {', '.join(SUFFIXES)}",
            hint="check the path behind imagefolder:",
        )
    return found


class FolderSet:
    """The images of a directory in sorted order, prepared as for evaluation; `limit` takes some of every part."""

    def __init__(self, path: Path | str, limit: int | None = None, *, labelled: bool = True) -> None:
        if labelled:
            self.samples, self.labels = image_folder(path)
        else:
            self.samples, self.labels = [(file, 0) for file in every_image(Path(path))], []
        if limit is not None and limit < len(self.samples):
            self.samples = [self.samples[i * len(self.samples) // limit] for i in range(limit)]

    def __len__(self) -> int:
        return len(self.samples)

    def batches(
        self, size: int, preprocessing: PreprocessInfo, *, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images float32 [B, 3, H, W] and labels int64 [B]."""
        for group in islice(batches(self.samples, size), shard[0], None, shard[1]):
            images = [preprocess(load_image(path), preprocessing) for path, _ in group]
            yield np.stack(images), np.array([label for _, label in group], np.int64)


class FolderTraining:
    """The images of a directory, shuffled, randomly cropped, mirrored and augmented in every epoch.

    All random values of an image come from (seed, epoch, its number, which of its copies it is).
    """

    def __init__(self, path: Path | str, augmentation: Augmentation | None = None) -> None:
        self.samples, self.labels = image_folder(path)
        self.augmentation = augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.samples)

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
        """Return images float32 [B, 3, H, W] and labels int64 [B]; `difficulty` has no meaning here."""
        order = _order(len(self.samples), seed, epoch)
        each = -(-size // self.augmentation.copies)  # different images of a batch; their copies stand behind them
        keys = [(int(order[number * each + row % each]), row // each) for row in range(size)[rows]]
        images = [self._augmented(image, preprocessing, (seed, epoch, image, copy)) for image, copy in keys]
        return np.stack(images), np.array([self.samples[image][1] for image, _ in keys], np.int64)

    def _augmented(self, number: int, info: PreprocessInfo, key: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(key)
        image = random_crop(load_image(self.samples[number][0]), info, rng)
        if self.augmentation.is_plain:
            return preprocess(image, info.model_copy(update={"crop_pct": 1.0}))
        return augment(np.asarray(image), self.augmentation, info, int(rng.integers(2**62)))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def random_crop(image: Image.Image, info: PreprocessInfo, rng: np.random.Generator) -> Image.Image:
    """Return a random part of an image, resized to the model's input, mirrored every second time.

    The part covers 8 to 100 % of the image with sides in a ratio of 3:4 to 4:3; if none fits in ten tries, it is the
    whole image.
    """
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*CROP_SCALE)
        aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            break
    image = image.resize(info.image_size[::-1], Image.Resampling[info.interpolation.upper()], box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
