"""Kept tokens drawn over an image. numpy and Pillow only."""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgeprune.errors import InputError

_MIN_SIDE = 224
_DIM = 0.7  # share of the backdrop in a dropped patch
_BACKDROP = np.float32(96)


def draw_kept(image: Image.Image, kept: np.ndarray, grid: tuple[int, int], *, scale: int | None = None) -> Image.Image:
    """Return the image with the dropped patches dimmed to a greyish shadow of themselves.

    Args:
        image: what the model saw, see `edgeprune.data.preprocess.crop_only`.
        kept: [K] patch numbers, row by row from the top left; -1, a fused token, is skipped.
        grid: patches per column and per row.
        scale: whole factor to enlarge by; by default the smallest that makes both sides at least 224 pixels.

    Raises:
        InputError: `kept-indices` when a number is no patch of the grid.
    """
    rows, columns = grid
    kept = np.asarray(kept).reshape(-1)
    patches = kept[kept != -1]
    if patches.size and (patches.min() < 0 or patches.max() >= rows * columns):
        raise InputError(
            f"kept patch numbers from {patches.min()} to {patches.max()}",
            code="kept-indices",
            expected=f"0 to {rows * columns - 1}, the patches of a {rows}x{columns} grid",
        )
    stays = np.zeros(rows * columns, bool)
    stays[patches] = True
    if scale is None:
        scale = -(-_MIN_SIDE // min(image.size))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(-1, keepdims=True)
    dimmed = (1 - _DIM) * (pixels + grey) / 2 + _DIM * _BACKDROP
    row_of = np.arange(image.height) * rows // image.height
    column_of = np.arange(image.width) * columns // image.width
    mask = stays.reshape(rows, columns)[row_of[:, None], column_of[None, :]]
    return Image.fromarray(np.where(mask[..., None], pixels, dimmed).round().astype(np.uint8))
