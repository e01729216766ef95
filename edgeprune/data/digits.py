"""Cluttered digits: a small real task that needs no download.

One of scikit-learn's 8x8 handwritten digits, 20 to 32 pixels tall, stands at a multiple of 8 pixels on a noisy 64x64
canvas among fragments of other digits; the label is the whole digit. Most patches hold nothing of use, which is
what token pruning is about. Needs numpy and scikit-learn.
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

CELLS = 8  # side of scikit-learn's digits
MIN_SIDE, MAX_SIDE = 20.0, 32.0  # of the digit and of what the fragments are cut from, pixels
FRAGMENTS = 4
GRID = 8  # pixels; places the digit may take are multiples of it
FRAGMENT_CELLS = (2, 4)  # least and most cells per side of a fragment
NOISE = 0.12  # peak to peak, in [0, 1] units
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
        difficulty: from 0, a digit alone in the middle, to 1, the task itself; scales how far the digit may stand
            from the middle and how many fragments there are.

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
    n, sprites = len(numbers), FRAGMENTS + 1
    values = np.empty((n, sprites * 10 + 9), np.float32)
    noise = np.empty((n, 3, SIDE, SIDE), np.uint8)
    for row, number in enumerate(numbers):
        rng = np.random.default_rng((seed, ("train", "test").index(split), number))
        values[row] = rng.random(values.shape[1], np.float32)
        noise[row] = rng.integers(0, 256, noise.shape[1:], np.uint8)

    per_sprite = values[:, 9:].reshape(n, sprites, 10)
    pick = (per_sprite[..., 0] * len(digits)).astype(np.int64)
    side = MIN_SIDE + per_sprite[..., 1] * (MAX_SIDE - MIN_SIDE)
    place = per_sprite[..., 2:4]
    place[:, -1] = 0.5 + (place[:, -1] - 0.5) * difficulty
    corner = place * (SIDE - side)[..., None]
    steps = np.floor((SIDE - side[:, -1:]) / GRID)  # the digit stands on the grid, fragments anywhere
    corner[:, -1] = GRID * np.minimum(np.floor(place[:, -1] * (steps + 1)), steps)
    top, left = corner[..., 0], corner[..., 1]
    cells = digits[pick]
    least, most = FRAGMENT_CELLS
    for axis in (0, 1):  # fragments show a window of cells only; the last sprite is the whole digit
        length = least + np.floor(per_sprite[..., 4 + axis] * (most - least + 1))
        first = np.floor(per_sprite[..., 6 + axis] * (CELLS - length + 1))
        length[:, -1], first[:, -1] = CELLS, 0
        at = np.arange(CELLS)
        window = (at >= first[..., None]) & (at < (first + length)[..., None])
        cells = cells * (window[..., :, None] if axis == 0 else window[..., None, :])
    cells[:, round(difficulty * FRAGMENTS) : -1] = 0
    ink = _resample(top, side) @ cells @ _resample(left, side).swapaxes(-1, -2)

    canvas = _background(values[:, :9]) + (noise.astype(np.float32) / 255 - 0.5) * NOISE
    bright = 0.6 + 0.4 * per_sprite[..., 8:9]
    hue = (per_sprite[..., 9:10] + np.array([0, 1 / 3, 2 / 3], np.float32)) * np.float32(2 * np.pi)
    colour = bright * (0.8 + 0.2 * np.cos(hue))
    for s in range(sprites):
        canvas += ink[:, s, None] * (colour[:, s, :, None, None] - canvas)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1), labels[pick[:, -1]]


def _resample(offset: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return [..., 64, 8]: bilinear weights that stretch 8 cells over `side` pixels from `offset` on."""
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5 - offset[..., None].astype(np.float32)
    position = pixel * (CELLS / side[..., None]) - 0.5
    weight = 1 - np.abs(position[..., None] - np.arange(CELLS, dtype=np.float32))
    return weight.clip(0).astype(np.float32)


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
