from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from edgeprune.cli import parse
from edgeprune.errors import InputError


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("224x320", (224, 320)), ("96,64", (96, 64))])
def test_image_size_is_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert parse.ImageSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["0", "224x", "x224", "-1", "big", "1x2x3"])
def test_image_size_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="224x320"):
        parse.ImageSize().convert(text, None, None)


@pytest.mark.parametrize(("text", "batch"), [("1", (1, 1)), ("8", (8, 8)), ("1:8", (1, 8))])
def test_batch_is_smallest_and_largest(text: str, batch: tuple[int, int]) -> None:
    assert parse.BatchRange().convert(text, None, None) == batch


@pytest.mark.parametrize("text", ["0", "8:1", ":", "1:", "a", "0:4"])
def test_batch_refuses_what_is_no_range(text: str) -> None:
    with pytest.raises(click.BadParameter, match="1:8"):
        parse.BatchRange().convert(text, None, None)


def test_key_values_keep_text_and_take_hyphens() -> None:
    assert parse.key_values(["a-b=c=d", " x = 1"], "--method-option") == {"a_b": "c=d", "x": "1"}


@pytest.mark.parametrize("texts", [["fuse"], ["=1"], ["a=1", "a=2"]])
def test_key_values_refuse_what_is_no_pair(texts: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        parse.key_values(texts, "--method-option")
    assert raised.value.code == "key-value"


def test_model_options_get_the_types_of_the_fields() -> None:
    values = parse.model_options(
        ["reg_tokens=4", "distilled=TRUE", "global-pool=avg", "mlp_ratio=2.5", "mean=0.1,0.2,0.3"]
    )
    assert values == {
        "reg_tokens": 4,
        "distilled": True,
        "global_pool": "avg",
        "mlp_ratio": 2.5,
        "mean": (0.1, 0.2, 0.3),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nope=1", "reg_tokens"),
        ("name=x", "reg_tokens"),
        ("depth=many", "a whole number"),
        ("distilled=maybe", "true or false"),
        ("std=1", "three numbers"),
        ("image_size=224", "--image-size"),
    ],
)
def test_model_options_say_what_they_expect(text: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        parse.model_options([text])
    assert raised.value.code == "model-option"
    assert words in str(raised.value)


@pytest.mark.parametrize("text", ["cat\ndog\n\n", json.dumps(["cat", "dog"]), "\n cat\ndog"[1:]])
def test_labels_are_lines_or_a_json_list(tmp_path: Path, text: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_text(text)
    assert parse.read_labels(file) == ["cat", "dog"]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"[", b"a\n\nb", b"\xff\xfe", None])
def test_labels_refuse_other_files(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "labels.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        parse.read_labels(file)
    assert raised.value.code == "labels-unreadable"
