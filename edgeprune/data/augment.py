"""Augmentation of training images in the style of ImageNet recipes. The only module that imports kornia.

Torch and kornia are imported when an image is augmented, not before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError, missing_package

if TYPE_CHECKING:
    from edgeprune.runtime.manifest import PreprocessInfo

RAND_AUGMENT = re.compile(r"(?:rand-)?m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?")
MAGNITUDES = 10, 30  # timm's scale and kornia's
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's
REPEATS = 3  # copies of an image in an epoch of repeated augmentation


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image after cropping and mirroring.

    Attributes:
        rand_augment: "m9-n2-mstd0.5": magnitude 9 of 10, two operations, deviation 0.5; None for no RandAugment.
        color_jitter: strength of random brightness, contrast and saturation; not used with RandAugment.
        random_erase: share of images of which a rectangle becomes noise.
        repeated: an epoch shows a third of the images, each three times.
    """

    rand_augment: str | None = None
    color_jitter: float = 0.0
    random_erase: float = 0.0
    repeated: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether images are cropped and mirrored and nothing else."""
        return not (self.rand_augment or self.color_jitter or self.random_erase)

    @property
    def copies(self) -> int:
        """How often an image comes in an epoch in which it comes."""
        return REPEATS if self.repeated else 1

    def check(self) -> None:
        """Raise what would otherwise be raised in the middle of training.

        Raises:
            InputError: `option` when `rand_augment` cannot be read.
            EnvironmentLackError: `package-missing`.
        """
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)
        if not self.is_plain:
            _kornia()


def parse_rand_augment(text: str) -> tuple[float, int, float]:
    """Return magnitude, number of operations and deviation of the magnitude, of a text like "m9-n2-mstd0.5".

    Raises:
        InputError: `option`.
    """
    match = RAND_AUGMENT.fullmatch(text)
    if match is None or not 0 < float(match[1]) <= MAGNITUDES[0] or match[2] == "0":
        raise InputError(f"rand_augment '{text}' cannot be read", code="option", expected="a text like m9-n2-mstd0.5")
    return float(match[1]), int(match[2] or 2), float(match[3] or 0)


def augment(image: np.ndarray, how: Augmentation, info: PreprocessInfo, seed: int) -> np.ndarray:
    """Return the normalised input [3, H, W] float32 of an image [H, W, 3] uint8, augmented as `seed` says.

    RandAugment is kornia's, whose magnitudes run to 30: timm's magnitude is tripled, its deviation too.

    Source: RandAugment (arXiv 1909.13719), random erasing (arXiv 1708.04896).
    """
    import torch

    kornia = _kornia()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        if how.rand_augment:
            magnitude, count, deviation = parse_rand_augment(how.rand_augment)
            scale = MAGNITUDES[1] / MAGNITUDES[0]
            drawn = round(scale * (magnitude + deviation * torch.randn(()).item()))
            pixels = kornia.auto.RandAugment(count, min(max(drawn, 1), MAGNITUDES[1] - 1))(pixels)
        elif how.color_jitter:
            pixels = kornia.ColorJitter(how.color_jitter, how.color_jitter, how.color_jitter, 0.0, p=1.0)(pixels)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
        pixels = (pixels - mean) / std
        if how.random_erase:
            erase = kornia.RandomErasing(p=how.random_erase, scale=ERASED_AREA, ratio=ERASED_ASPECT, value=0.0)
            pixels = torch.where(erase(torch.ones_like(pixels[:, :1])) == 0, torch.randn_like(pixels), pixels)
    return pixels[0].contiguous().numpy()


def _kornia() -> Any:
    try:
        import kornia.augmentation
        import kornia.augmentation.auto
    except ImportError as error:
        raise missing_package("kornia", "train", "augmentation of images") from error
    return kornia.augmentation
