"""Cluttered digits: a small real task that needs no download.

Four of scikit-learn's 8x8 handwritten digits, each of another class and colour, a coloured square and dim fragments of
digits stand on a noisy 64x64 canvas. The label is the digit of the square's colour. Each digit and the square fill one
8x8 patch. The other 59 patches say nothing about the label, and it takes two blocks to learn the colour and to read the
digit that has it, so what is kept before the second block's attention decides the accuracy; later the answer can be in
the class token already. Needs numpy and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError, missing_package

if TYPE_CHECKING:
    from edgeprune.runtime.manifest import PreprocessInfo

SIDE = 64
LABELS = [str(digit) for digit in range(10)]
EVAL_COUNT, EVAL_SEED = 2000, 0  # make_split("test", EVAL_COUNT, EVAL_SEED) is the evaluation set everywhere

CELL = 8  # pixels; side of scikit-learn's digits, of the square and of a patch
OTHERS = 3  # digits of other colours
FRAGMENTS = 12
FRAGMENT_SIDE = (2, 4)  # least and most pixels
HUES = 6
HUE_JITTER = 0.15  # most deviation, in steps between hues
SATURATION = 0.5
LIGHT, FRAGMENT_LIGHT = (0.75, 1.0), (0.3, 0.5)  # least and most brightness
NOISE = 0.2  # peak to peak, in [0, 1] units
TEST_EVERY = 5
EPOCH_COUNT = 8000  # images of one training epoch
CHUNK = 16  # images drawn at once; bounds memory and changes nothing else


@lru_cache(maxsize=1)
def _source() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits [1797, 8, 8] float32 in [0, 1] and labels [1797], sorted by label."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_package("scikit-learn", "train", "the data set 'digits'") from error
    source = load_digits()
    order = np.argsort(source.target, kind="stable")
    return (source.images[order] / 16).astype(np.float32), source.target[order].astype(np.int64)


def source_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits a split is made of: [n, 8, 8] float32 in [0, 1] and labels [n] int64.

    Every fifth digit of the list sorted by label is held out: 1,437 for "train", 360 for "test".

    Raises:
        InputError: `data-split` for another name.
        EnvironmentLackError: `package-missing` without scikit-learn.
    """
    if split not in ("train", "test"):
        raise InputError(f"digits have no split '{split}'", code="data-split", expected="'train' or 'test'")
    digits, labels = _source()
    held_out = np.arange(len(labels)) % TEST_EVERY == 0
    chosen = held_out if split == "test" else ~held_out
    return digits[chosen], labels[chosen]


def make_split(
    split: str, count: int, seed: int, *, start: int = 0, difficulty: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return images number `start` to `start + count` of the endless stream that (split, seed) names.

    An image depends on (split, seed, its number) alone.

    Args:
        split: "train" or "test"; they share no handwritten digit, not even in the fragments.
        count: images to draw.
        seed: not negative.
        start: number of the first image.
        difficulty: from 0, four digits of one class without fragments, to 1, the task itself; scales how many
            fragments there are and how often another digit is of another class.

    Returns:
        images uint8 [count, 64, 64, 3], labels int64 [count].

    Raises:
        InputError: `data-split` for an unknown split.
        EnvironmentLackError: `package-missing` without scikit-learn.
    """
    digits, labels = source_digits(split)
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    targets = np.empty(count, np.int64)
    for at in range(0, count, CHUNK):
        numbers = range(start + at, start + min(at + CHUNK, count))
        images[at : at + CHUNK], targets[at : at + CHUNK] = _draw(digits, labels, split, seed, numbers, difficulty)
    return images, targets


def _draw(
    digits: np.ndarray, labels: np.ndarray, split: str, seed: int, numbers: range, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images with these numbers; all random values of an image come from its own generator."""
    n, sprites = len(numbers), FRAGMENTS + OTHERS + 2  # fragments, other digits, the square, the labelled digit
    shown, places = OTHERS + 2, (SIDE // CELL) ** 2
    values = np.empty((n, 9 + places + HUES + len(LABELS) - 1 + sprites * 8), np.float32)
    noise = np.empty((n, 3, SIDE, SIDE), np.uint8)
    for row, number in enumerate(numbers):
        rng = np.random.default_rng((seed, ("train", "test").index(split), number))
        values[row] = rng.random(values.shape[1], np.float32)
        noise[row] = rng.integers(0, 256, noise.shape[1:], np.uint8)
    ends = np.cumsum([9, places, HUES, len(LABELS) - 1])
    ground, order, hues, classes, rest = np.split(values, ends, axis=1)
    rest = rest.reshape(n, sprites, 8)

    pick = (rest[..., 0] * len(digits)).astype(np.int64)
    label = labels[pick[:, -1]]
    other = (label[:, None] + 1 + classes.argsort(1)[:, :OTHERS]) % len(LABELS)  # no two digits of one class
    other = np.where(rest[:, FRAGMENTS:-2, 1] < difficulty, other, label[:, None])
    begin, end = np.searchsorted(labels, other), np.searchsorted(labels, other, "right")
    pick[:, FRAGMENTS:-2] = begin + (rest[:, FRAGMENTS:-2, 0] * (end - begin)).astype(np.int64)
    ink = digits[pick]
    ink[:, -2] = 1

    least, most = FRAGMENT_SIDE
    size = least + np.floor(rest[..., 1:3] * (most - least + 1)).astype(np.int64)
    size[:, FRAGMENTS:] = CELL
    first = np.floor(rest[..., 3:5] * (CELL - size + 1)).astype(np.int64)  # of a fragment in its digit
    corner = np.floor(rest[..., 5:7] * (SIDE - size + 1)).astype(np.int64)
    cell = order.argsort(1)[:, :shown]
    corner[:, FRAGMENTS:] = CELL * np.stack(np.divmod(cell, SIDE // CELL), -1)

    light = np.array([FRAGMENT_LIGHT] * FRAGMENTS + [LIGHT] * shown, np.float32)
    light = light[:, 0] + (light[:, 1] - light[:, 0]) * rest[..., 7]
    hue = rest[..., 6] * HUES  # of fragments: any, going with the place
    hue[:, FRAGMENTS:] = hues.argsort(1)[:, :shown] + HUE_JITTER * (2 * rest[:, FRAGMENTS:, 6] - 1)
    hue[:, -2] += hues.argsort(1)[:, shown - 1] - hues.argsort(1)[:, shown - 2]  # the square's is the last digit's
    angle = (hue[..., None] / HUES + np.array([0, 1 / 3, 2 / 3], np.float32)) * np.float32(2 * np.pi)
    colour = (light[..., None] * (1 - SATURATION + SATURATION * np.cos(angle)))[..., None, None].astype(np.float32)

    canvas = _background(ground) + (noise.astype(np.float32) / 255 - 0.5) * np.float32(NOISE)
    drawn = [*range(round(difficulty * FRAGMENTS)), *range(FRAGMENTS, sprites)]
    for image, inks, tints, *boxes in zip(
        canvas, ink, colour, first.tolist(), size.tolist(), corner.tolist(), strict=True
    ):
        for s in drawn:
            (y, x), (height, width), (top, left) = (box[s] for box in boxes)
            there = image[:, top : top + height, left : left + width]
            there += inks[s, y : y + height, x : x + width] * (tints[s] - there)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1), label


def _background(values: np.ndarray) -> np.ndarray:
    """Return [n, 3, 64, 64]: a dark tint with a linear gradient per channel, from values [n, 9]."""
    base, slope_y, slope_x = values.reshape(len(values), 3, 3, 1, 1).swapaxes(0, 1)
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    return 0.05 + 0.15 * base + 0.2 * ((slope_y - 0.5) * ramp[:, None] + (slope_x - 0.5) * ramp)


class DigitsSet:
    """The evaluation set of a split: its first 2,000 images, or fewer with a limit."""

    def __init__(self, split: str = "test", limit: int | None = None) -> None:
        self.labels = list(LABELS)
        self._images, self._targets = make_split(split, min(limit or EVAL_COUNT, EVAL_COUNT), EVAL_SEED)

    def __len__(self) -> int:
        return len(self._targets)

    def batches(
        self, size: int, preprocessing: PreprocessInfo, *, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images float32 [B, 3, H, W] and labels int64 [B]."""
        for at in range(shard[0] * size, len(self), shard[1] * size):
            yield _inputs(self._images[at : at + size], preprocessing), self._targets[at : at + size]


class DigitsStream:
    """Training images that never repeat: every epoch draws new canvases from the training digits."""

    def __init__(self, count: int = EPOCH_COUNT) -> None:
        self.labels = list(LABELS)
        self._count = count
        source_digits("train")

    def __len__(self) -> int:
        return self._count

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
        """Return images float32 [B, 3, H, W] and labels int64 [B]; see `make_split` for `difficulty`."""
        first, stop, _ = rows.indices(size)
        start = epoch * self._count + number * size + first
        images, targets = make_split("train", stop - first, seed, start=start, difficulty=difficulty)
        return _inputs(images, preprocessing), targets


def _inputs(images: np.ndarray, info: PreprocessInfo) -> np.ndarray:
    """Return uint8 [B, 64, 64, 3] as model inputs float32 [B, 3, H, W]; all at once when nothing is resized."""
    if tuple(info.image_size) != (SIDE, SIDE) or info.crop_pct != 1:
        from PIL import Image

        from edgeprune.data.preprocess import preprocess

        return np.stack([preprocess(Image.fromarray(image), info) for image in images])
    pixels = images.astype(np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(info.mean, np.float32)) / np.asarray(info.std, np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
