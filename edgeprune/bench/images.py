"""What the graphs are run on: noise, or images of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.data import DIGITS, FOLDER_PREFIX, open_dataset
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import PreprocessInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOISE = "noise"


@dataclass(frozen=True)
class BenchImages:
    """Images in batches of one size.

    Attributes:
        data: what they are, without a path.
        batches: each [B, 3, H, W] float32, normalised.
        different: images that are not repeated.
    """

    data: str
    batches: list[NDArray[np.float32]]
    different: int

    def first(self) -> BenchImages:
        """Return the first batch alone."""
        return BenchImages(self.data, self.batches[:1], min(self.different, len(self.batches[0])))


def make_images(spec: str | None, info: PreprocessInfo, *, count: int, batch: int, seed: int) -> BenchImages:
    """Return images in full batches; the last is filled up with further images, or the first ones again.

    Args:
        spec: "digits" (held-out images) or "imagefolder:PATH", at any depth; None draws noise.
        info: preprocessing of the bundle.
        count: images wanted.
        batch: B.
        seed: of the noise.

    Raises:
        InputError: `bench-images` below one image; those of opening the data and of reading its files.
        EnvironmentLackError: `package-missing` for digits without scikit-learn.
    """
    if count < 1:
        raise InputError(f"{count} images", code="bench-images", expected="at least one image")
    full = -(-count // batch) * batch
    if spec is None:
        images = np.random.default_rng(seed).standard_normal((full, 3, *info.image_size), dtype=np.float32)
    else:
        dataset = open_dataset(spec, "test", limit=full, labelled=False)
        images = np.concatenate([group for group, _ in dataset.batches(batch, info)])
    different = len(images)
    images = images[np.arange(min(full, -(-different // batch) * batch)) % different]
    return BenchImages(_public_name(spec), [images[i : i + batch] for i in range(0, len(images), batch)], different)


def _public_name(spec: str | None) -> str:
    if spec is None or spec == DIGITS:
        return spec or NOISE
    return FOLDER_PREFIX + Path(spec.removeprefix(FOLDER_PREFIX)).name
