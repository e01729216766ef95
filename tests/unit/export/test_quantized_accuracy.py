"""Images to calibrate and to judge by, wherever they come from, and the judgement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.export import quantized_accuracy
from edgeprune.export.quantized_accuracy import ImageSet, judge, open_images, refer
from edgeprune.runtime.manifest import PreprocessInfo
from tests.helpers.lowering import noise, random_model, small, stages_of

PREPROCESSING = PreprocessInfo(
    image_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0, interpolation="bilinear"
)


def fill(folder: Path, count: int, first: int = 0) -> None:
    """Write grey images; the brightness is the number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (32, 32), (number, number, number)).save(folder / f"{number:03}.png")


def opened(
    spec: str | Path, count: int = 100, classes: int = 2, labels: list[str] | None = None
) -> tuple[ImageSet, ImageSet]:
    spec = spec if isinstance(spec, str) else f"imagefolder:{spec}"
    return open_images(spec, PREPROCESSING, count, classes=classes, labels=labels)


def numbers(images: ImageSet) -> list[int]:
    return np.rint((images.images[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_digits_are_divided_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_accuracy, "JUDGED_IMAGES", 12)
    seen, judged = opened("digits", 9, classes=10)
    assert (len(seen), len(judged), seen.name, judged.name) == (9, 12, "digits", "digits")
    assert (seen.held_out, judged.held_out) == (False, True)
    assert judged.labels is not None and judged.labels.dtype == np.int64
    assert judged.images.shape == (12, 3, 32, 32) and judged.images.dtype == np.float32


def test_train_and_val(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 100)):
        fill(tmp_path / split / "cat", 6, first)
        fill(tmp_path / split / "dog", 6, first + 50)
    seen, judged = opened(tmp_path, 4)
    assert numbers(seen) == [0, 3, 50, 53]
    assert sorted(numbers(judged)) == [*range(100, 106), *range(150, 156)]
    assert judged.labels is not None and judged.labels.tolist() == [0] * 6 + [1] * 6
    assert judged.held_out and judged.name == f"imagefolder:{tmp_path.name}"


def test_every_second_image_of_a_directory_that_is_not_divided(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 6)
    fill(tmp_path / "dog", 6, 50)
    seen, judged = opened(tmp_path)
    assert (numbers(seen), numbers(judged)) == ([0, 2, 4, 50, 52, 54], [1, 3, 5, 51, 53, 55])
    assert seen.labels is not None and seen.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (seen.held_out, judged.held_out) == (False, True)
    few, others = opened(tmp_path, 2)
    assert (len(few), len(others)) == (2, 2)


def test_images_without_classes(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    seen, judged = opened(tmp_path)
    assert (numbers(seen), numbers(judged)) == ([0, 2, 4], [1, 3])
    assert seen.labels is None and judged.labels is None


def test_divided_images_without_classes(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 4, 100)
    seen, judged = opened(tmp_path)
    assert (numbers(seen), numbers(judged)) == ([0, 1, 2], [100, 101, 102, 103])
    assert judged.labels is None and judged.held_out


def test_labels_are_found_by_name_or_order_or_not_at_all(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 2)
    fill(tmp_path / "dog", 2, 50)
    by_name = opened(tmp_path, classes=3, labels=["dog", "horse", "cat"])[0]
    assert by_name.labels is not None and by_name.labels.tolist() == [2, 0]
    by_order = opened(tmp_path, classes=2, labels=["x", "y"])[0]
    assert by_order.labels is not None and by_order.labels.tolist() == [0, 1]
    assert opened(tmp_path, classes=3, labels=["x", "y", "z"])[0].labels is None
    assert opened(tmp_path, classes=1000)[1].labels is None


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("missing", "data-not-found", "no directory"),
        ("file.png", "data-not-found", "no directory"),
        ("empty", "data-empty", "no image"),
        ("texts", "data-empty", "no image"),
        ("one-image", "calibration", "1 image is too few"),
        ("one-class", "calibration", "of one class, 'cat'"),
        ("empty-class", "data-empty", "no image in class 'dog'"),
        ("broken", "image-unreadable", "broken.png"),
    ],
)
def test_wrong_directories(tmp_path: Path, name: str, code: str, words: str) -> None:
    fill(tmp_path / "one-image", 1)
    fill(tmp_path / "one-class" / "cat", 3)
    fill(tmp_path / "empty-class" / "cat", 3)
    fill(tmp_path / "broken", 3)
    (tmp_path / "broken" / "broken.png").write_bytes(b"no image")
    for folder in ("empty", "texts", "empty-class/dog"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "file.png").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / name)
    assert caught.value.code == code and words in caught.value.message
    assert caught.value.expected


@pytest.mark.parametrize("spec", ["digit", "imagefolder:", ""])
def test_wrong_names(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(spec)
    assert caught.value.code == "data-unknown"


# ------------------------------------------------------------------------------------------------ judging


def test_some_images_are_spread_evenly() -> None:
    images = ImageSet("x", np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1), np.arange(10), held_out=True)
    some = images.first(4)
    assert some.images.ravel().tolist() == [0, 2, 5, 7]
    assert some.labels is not None and some.labels.tolist() == [0, 2, 5, 7] and some.held_out
    assert len(images.first(100)) == 10


def test_judgement_counts_what_is_right_and_what_is_the_same() -> None:
    config = small(depth=2)
    model = random_model(config, stages_of(config, "evit", 0.5, "1"))
    images = noise(config, 5)
    reference = refer(model, ImageSet("x", images, None), 1, lambda step, share: None)
    labels = reference.best.copy()
    labels[0] = (labels[0] + 1) % 5  # the float model is wrong here
    reference = refer(model, ImageSet("x", images, labels, held_out=True), 1, lambda step, share: None)
    calls: list[int] = []

    def run(batch: np.ndarray) -> dict[str, np.ndarray]:
        at = sum(calls)
        calls.append(len(batch))
        best = [*reference.best, 0][at : at + 2]
        best[0] = (best[0] + 1) % 5  # the first of each pair
        kept = np.concatenate([reference.kept[0], reference.kept[0][:1]])[at : at + 2]
        return {"logits": np.eye(5)[best], "kept_indices_0": kept}

    found = judge(run, reference, 2, lambda step, share: None)
    assert calls == [2, 2, 2]  # the last group is filled up
    assert (found.images, found.held_out, found.kept_overlap) == (5, True, 1.0)
    assert found.top1_agreement == pytest.approx(2 / 5)
    assert (found.float_top1, found.top1) == (pytest.approx(4 / 5), pytest.approx(3 / 5))
    assert found.drop == pytest.approx(20)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = random_model(small(depth=1))
    images = noise(model.config, 2)
    images[1] = np.nan
    with pytest.raises(InputError, match="not finite") as caught:
        refer(model, ImageSet("x", images, None), 1, lambda step, share: None)
    assert caught.value.code == "calibration"
