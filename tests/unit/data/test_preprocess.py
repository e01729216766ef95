"""Image files to inputs."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune.data.preprocess import batches, crop_only, load_image, preprocess
from edgeprune.errors import EdgepruneWarning, InputError
from edgeprune.runtime.manifest import PreprocessInfo


def make_info(**fields: Any) -> PreprocessInfo:
    values = {
        "image_size": (224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    return PreprocessInfo(**{**values, **fields})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def torchvision_eval(image: Image.Image, info: PreprocessInfo) -> np.ndarray:
    """torchvision's Resize(int), CenterCrop, ToTensor and Normalize, step by step as its functional module does."""
    (side, _), filters = info.image_size, Image.Resampling
    size = int(side / info.crop_pct)
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), filters[info.interpolation.upper()])
    top, left = int(round((new_h - side) / 2.0)), int(round((new_w - side) / 2.0))  # noqa: RUF046
    image = image.crop((left, top, left + side, top + side))
    tensor = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (info.mean, info.std))
    return (tensor - mean) / std


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (224, 224), (257, 256), (100, 61), (1600, 333)])
@pytest.mark.parametrize("fields", [{}, {"crop_pct": 0.9}, {"crop_pct": 1.0, "interpolation": "bilinear"}])
def test_preprocess_equals_torchvision_bit_for_bit(size: tuple[int, int], fields: dict[str, Any]) -> None:
    info = make_info(**fields)
    np.testing.assert_array_equal(preprocess(noise(*size), info), torchvision_eval(noise(*size), info))


def test_preprocess_returns_contiguous_float32_channels_first() -> None:
    values = preprocess(noise(30, 20), make_info(image_size=(16, 24)))
    assert (values.shape, values.dtype, values.flags.c_contiguous) == ((3, 16, 24), np.float32, True)


def test_preprocess_normalises_each_channel() -> None:
    values = preprocess(Image.new("RGB", (300, 300), (255, 0, 51)), make_info())
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(values[:, 5, 7], expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]),
)
def test_crop_lies_inside_the_image_for_any_size(width: int, height: int, target: tuple[int, int], crop: float) -> None:
    white = Image.new("RGB", (width, height), "white")
    info = make_info(image_size=target, crop_pct=crop, interpolation="bilinear")
    cut = np.asarray(crop_only(white, info))
    assert cut.shape == (*target, 3)
    assert cut.min() == 255  # Pillow pads a crop outside the image with black


def test_crop_keeps_the_aspect_when_the_target_is_not_square() -> None:
    image = Image.new("RGB", (400, 400), "black")
    image.paste("white", (100, 100, 300, 300))
    cut = np.asarray(crop_only(image, make_info(image_size=(100, 200), crop_pct=1.0, interpolation="nearest")))[..., 0]
    assert (cut > 128).sum(0).max() == 100  # the middle half of 400 rows, scaled by a half
    assert (cut > 128).sum(1).max() == 100


def test_crop_refuses_an_unknown_interpolation() -> None:
    with pytest.raises(InputError, match="magic") as caught:
        crop_only(noise(8, 8), make_info(interpolation="magic"))
    assert caught.value.code == "preprocessing"


def test_crop_refuses_a_sliver() -> None:
    with pytest.raises(InputError, match="1x50000") as caught:
        crop_only(Image.new("RGB", (1, 50_000)), make_info())
    assert caught.value.code == "image-shape"


def load_quietly(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_image(path)


@pytest.mark.parametrize(
    ("mode", "fill", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 32896, "png", (128, 128, 128)),
        ("I;16", 32896, "tiff", (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("RGB", (10, 20, 30), "bmp", (10, 20, 30)),
        ("RGB", (10, 20, 30), "ppm", (10, 20, 30)),
    ],
)
def test_load_converts_to_rgb(tmp_path: Path, mode: str, fill: Any, suffix: str, expected: tuple[int, ...]) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (4, 4), fill).save(path)
    image = load_quietly(path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == expected


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif"])
def test_load_reads_lossy_formats_nearly(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    pixel = load_quietly(tmp_path / f"a.{suffix}").getpixel((8, 8))
    np.testing.assert_allclose(pixel, (200, 100, 50), atol=8)  # type: ignore[arg-type]


def test_load_reads_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(load_quietly(tmp_path / "a.jpg").getpixel((8, 8)), (255, 0, 0), atol=6)  # type: ignore[arg-type]


def test_load_reads_16_bit_colour(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixel = struct.pack(">3H", 65535, 32896, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(raw + chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + chunk(b"IEND", b""))
    assert load_quietly(tmp_path / "a.png").getpixel((0, 0)) == (255, 128, 0)


def test_load_converts_a_palette(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    image.save(tmp_path / "a.png")
    assert load_quietly(tmp_path / "a.png").getpixel((0, 0)) == (12, 34, 56)


def test_load_takes_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("mode", "fill", "expected"), [("RGBA", (9, 8, 7, 3), (9, 8, 7)), ("LA", (9, 3), (9, 9, 9))])
def test_load_drops_alpha_with_a_warning(tmp_path: Path, mode: str, fill: Any, expected: tuple[int, ...]) -> None:
    Image.new(mode, (4, 4), fill).save(tmp_path / "a.png")
    with pytest.warns(EdgepruneWarning, match=r"a\.png: transparency is ignored"):
        image = load_image(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == expected


def test_load_drops_the_transparent_colour_of_a_palette_with_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    image.save(tmp_path / "a.png", transparency=b"\xff\x10")
    with pytest.warns(EdgepruneWarning, match="transparency"):
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (12, 34, 56)


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not an image"),
        (b"hello, no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (saved(noise(64, 64), "PNG")[:2000], "damaged"),
        (saved(noise(64, 64), "JPEG")[:2000], "damaged"),
        (saved(noise(64, 64), "BMP")[:2000], "damaged"),
        (saved(noise(64, 64), "TIFF")[:2000], "damaged|not an image"),
        (saved(noise(64, 64), "WEBP")[:500], "damaged|not an image"),
        (saved(noise(64, 64), "GIF")[:20], "damaged|not an image"),
        (saved(noise(8, 8), "PNG").replace(b"IDAT", b"XDAT"), "not an image"),
        (b"P6 200000 200000 255\n", "too large"),
        (saved(Image.new("F", (4, 4)), "TIFF"), "floats"),
        (saved(Image.new("I", (4, 4), 1 << 20), "TIFF"), "32-bit integers"),
    ],
)
def test_load_refuses_what_is_no_readable_image(tmp_path: Path, raw: bytes, why: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=why) as caught:
        load_image(path)
    assert caught.value.code == "image-unreadable"
    assert str(path) in caught.value.message
    assert caught.value.expected


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_load_refuses_what_is_no_file(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(tmp_path / "absent.png" if kind == "missing" else tmp_path)
    assert caught.value.code == "image-unreadable"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_load_raises_nothing_else_on_damaged_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    raw = bytearray(saved(noise(12, 9), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(path).mode == "RGB"
        except InputError as error:
            assert error.code == "image-unreadable"  # noqa: PT017


def test_batches_cover_everything_once_in_order() -> None:
    assert [list(b) for b in batches([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
    assert list(batches([], 3)) == []
