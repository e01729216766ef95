from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.data import open_dataset


def test_limit_of_a_directory_takes_images_of_every_class(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    dataset = open_dataset(f"imagefolder:{tmp_path}", limit=3)
    assert len(dataset) == 3
    assert [label for _, label in dataset.samples] == [0, 1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("limit", "count"), [(5, 5), (10**6, 2000), (None, 2000)])
def test_limit_of_digits_is_the_start_of_the_set(limit: int | None, count: int) -> None:
    dataset = open_dataset("digits", limit=limit)
    assert len(dataset) == count
    assert np.array_equal(dataset._targets[:5], open_dataset("digits", limit=5)._targets)  # type: ignore[attr-defined]
