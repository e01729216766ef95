"""Quantizing exports through the command line: wrong images and options, and what a good one shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import DIGITS, Cli, write_image
from tests.cli.test_bad_input import assert_nothing_written, assert_refused

EXPORT = ("export", *DIGITS, "--model-option", "depth=2", "--target", "ort-cpu-int8", "--no-verify")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return where a bundle would go; its parent is otherwise empty."""
    parent = tmp_path / "out"
    parent.mkdir()
    return parent / "bundle"


def fill(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def empty_class(folder: Path) -> None:
    fill(folder / "cat", 2)
    (folder / "dog").mkdir()


def broken(folder: Path) -> None:
    file = write_image(fill(folder, 2) / "cut.png", "RGB")
    file.write_bytes(file.read_bytes()[:200])


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda folder: None, "data-not-found", "no directory"),
    "a file": (lambda folder: folder.write_text("x"), "data-not-found", "no directory"),
    "empty": (lambda folder: folder.mkdir(), "data-empty", "no image"),
    "one image": (lambda folder: fill(folder, 1), "calibration", "too few"),
    "one class": (lambda folder: fill(folder / "cat", 3), "calibration", "of one class"),
    "empty class": (empty_class, "data-empty", "'dog'"),
    "unreadable": (broken, "image-unreadable", "cut.png"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_calibration_images(cli: Cli, tmp_path: Path, out: Path, kind: str) -> None:
    make, code, words = WRONG[kind]
    make(tmp_path / "images")
    result = cli(*EXPORT, "--calibration", f"imagefolder:{tmp_path / 'images'}", "-o", out)
    assert_refused(result, 2, code, words, "expected:")
    assert_nothing_written(out)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--calibration", "digit"), "data-unknown"),
        (("--calibration-method", "mean"), "calibration-method"),
        (("--keep-float", "*"), "keep-float"),
        (("--keep-float", "head"), "keep-float"),
        (("--keep-float", "auto:0.2"), "keep-float"),
        (("--max-drop", "1"), "max-drop"),
        (("--weight-bits", "4"), "weight-bits"),
        (("--target", "ort-cpu", "--quantization", "static"), "quantization"),
        (("--target", "ort-cpu", "--calibration", "digits"), "calibration"),
        (("--target", "trt-int8", "--quantization", "dynamic"), "quantization"),
    ],
)
def test_wrong_options(cli: Cli, out: Path, options: tuple[str, ...], code: str) -> None:
    assert_refused(cli(*EXPORT, *options, "-o", out), 2, code, "expected:")
    assert_nothing_written(out)


def test_max_drop_is_exit_code_1_and_leaves_nothing(cli: Cli, tmp_path: Path, out: Path) -> None:
    images = fill(tmp_path / "images", 40)
    result = cli(
        *EXPORT, "--method", "evit", "--keep-rate", "0.5", "--calibration", f"imagefolder:{images}",
        "--quantization", "static", "--calibration-method", "percentile:50.001", "--max-drop", "0", "-o", out,
    )  # fmt: skip
    assert_refused(result, 1, "max-drop", "points of agreement with the float model on 20 images", "--max-drop 0")
    assert_nothing_written(out)


def test_good_export_runs_and_repeats_from_the_cache(cli: Cli, tmp_path: Path, out: Path) -> None:
    images = fill(tmp_path / "images", 6)
    export = (*EXPORT, "--calibration", f"imagefolder:{images}", "--quantization", "static", "-o", out, "--json")
    first = cli(*export)
    assert first.code == 0, first.err
    made = list((tmp_path / "cache" / "edgeprune" / "ranges").iterdir())
    assert len(made) == 1
    again = cli(*export, "--overwrite")
    assert again.code == 0, again.err
    ranges = [one.json["results"]["manifest"]["quantization"]["ranges"] for one in (first, again)]
    assert ranges[0] == ranges[1] and ranges[0]["images"] == 3
    assert list((tmp_path / "cache" / "edgeprune" / "ranges").iterdir()) == made
    ran = cli("run", out, images / "0.png", "--json")
    assert ran.code == 0 and len(ran.json["results"]["images"]) == 1
    verified = cli("verify", out, "--json")
    assert verified.code == 0, verified.err
