from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.data import open_dataset, open_training_data
from edgeprune.data.augment import Augmentation, augment, parse_rand_augment
from edgeprune.data.folder import FolderTraining, image_folder, random_crop, split_path
from edgeprune.data.preprocess import load_image, preprocess
from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime.manifest import PreprocessInfo

INFO = PreprocessInfo(image_size=(16, 24), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, interpolation="bicubic")


def write_images(path: Path, classes: str = "ba", count: int = 3) -> Path:
    """Write `count` random images for each class, some in a directory below."""
    rng = np.random.default_rng(0)
    for name in classes:
        for i in range(count):
            file = path / name / ("deep" if i == 0 else "") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(file)
    return path


def code_of(call: object) -> str:
    with pytest.raises(InputError) as error:
        call()  # type: ignore[operator]
    assert error.value.expected
    return error.value.code


def test_classes_are_the_sorted_directories(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    samples, names = image_folder(tmp_path)
    assert names == ["a", "b"]
    assert [(p.relative_to(tmp_path).as_posix(), label) for p, label in samples] == [
        ("a/1.png", 0), ("a/2.png", 0), ("a/deep/0.png", 0), ("b/1.png", 1), ("b/2.png", 1), ("b/deep/0.png", 1),
    ]  # fmt: skip


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert code_of(lambda: image_folder(tmp_path / "none")) == "data-not-found"


def test_directory_without_classes_is_refused(tmp_path: Path) -> None:
    assert code_of(lambda: image_folder(tmp_path)) == "data-empty"


def test_class_without_images_is_named(tmp_path: Path) -> None:
    (write_images(tmp_path) / "c").mkdir()
    with pytest.raises(InputError, match="class 'c'") as error:
        image_folder(tmp_path)
    assert error.value.code == "data-empty"


@pytest.mark.parametrize("spec", ["imagenet", "imagefolder:", "digit"])
def test_unknown_data_is_refused(spec: str) -> None:
    assert code_of(lambda: open_dataset(spec)) == "data-unknown"


def test_split_directories_are_found(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_images(tmp_path / name)
    assert split_path(tmp_path, "train") == tmp_path / "train"
    assert split_path(tmp_path, "test") == tmp_path / "val"
    assert len(open_dataset(f"imagefolder:{tmp_path}")) == 6


def test_plain_directory_is_evaluated_as_it_is(tmp_path: Path) -> None:
    assert len(open_dataset(f"imagefolder:{write_images(tmp_path)}")) == 6


def test_training_needs_images_to_judge_by(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert code_of(lambda: open_training_data(f"imagefolder:{tmp_path}")) == "data-split"


def test_evaluation_batches_hold_the_preprocessed_files_in_order(tmp_path: Path) -> None:
    dataset = open_dataset(f"imagefolder:{write_images(tmp_path)}")
    pixels, labels = zip(*dataset.batches(4, INFO), strict=True)
    assert [len(b) for b in labels] == [4, 2]
    samples, _ = image_folder(tmp_path)
    expected = np.stack([preprocess(load_image(path), INFO) for path, _ in samples])
    assert np.array_equal(np.concatenate(pixels), expected)


def test_training_shuffles_and_augments_by_seed_and_epoch(tmp_path: Path) -> None:
    data = FolderTraining(write_images(tmp_path, count=8))

    def epoch(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = zip(*(data.batch(i, 4, INFO, epoch=number, seed=seed) for i in range(4)), strict=True)
        return np.concatenate(pixels), np.concatenate(labels)

    pixels, labels = epoch(0, 0)
    assert pixels.shape == (16, 3, 16, 24)
    assert pixels.dtype == np.float32
    assert sorted(labels) == [0] * 8 + [1] * 8
    again, again_labels = epoch(0, 0)
    assert np.array_equal(pixels, again)
    assert np.array_equal(labels, again_labels)
    assert not np.array_equal(pixels, epoch(1, 0)[0])
    assert not np.array_equal(pixels, epoch(0, 1)[0])


AUGMENTATIONS = {
    "rand-augment": Augmentation(rand_augment="m9-n2-mstd0.5"),
    "jitter": Augmentation(color_jitter=0.4),
    "erase": Augmentation(random_erase=1.0),
    "repeated": Augmentation(random_erase=0.5, repeated=True),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_rows_of_a_batch_are_the_same_alone(name: str, tmp_path: Path) -> None:
    data = FolderTraining(write_images(tmp_path, count=8), AUGMENTATIONS[name])
    whole, labels = data.batch(1, 6, INFO, epoch=0, seed=0)
    part, part_labels = data.batch(1, 6, INFO, epoch=0, seed=0, rows=slice(3, 6))
    assert whole.shape == (6, 3, 16, 24) and whole.dtype == np.float32
    assert np.isfinite(whole).all()
    assert np.array_equal(whole[3:], part)
    assert np.array_equal(labels[3:], part_labels)
    plain, _ = FolderTraining(tmp_path).batch(1, 6, INFO, epoch=0, seed=0)
    assert not np.array_equal(whole, plain)


def test_repeated_augmentation_shows_every_image_three_times_and_differently(tmp_path: Path) -> None:
    data = FolderTraining(write_images(tmp_path, count=8), Augmentation(repeated=True))
    images, labels = data.batch(0, 6, INFO, epoch=0, seed=0)
    assert labels.tolist() == labels[:2].tolist() * 3
    assert len({image.tobytes() for image in images}) == 6


def test_augmentation_leaves_torchs_generator_alone() -> None:
    torch = pytest.importorskip("torch")
    image = np.zeros((16, 24, 3), np.uint8)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = augment(image, AUGMENTATIONS["erase"], INFO, 5)
    assert torch.equal(torch.rand(2), expected)
    assert np.array_equal(first, augment(image, AUGMENTATIONS["erase"], INFO, 5))
    assert not np.array_equal(first, augment(image, AUGMENTATIONS["erase"], INFO, 6))


def test_rand_augment_texts() -> None:
    assert parse_rand_augment("rand-m9-mstd0.5") == (9, 2, 0.5)
    assert parse_rand_augment("m7-n3") == (7, 3, 0)
    for text in ("", "m0", "m11", "n2", "m9-n0", "m9-inc1"):
        assert code_of(lambda text=text: parse_rand_augment(text)) == "option"


def test_missing_kornia_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kornia.augmentation", None)
    with pytest.raises(EnvironmentLackError, match="edgeprune\\[train\\]"):
        AUGMENTATIONS["jitter"].check()


def test_random_crop_shows_parts_of_the_image_both_ways_round() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    image = Image.fromarray(ramp)
    rises = set()
    widths = []
    for seed in range(30):
        crop = np.asarray(random_crop(image, INFO, np.random.default_rng(seed))).astype(int)
        assert crop.shape == (16, 24, 3)
        row = crop[8, :, 0]
        rises.add(bool(row[-1] > row[0]))
        widths.append(abs(row[-1] - row[0]))
    assert rises == {True, False}
    assert max(widths) > 2 * min(widths)
