"""Kept tokens over the image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgeprune.data.overlay import draw_kept
from edgeprune.errors import InputError


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def untouched(drawn: Image.Image, image: Image.Image) -> np.ndarray:
    """Return which pixels are those of the enlarged image."""
    enlarged = image.resize(drawn.size, Image.Resampling.NEAREST)
    return (np.asarray(drawn) == np.asarray(enlarged)).all(-1)


def test_kept_patches_stay_and_the_others_are_dimmed() -> None:
    image = noise(224)
    same = untouched(draw_kept(image, np.array([0, 15, 195]), (14, 14)), image)
    patches = same.reshape(14, 16, 14, 16).mean((1, 3)).reshape(-1)
    assert np.flatnonzero(patches == 1).tolist() == [0, 15, 195]
    assert np.delete(patches, [0, 15, 195]).max() < 0.05


def test_dropped_patches_lose_contrast_and_colour() -> None:
    image = Image.new("RGB", (224, 224), (250, 0, 0))
    red, green, blue = np.asarray(draw_kept(image, np.array([], int), (14, 14)))[0, 0].astype(int)
    assert green == blue
    assert 10 < red - green < 60


def test_all_patches_kept_leave_the_image_as_it_is() -> None:
    image = noise(224)
    assert untouched(draw_kept(image, np.arange(196), (14, 14)), image).all()


def test_fused_token_is_skipped() -> None:
    image = noise(224)
    with_fused = draw_kept(image, np.array([3, -1]), (14, 14))
    assert with_fused.tobytes() == draw_kept(image, np.array([3]), (14, 14)).tobytes()


@pytest.mark.parametrize(
    ("side", "scale", "expected"), [(224, None, 224), (64, None, 256), (384, None, 384), (64, 2, 128)]
)
def test_small_images_are_enlarged(side: int, scale: int | None, expected: int) -> None:
    assert draw_kept(noise(side), np.array([0]), (4, 4), scale=scale).size == (expected, expected)


def test_grid_need_not_be_square() -> None:
    image = noise(240).crop((0, 0, 240, 224))
    same = untouched(draw_kept(image, np.array([15]), (14, 15)), image)
    assert same[16:32, :16].all()  # first patch of the second row
    assert same.mean() < 0.05


@pytest.mark.parametrize("number", [196, 5000, -2])
def test_number_outside_the_grid_is_refused(number: int) -> None:
    with pytest.raises(InputError, match="0 to 195") as caught:
        draw_kept(noise(224), np.array([number]), (14, 14))
    assert caught.value.code == "kept-indices"


def test_image_is_not_changed_in_place() -> None:
    image = noise(224)
    before = image.tobytes()
    draw_kept(image, np.array([0]), (14, 14))
    assert image.tobytes() == before
