"""Image files to model inputs, once for training, evaluation, running and calibration. numpy and Pillow only.

The steps and their rounding are torchvision's `Resize(int(size / crop_pct))`, `CenterCrop(size)`,
`ToTensor()`, `Normalize(mean, std)` on Pillow images, which is how timm and DeiT evaluate. As there, the EXIF
orientation of a photo is not applied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import floor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, features

from edgeprune.errors import EdgepruneWarning, InputError
from edgeprune.runtime.manifest import PreprocessInfo

# Listed by name: Pillow also opens formats that call other programs (EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAX_ASPECT = 100  # beyond it the resized image grows without bound, and a centre crop shows nothing of it

T = TypeVar("T")


def load_image(path: Path | str) -> Image.Image:
    """Return an image file as RGB.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled to 8 bits, of an animation the first
    frame is taken. Transparency is dropped with an `EdgepruneWarning`: the colour underneath shows.

    Raises:
        InputError: `image-unreadable` when the file is missing, is no image, is cut off, or its pixels have
            no defined range (32-bit integers, floats).
    """
    path = Path(path)
    formats = [*_FORMATS, *(["WEBP"] if features.check("webp") else [])]
    try:
        with Image.open(path, formats=formats) as image:
            image.load()
            return _to_rgb(image, path)
    except FileNotFoundError as error:
        raise _unreadable(path, "there is no such file") from error
    except IsADirectoryError as error:
        raise _unreadable(path, "it is a directory") from error
    except Image.UnidentifiedImageError as error:
        raise _unreadable(path, "it is not an image, or of an unknown format") from error
    except Image.DecompressionBombError as error:
        raise _unreadable(path, f"it is too large ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises on damaged files
        raise _unreadable(path, f"it is damaged ({error})") from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(np.asarray(image), path)
    if image.mode == "F":
        raise _unreadable(path, "its pixels are floats, whose range is not defined")
    if image.has_transparency_data:
        warnings.warn(f"{path}: transparency is ignored", EdgepruneWarning, stacklevel=3)
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(values: np.ndarray, path: Path) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise _unreadable(path, "its pixels are 32-bit integers, whose range is not defined")
    return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"cannot read the image {path}: {why}",
        code="image-unreadable",
        expected="a JPEG, PNG, WebP, BMP, GIF, PPM or TIFF file with 8 bits per channel, or 16-bit grey",
        hint="open it in an image viewer to check it, and save it again as PNG",
        details={"path": str(path)},
    )


def crop_only(image: Image.Image, info: PreprocessInfo) -> Image.Image:
    """Return the part of an image the model sees, as an RGB image of `info.image_size`.

    The image is scaled until it covers `image_size / crop_pct`, rounded down, with one side exact; then the
    middle is cut out.

    Raises:
        InputError: `image-shape` when one side is more than 100 times the other; `preprocessing` when the
            interpolation is unknown.
    """
    if info.interpolation not in _FILTERS:
        raise InputError(
            f"unknown interpolation '{info.interpolation}'",
            code="preprocessing",
            expected=f"one of {', '.join(_FILTERS)}",
        )
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InputError(
            f"an image of {width}x{height} pixels is too narrow",
            code="image-shape",
            expected=f"sides that differ by a factor of at most {_MAX_ASPECT}",
            hint="crop the image first",
        )
    crop_h, crop_w = info.image_size
    cover_h, cover_w = floor(crop_h / info.crop_pct), floor(crop_w / info.crop_pct)
    if cover_h * width >= cover_w * height:  # the height decides
        size = (max(cover_w, int(cover_h * width / height)), cover_h)
    else:
        size = (cover_w, max(cover_h, int(cover_w * height / width)))
    # Not one resize with a box: Pillow rounds that differently.
    resized = image.convert("RGB").resize(size, _FILTERS[info.interpolation])
    left, top = round((size[0] - crop_w) / 2), round((size[1] - crop_h) / 2)
    return resized.crop((left, top, left + crop_w, top + crop_h))


def preprocess(image: Image.Image, info: PreprocessInfo) -> np.ndarray:
    """Return the model input [3, H, W] float32 of an image: `crop_only`, then normalised.

    Raises:
        InputError: those of `crop_only`.
    """
    pixels = np.asarray(crop_only(image, info), np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(info.mean, np.float32)) / np.asarray(info.std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_input(item: Path | str | Image.Image | np.ndarray, info: PreprocessInfo) -> np.ndarray:
    """Return the model input [3, H, W] float32 of an image file, a PIL image or a uint8 frame [H, W, 3].

    A float32 array [C, H, W] is taken for an input and returned as it is.

    Raises:
        InputError: `image-unreadable`; `image-shape`, also for an array that is neither.
    """
    if isinstance(item, np.ndarray):
        if item.dtype == np.float32 and item.ndim == 3:
            return item
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise InputError(
                f"an array of {item.dtype}{list(item.shape)} is no image",
                code="image-shape",
                expected="an RGB frame uint8 [height, width, 3], or an input float32 [channels, height, width]",
            )
        item = Image.fromarray(item)
    return preprocess(item if isinstance(item, Image.Image) else load_image(item), info)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive groups of `size` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
