"""Which linear layers are quantized and to what. numpy only.

Weights are symmetric with a scale per output channel, activations have one scale per tensor (Jacob et al., 2018,
https://arxiv.org/abs/1712.05877; Wu et al., 2020, https://arxiv.org/abs/2004.09602). Scores and what compares them,
normalisation, softmax, the attention products, the patch embedding and the classifier stay floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeprune.models.config import ViTConfig
from edgeprune.runtime.manifest import QuantizationInfo

Precision = Literal["int8", "fp8"]
Scheme = Literal["dynamic", "static"]
Range = tuple[float, float]  # least and largest value of a tensor

PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
PORTABLE_BITS, DOT_PRODUCT_BITS = 7, 8  # of weights; see `Quantization`
FP8_MAX = 448.0  # of float8e4m3fn
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16, in which some engines hold scales


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a network are quantized.

    Attributes:
        precision: of weights and activations.
        scheme: "dynamic": a layer's input is measured as it runs; "static": `ranges` were measured beforehand.
        layers: the quantized ones, named as in the state_dict without `.weight`: "blocks.3.attn.qkv".
        ranges: of the input of every layer, for the static scheme.
        weight_bits: of integer weights. 7 leave the sum of two products within 16 bits, which processors without
            dot-product instructions need to be exact; 8 are for those that have them.
    """

    precision: Precision
    scheme: Scheme
    layers: frozenset[str]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    weight_bits: int = 8


def portable(config: ViTConfig) -> Quantization:
    """Return the quantization of every layer that needs no images and is exact on every processor."""
    return Quantization("int8", "dynamic", frozenset(linear_layers(config)), weight_bits=PORTABLE_BITS)


def linear_layers(config: ViTConfig) -> list[str]:
    """Return the names of the layers that can be quantized, in the order they run."""
    return [f"blocks.{index}.{part}" for index in range(config.depth) for part in PARTS]


def quantization_of(info: QuantizationInfo, config: ViTConfig) -> Quantization:
    """Return how the pruned graph of a bundle is quantized, as its manifest tells."""
    layers = frozenset(linear_layers(config)) - set(info.kept_float)
    ranges = {} if info.ranges is None else info.ranges.values
    return Quantization(info.precision, info.scheme, layers, ranges, info.weight_bits)


def layer_of(key: str) -> str:
    """Return the layer a weight or a slice of one belongs to: "blocks.3.attn.qkv" of "blocks.3.attn.qkv.k"."""
    stem, _, last = key.rpartition(".")
    return stem if last in ("q", "k", "v") else key


def quantize_weight(weight: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers [out, in] and their scale [out], so that weight is about integers * scale.

    Args:
        weight: [out, in].
        bits: of the integers, sign included; they are symmetric about zero.
    """
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(axis=1) / top, SMALLEST_SCALE).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -top, top).astype(np.int8), scale


def unsigned_activation(values: Range) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of 8-bit unsigned integers that cover a range and zero."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    scale = np.float32(max((high - low) / 255, SMALLEST_SCALE))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def signed_scale(values: Range, precision: Precision = "int8") -> np.float32:
    """Return the scale of symmetric 8-bit integers or float8e4m3fn that cover a range."""
    top = 127 if precision == "int8" else FP8_MAX
    return np.float32(max(max(abs(values[0]), abs(values[1])) / top, SMALLEST_SCALE))
