"""Which linear layers stay float: those that cost most accuracy for the time they save, until the rest costs little."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.export.quantized_accuracy import ImageSet, Report
from edgeprune.quantization.scheme import Quantization

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

AUTO = "auto:"
PROBES = 64  # images a single layer is judged by
LEAST_GAIN = 1e-6  # of the whole gain: a layer that saves nothing is the first to stay float


def parse_keep_float(texts: Sequence[str]) -> tuple[list[str], float | None]:
    """Return the patterns of layers to keep, and the points of "auto:POINTS" if it is among them.

    Raises:
        InputError: `keep-float`.
    """
    autos = [text for text in texts if text.startswith("auto")]
    points: float | None = None
    if autos:
        try:
            points = float(autos[-1].removeprefix(AUTO))
        except ValueError:
            points = np.nan
        if len(autos) > 1 or not 0 <= points < 100:
            raise InputError(
                f"--keep-float {' '.join(autos)}",
                code="keep-float",
                expected="auto:POINTS once, points of top-1 the quantized layers may cost: auto:0.2",
            )
    return [text for text in texts if not text.startswith("auto")], points


def match_layers(patterns: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Return the layers that a pattern names, in order.

    Raises:
        InputError: `keep-float` for a pattern that names none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise InputError(
                f"no linear layer '{pattern}'",
                code="keep-float",
                expected=f"names or patterns of {layers[0]} to {layers[-1]}, such as 'blocks.0.*' or '*.mlp.fc2'",
            )
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def choose_float(
    quantized: Callable[[Quantization], PrunedViT],
    quantization: Quantization,
    model: PrunedViT,
    images: ImageSet,
    gains: Mapping[str, float],
    points: float,
    report: Report,
) -> list[str]:
    """Return the layers to keep float so that the others cost at most so many points on these images.

    Layers are ranked by what each alone does to the outputs (mean Kullback-Leibler divergence from the float model's
    classes) for the time it saves; as many of the first as are needed stay float, found by bisection.

    Args:
        quantized: returns the model with the layers of a quantization quantized.
        quantization: all layers that may be.
        model: the float model.
        images: to judge by.
        gains: what quantizing each layer saves, in any unit of time.
        points: of top-1; without labels, of the same best class as the float model.
        report: called with (step, share done).
    """
    probes, layers = images.first(PROBES), sorted(quantization.layers)
    wanted = log_softmax(logits_of(model, probes))
    least = LEAST_GAIN * sum(max(gain, 0.0) for gain in gains.values()) or 1.0
    worth = {}
    for done, layer in enumerate(layers, 1):
        one = quantized(replace(quantization, layers=frozenset({layer})))
        found = log_softmax(logits_of(one, probes))
        divergence = float((np.exp(wanted) * (wanted - found)).sum(1).mean())
        worth[layer] = divergence / max(gains[layer], least)
        report("measuring what each layer costs", done / len(layers))
    ranked = sorted(layers, key=lambda layer: -worth[layer])
    theirs = logits_of(model, images)

    def enough(count: int) -> bool:
        kept = frozenset(ranked[count:])
        return 100 * lost(logits_of(quantized(replace(quantization, layers=kept)), images), theirs, images) <= points

    low, high = 0, len(ranked)  # `high` is always enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
        report("choosing layers to keep float", 1 - (high - low) / len(ranked))
    kept_float = set(ranked[:high])
    return [layer for layer in layers if layer in kept_float]


def logits_of(model: PrunedViT, images: ImageSet) -> NDArray[np.float64]:
    """Return logits [n, classes]."""
    import torch

    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(batch)).double().numpy() for batch in images.batches()])


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return logarithms of the classes' probabilities [n, classes]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def lost(ours: NDArray[np.float64], theirs: NDArray[np.float64], images: ImageSet) -> float:
    """Return the share of images that only the float model gets right, less those that only the other does.

    Without labels the share on which both disagree, which is as large at least.
    """
    found, wanted = ours.argmax(1), theirs.argmax(1)
    if images.labels is None:
        return float((found != wanted).mean())
    return float((wanted == images.labels).mean() - (found == images.labels).mean())
