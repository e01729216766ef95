from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgeprune.data import digits, open_dataset, open_training_data
from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.models.registry import get_model_config
from edgeprune.runtime.manifest import PreprocessInfo

CONFIG = get_model_config("vit_digits")
INFO = PreprocessInfo(
    image_size=CONFIG.image_size, mean=CONFIG.mean, std=CONFIG.std, crop_pct=1.0, interpolation="bicubic"
)


def test_images_have_the_documented_form() -> None:
    images, labels = digits.make_split("test", 20, 0)
    assert (images.shape, images.dtype) == ((20, 64, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((20,), np.int64)
    assert set(labels) <= set(range(10))


def test_image_depends_on_its_number_alone() -> None:
    images, labels = digits.make_split("train", 40, 3)
    later, later_labels = digits.make_split("train", 7, 3, start=30)
    assert np.array_equal(images[30:37], later)
    assert np.array_equal(labels[30:37], later_labels)


@pytest.mark.parametrize("other", [("train", 1), ("test", 0)])
def test_another_seed_or_split_gives_other_images(other: tuple[str, int]) -> None:
    assert not np.array_equal(digits.make_split("train", 4, 0)[0], digits.make_split(other[0], 4, other[1])[0])


def test_splits_share_no_handwritten_digit() -> None:
    train, train_labels = digits.source_digits("train")
    test, test_labels = digits.source_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    whole, _ = digits._source()
    assert len(train) + len(test) == len(whole)
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)
    assert set(train_labels) == set(test_labels) == set(range(10))


def test_every_class_is_held_out_in_proportion() -> None:
    counts = np.bincount(digits.source_digits("test")[1])
    assert counts.min() >= 34
    assert counts.max() <= 38


def objects(image: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """Return (class, colour) of every digit on a black canvas without fragments, and the square's colour."""
    patches = image.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3).astype(np.float32)
    source, classes = digits.source_digits("test")
    found, squares = [], []
    for patch in patches[patches.any((1, 2, 3))]:
        colour, ink = patch.sum((0, 1)), patch.max(-1)
        if ink.min() == ink.max():
            squares.append(colour / np.linalg.norm(colour))
            continue
        fit = (source * ink).sum((1, 2)) / np.linalg.norm(source, axis=(1, 2))
        found.append((int(classes[fit.argmax()]), colour / np.linalg.norm(colour)))
    assert len(squares) == 1
    return found, squares[0]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw on black, without noise."""
    monkeypatch.setattr(digits, "NOISE", 0.0)
    monkeypatch.setattr(digits, "_background", lambda values: np.zeros((len(values), 3, 64, 64), np.float32))


@pytest.mark.usefixtures("plain")
def test_label_is_the_digit_of_the_squares_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "FRAGMENTS", 0)
    images, labels = digits.make_split("test", 60, 0)
    for image, label in zip(images, labels, strict=True):
        found, square = objects(image)
        likeness = sorted((float(colour @ square), number) for number, colour in found)
        assert likeness[-1][1] == label
        assert likeness[-1][0] > likeness[-2][0] + 0.01
        assert len({number for number, _ in found}) == len(found) == 4


@pytest.mark.usefixtures("plain")
def test_easiest_images_show_the_labelled_class_alone() -> None:
    images, labels = digits.make_split("test", 60, 0, difficulty=0.0)
    for image, label in zip(images, labels, strict=True):
        found, _ = objects(image)
        assert [number for number, _ in found] == [label] * 4


@pytest.mark.usefixtures("plain")
def test_difficulty_adds_fragments() -> None:
    lit = [(digits.make_split("test", 50, 0, difficulty=d)[0].max(-1) > 0).mean() for d in (0.0, 0.5, 1.0)]
    assert lit[0] < lit[1] < lit[2]


def test_fragments_are_dimmer_than_digits() -> None:
    assert digits.FRAGMENT_LIGHT[1] < digits.LIGHT[0]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="validation") as error:
        digits.make_split("validation", 1, 0)
    assert error.value.code == "data-split"


def test_missing_sklearn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._source.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(EnvironmentLackError, match="edgeprune\\[train\\]"):
        open_training_data("digits")


def test_evaluation_set_is_the_documented_one() -> None:
    dataset = open_dataset("digits", limit=6)
    images, labels = digits.make_split("test", 6, 0)
    batches = list(dataset.batches(4, INFO))
    assert [len(b[1]) for b in batches] == [4, 2]
    assert np.array_equal(np.concatenate([b[1] for b in batches]), labels)
    assert dataset.labels == [str(d) for d in range(10)]
    np.testing.assert_allclose(
        np.concatenate([b[0] for b in batches]), images.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6
    )


def test_inputs_equal_those_of_the_image_preprocessing() -> None:
    from edgeprune.data.preprocess import preprocess

    images, _ = digits.make_split("test", 3, 0)
    expected = np.stack([preprocess(Image.fromarray(image), INFO) for image in images])
    np.testing.assert_allclose(digits._inputs(images, INFO), expected, atol=1e-6)


def test_other_image_size_is_resized() -> None:
    info = INFO.model_copy(update={"image_size": (32, 32)})
    pixels, _ = next(open_dataset("digits", limit=2).batches(2, info))
    assert pixels.shape == (2, 3, 32, 32)


def test_training_epochs_continue_one_stream() -> None:
    stream = digits.DigitsStream(count=10)
    labels = [
        np.concatenate([stream.batch(i, 4, INFO, epoch=epoch, seed=5)[1] for i in range(2)]) for epoch in range(2)
    ]
    _, expected = digits.make_split("train", 20, 5)
    assert np.array_equal(labels[0], expected[:8])  # the last, smaller batch is left out
    assert np.array_equal(labels[1], expected[10:18])


def test_rows_of_a_batch_are_the_same_alone() -> None:
    stream = digits.DigitsStream()
    whole, labels = stream.batch(2, 6, INFO, epoch=1, seed=0)
    part, part_labels = stream.batch(2, 6, INFO, epoch=1, seed=0, rows=slice(2, 4))
    assert np.array_equal(whole[2:4], part)
    assert np.array_equal(labels[2:4], part_labels)


def test_shards_of_the_evaluation_set_are_its_batches() -> None:
    dataset = open_dataset("digits", limit=10)
    whole = [labels.tolist() for _, labels in dataset.batches(3, INFO)]
    shards = [[labels.tolist() for _, labels in dataset.batches(3, INFO, shard=(i, 2))] for i in range(2)]
    assert shards == [whole[0::2], whole[1::2]]
