"""Classifies image files with a Triton server. `edgeprune serve-repo` puts this file into a model repository.

pip install 'tritonclient[grpc]' numpy pillow
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ABOUT = Path(__file__).resolve().with_name("edgeprune.json")


def to_input(image: Image.Image, info: Mapping[str, Any]) -> np.ndarray:
    """Return the model input [3, H, W] float32 of an image: resized to cover, cut out, normalised.

    Args:
        image: any.
        info: `preprocessing` of edgeprune.json.
    """
    crop_h, crop_w = info["image_size"]
    cover_h, cover_w = floor(crop_h / info["crop_pct"]), floor(crop_w / info["crop_pct"])
    width, height = image.size
    if cover_h * width >= cover_w * height:  # the height decides
        size = (max(cover_w, int(cover_h * width / height)), cover_h)
    else:
        size = (cover_w, max(cover_h, int(cover_w * height / width)))
    resized = image.convert("RGB").resize(size, Image.Resampling[info["interpolation"].upper()])
    left, top = round((size[0] - crop_w) / 2), round((size[1] - crop_h) / 2)
    cropped = resized.crop((left, top, left + crop_w, top + crop_h))
    pixels = np.asarray(cropped, np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(info["mean"], np.float32)) / np.asarray(info["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the server for each image and print its classes."""
    import tritonclient.grpc as triton

    about = json.loads(ABOUT.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Classify image files with a Triton server.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server")
    parser.add_argument("--model", default=about["models"][0], choices=about["models"])
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    options = parser.parse_args(arguments)
    client = triton.InferenceServerClient(options.url)
    for path in options.images:
        with Image.open(path) as image:
            batch = to_input(image, about["preprocessing"])[None]
        tensor = triton.InferInput("images", list(batch.shape), "FP32")
        tensor.set_data_from_numpy(batch)
        logits = client.infer(options.model, [tensor]).as_numpy("logits")[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[: options.top]
        names = about["labels"] or list(map(str, range(len(shares))))
        found = ", ".join(f"{names[c]} {shares[c]:.3f}" for c in best)
        sys.stdout.write(f"{path}: {found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
