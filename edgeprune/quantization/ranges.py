"""What the inputs of linear layers range over on real images, by running the float model on them.

The pruned model is the one to observe: which tokens stay shifts the ranges. Entropy and percentile ranges come from
ONNX Runtime's own histograms.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import EdgepruneError, InputError
from edgeprune.files import write_whole
from edgeprune.quantization.scheme import Range

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1  # raise it when ranges of the same key would come out different
BINS, QUANTIZED_BINS = 2048, 128
PERCENTILE = 99.99
METHODS = ("percentile", "entropy", "minmax")
Images = NDArray[np.float32]
Report = Callable[[str, float], None]


def parse_method(text: str) -> tuple[str, float]:
    """Return how ranges are chosen and the percentile: of "entropy", "minmax", "percentile" or "percentile:99.9".

    Raises:
        InputError: `calibration-method`.
    """
    name, colon, value = text.partition(":")
    try:
        percentile = float(value) if colon else PERCENTILE
    except ValueError:
        percentile = np.nan
    if name not in METHODS or (colon and name != "percentile") or not 50 < percentile <= 100:
        raise InputError(
            f"no calibration method '{text}'",
            code="calibration-method",
            expected="entropy, minmax, percentile, or percentile:99.9 with a value above 50 to 100",
        )
    return name, percentile


class _Collector(Protocol):
    def collect(self, values: Mapping[str, Images]) -> None: ...

    def ranges(self) -> dict[str, Range]: ...


class _MinMax:
    def __init__(self) -> None:
        self._seen: dict[str, Range] = {}

    def collect(self, values: Mapping[str, Images]) -> None:
        for name, array in values.items():
            low, high = self._seen.get(name, (np.inf, -np.inf))
            self._seen[name] = (min(low, float(array.min())), max(high, float(array.max())))

    def ranges(self) -> dict[str, Range]:
        return self._seen


class _Histograms:
    """ONNX Runtime's histograms, which talk to the terminal."""

    def __init__(self, method: str, percentile: float) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        self._collector = HistogramCollector(method, False, BINS, QUANTIZED_BINS, percentile, "same")

    def collect(self, values: Mapping[str, Images]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._collector.collect(values)

    def ranges(self) -> dict[str, Range]:
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._collector.compute_collection_result()
        return {name: (float(low), float(high)) for name, (low, high, *_) in found.items()}


def observe_ranges(
    models: Sequence[nn.Module],
    layers: Iterable[str],
    batches: Sequence[Images],
    method: str,
    *,
    cache: Path | None = None,
    weights: str = "",
    report: Report = lambda step, share: None,
) -> dict[str, Range]:
    """Return the range of every layer's input over some images and models.

    Args:
        models: in eval mode, of the same weights; several keep rates, say, whose ranges shall be one.
        layers: names of `nn.Linear` modules of all of them.
        batches: images [B, C, H, W] each.
        method: see `parse_method`.
        cache: folder of earlier results; the same models, images and method are not run again.
        weights: tells architectures, weights and stages apart, for the cache.
        report: called with (step, share done).

    Raises:
        InputError: `calibration-method`; `calibration` when a value is not finite.
    """
    name, percentile = parse_method(method)
    names = sorted(layers)
    entry = None if cache is None else cache / f"{_key(names, batches, (name, percentile, weights))}.json"
    if entry is not None and (known := _read(entry, names)) is not None:
        return known

    def observe(collector: _Collector, part: float, of: float) -> dict[str, Range]:
        total = len(models) * len(batches)
        for done, values in enumerate(_inputs(models, names, batches), 1):
            collector.collect(values)
            report("observing the ranges of the layers", (part + done / total) / of)
        return collector.ranges()

    if name == "minmax":
        ranges = observe(_MinMax(), 0, 1)
    elif name == "percentile":
        ranges = observe(_Histograms(name, percentile), 0, 1)
    else:  # a histogram that grows gets more bins, and the time of entropy grows with their square
        ends, histograms = observe(_MinMax(), 0, 2), _Histograms(name, percentile)
        histograms.collect({layer: np.array(ends[layer], np.float32) for layer in names})
        ranges = observe(histograms, 1, 2)
    if entry is not None:
        with contextlib.suppress(EdgepruneError, OSError):  # a cache that cannot be written costs time and nothing else
            write_whole({entry: json.dumps(ranges).encode("ascii")})
    return ranges


def _inputs(
    models: Sequence[nn.Module], layers: Sequence[str], batches: Sequence[Images]
) -> Iterator[dict[str, Images]]:
    """Yield what the layers read, model by model, batch by batch.

    Raises:
        InputError: `calibration` when a value is not finite.
    """
    import torch

    seen: dict[str, Images] = {}

    def note(layer: str, args: tuple[torch.Tensor, ...]) -> None:
        seen[layer] = args[0].numpy()

    for model in models:
        modules = dict(model.named_modules())
        hooks = [
            modules[layer].register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args)) for layer in layers
        ]
        try:
            for images in batches:
                with torch.inference_mode():
                    model(torch.from_numpy(images))
                _check_finite(seen)
                yield seen
        finally:
            for hook in hooks:
                hook.remove()


def _check_finite(values: Mapping[str, Images]) -> None:
    for layer, array in values.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"what layer {layer} reads is not finite on the calibration images",
                code="calibration",
                expected="images and weights that belong together",
                hint="check the images, and the checkpoint with `edgeprune verify` of a float32 bundle",
            )


def _key(layers: Sequence[str], batches: Sequence[Images], rest: tuple[object, ...]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, list(layers), *rest]).encode())
    for images in batches:
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _read(entry: Path, layers: Sequence[str]) -> dict[str, Range] | None:
    """Return an earlier result, None when there is none that is whole."""
    try:
        found = json.loads(entry.read_text("ascii"))
        ranges = {layer: (float(found[layer][0]), float(found[layer][1])) for layer in layers}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return ranges if np.isfinite(list(ranges.values())).all() else None
