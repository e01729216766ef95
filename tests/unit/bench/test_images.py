from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.bench.images import make_images
from edgeprune.data.preprocess import load_image, preprocess
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import PreprocessInfo

INFO = PreprocessInfo(
    image_size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0, interpolation="bilinear"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in a directory without classes."""
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(path / f"{i}.png")
    return path


def test_noise_starts_the_same_however_many_images() -> None:
    few, many = (make_images(None, INFO, count=count, batch=2, seed=3) for count in (1, 5))
    assert (few.data, few.different, [len(batch) for batch in many.batches]) == ("noise", 2, [2, 2, 2])
    np.testing.assert_array_equal(few.batches[0], many.batches[0])


def test_images_are_those_of_the_directory(folder: Path) -> None:
    images = make_images(f"imagefolder:{folder}", INFO, count=3, batch=1, seed=0)
    wanted = preprocess(load_image(folder / "2.png"), INFO)
    np.testing.assert_array_equal(images.batches[2][0], wanted)
    assert (len(images.batches), images.different) == (3, 3)


def test_data_is_named_without_its_path(folder: Path) -> None:
    assert make_images(f"imagefolder:{folder}", INFO, count=1, batch=1, seed=0).data == "imagefolder:photos"


def test_last_batch_is_filled_up_with_the_first_images(folder: Path) -> None:
    images = make_images(f"imagefolder:{folder}", INFO, count=9, batch=2, seed=0)
    assert (len(images.batches), images.different) == (2, 3)
    np.testing.assert_array_equal(images.batches[1][1], images.batches[0][0])


def test_first_is_one_batch() -> None:
    first = make_images(None, INFO, count=6, batch=4, seed=0).first()
    assert (len(first.batches), first.different) == (1, 4)


@pytest.mark.parametrize(("spec", "count", "code"), [(None, 0, "bench-images"), ("faces", 1, "data-unknown")])
def test_images_that_are_none_are_refused(spec: str | None, count: int, code: str) -> None:
    with pytest.raises(InputError) as error:
        make_images(spec, INFO, count=count, batch=1, seed=0)
    assert error.value.code == code
