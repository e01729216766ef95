"""Quantizations of models: measured with hooks on the inputs of their linear layers, or made up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from edgeprune.models.config import ViTConfig
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization.scheme import Precision, Quantization, Range, linear_layers


def measured(model: PrunedViT, images: np.ndarray, precision: Precision = "int8") -> Quantization:
    """Return the quantization of every linear layer, with the ranges that images [B, C, H, W] give."""
    ranges: dict[str, Range] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = (float(bound) for bound in torch.aminmax(inputs[0]))
            before = ranges.get(name, (low, high))
            ranges[name] = min(low, before[0]), max(high, before[1])

        return hook

    modules = dict(model.named_modules())
    layers = linear_layers(model.config)
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.inference_mode():
            model.run(torch.from_numpy(images))
    finally:
        for handle in handles:
            handle.remove()
    return Quantization(precision, "static", frozenset(ranges), ranges)


def made_up(config: ViTConfig, precision: Precision = "int8", reach: float = 4.0) -> Quantization:
    """Return a quantization of every linear layer with the same range for all."""
    layers = linear_layers(config)
    return Quantization(precision, "static", frozenset(layers), dict.fromkeys(layers, (-reach, reach)))
