"""Mixup and CutMix on batches. Image i is mixed with its neighbour, i + 1 for even and i - 1 for odd places.

timm mixes with the batch in reverse order; neighbours are as random, and stay in the same process when a batch is
divided.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeprune.training.recipes import Recipe

_TAG = 7919  # keeps these random numbers apart from those of the images


def mix(images: Tensor, labels: Tensor, classes: int, recipe: Recipe, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return mixed images and their targets [B, classes] float32; untouched when the recipe mixes nothing.

    One ratio, and one rectangle for CutMix, serves the whole batch and depends on (seed, step) alone. The targets
    are not smoothed; the loss does that.

    Args:
        images: [B, C, H, W]; B even when the batch is divided over processes.
        labels: [B] int64.
        classes: number of classes.
        recipe: its `mixup`, `cutmix`, `mixup_prob` and `mixup_switch`.
        seed: of the training.
        step: number of the step.

    Source: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899); batch mode of timm.
    """
    if not recipe.mixes:
        return images, labels
    targets = F.one_hot(labels, classes).float()
    rng = np.random.default_rng((seed, step, _TAG))
    cut = recipe.cutmix > 0 and (recipe.mixup == 0 or rng.random() < recipe.mixup_switch)
    alpha = recipe.cutmix if cut else recipe.mixup
    ratio = float(rng.beta(alpha, alpha))
    applied, centre = rng.random() < recipe.mixup_prob, rng.random(2)
    if not applied:
        return images, targets
    partner = neighbours(len(images)).to(images.device)
    if cut:
        top, bottom, left, right = rectangle(images.shape[-2:], ratio, centre)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        mixed = images * ratio + images[partner] * (1 - ratio)
    return mixed, targets * ratio + targets[partner] * (1 - ratio)


def neighbours(count: int) -> Tensor:
    """Return [count]: 1, 0, 3, 2, ...; a last one without neighbour is its own."""
    return (torch.arange(count) ^ 1).clamp(max=count - 1)


def rectangle(size: tuple[int, ...] | torch.Size, ratio: float, centre: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of a cut-out of about `1 - ratio` of the area, clipped to the image."""
    edges = []
    for length, at in zip(size, centre, strict=True):
        half, middle = int(length * math.sqrt(1 - ratio)) // 2, int(at * length)
        edges += [max(0, middle - half), min(length, middle + half)]
    return edges[0], edges[1], edges[2], edges[3]
