"""Compare a graph with the PyTorch reference on inputs neither has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.runtime.manifest import ParityInfo

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.pruning.model import PrunedOutput, PrunedViT

Images = NDArray[np.float32]
DRAWS = 4  # how often inputs are replaced whose selection is a tie


@dataclass(frozen=True)
class Limits:
    """What a precision must reach.

    Attributes:
        relative_error: largest error of a logit, as a share of the largest logit of the reference.
        top1_agreement: share of images with the same best class.
        kept_overlap: mean Jaccard index of the kept sets.
        tie: scores closer than this, as a share of the largest score, may change places by rounding.
    """

    relative_error: float
    top1_agreement: float
    kept_overlap: float
    tie: float


LIMITS = {"fp32": Limits(1e-4, 1.0, 1.0, 1e-5), "fp16": Limits(2e-2, 0.995, 0.95, 1e-3)}


def limits_of(precision: str) -> Limits:
    """Return the limits of a precision.

    Raises:
        InputError: `parity-precision` when none are set for it.
    """
    if precision not in LIMITS:
        raise InputError(
            f"no parity limits for precision '{precision}'",
            code="parity-precision",
            expected=f"one of {', '.join(LIMITS)}",
        )
    return LIMITS[precision]


def compare(
    run: Callable[[Images], Mapping[str, NDArray[Any]]],
    model: nn.Module,
    *,
    batch: int | tuple[int, int],
    images: int = 8,
    seed: int = 1,
    precision: str = "fp32",
    tolerance: float | None = None,
    shape: tuple[int, ...] | None = None,
) -> ParityInfo:
    """Return how well a graph agrees with the reference.

    Two tokens whose scores differ by less than rounding may change places at the edge of a selection without either
    side being wrong. Inputs with such a tie are drawn anew, a few times at most.

    Args:
        run: images [B, C, H, W] -> outputs by name, `logits` and, when exported, `kept_indices_<s>`.
        model: the reference in eval mode: a `PrunedViT`, or any module images -> logits.
        batch: images per call, or smallest and largest; both are used then.
        images: number of inputs.
        seed: of the inputs.
        precision: chooses the limits.
        tolerance: largest relative error of the logits that passes; None takes that of the precision.
        shape: (C, H, W); None takes that of the model's configuration.

    Raises:
        InputError: `parity-precision`.
    """
    limits = limits_of(precision)
    if shape is None:
        config: Any = model.config
        shape = (config.in_chans, *config.image_size)
    inputs, reference = _draw_decided(model, shape, images, seed, limits.tie)
    sizes = (batch, batch) if isinstance(batch, int) else batch
    outputs = [_run_padded(run, group, sizes[0]) for group in _groups(inputs, sizes)]
    ours = np.concatenate([out["logits"] for out in outputs]).astype(np.float64)
    theirs = reference.logits.astype(np.float64)
    error = float(np.abs(ours - theirs).max())
    names = [f"kept_indices_{s}" for s in range(len(reference.kept))]
    known = bool(names) and all(name in outputs[0] for name in names)
    kept = [np.concatenate([out[name] for out in outputs]) for name in names] if known else []
    return ParityInfo(
        images=len(inputs),
        max_abs_error=error,
        max_rel_error=error / max(float(np.abs(theirs).max()), 1e-12),
        top1_agreement=float((ours.argmax(1) == theirs.argmax(1)).mean()),
        kept_overlap=_overlap(kept, reference.kept) if known else None,
        tolerance=limits.relative_error if tolerance is None else tolerance,
    )


def failures(parity: ParityInfo, precision: str = "fp32") -> list[str]:
    """Return what a comparison fails by, in words; empty when it passes."""
    limits, found = limits_of(precision), []
    if not parity.max_rel_error <= parity.tolerance:  # NaN fails
        found.append(f"logits differ by {parity.max_rel_error:.2e} relative, the limit is {parity.tolerance:g}")
    if parity.top1_agreement < limits.top1_agreement:
        found.append(
            f"top-1 agrees on {parity.top1_agreement:.1%} of the images, the limit is {limits.top1_agreement:.1%}"
        )
    if parity.kept_overlap is not None and parity.kept_overlap < limits.kept_overlap:
        found.append(f"kept tokens overlap by {parity.kept_overlap:.2%}, the limit is {limits.kept_overlap:.0%}")
    return found


def passes(parity: ParityInfo, precision: str = "fp32") -> bool:
    """Return whether logits, best classes and kept tokens are within the limits; NaN never is."""
    return not failures(parity, precision)


def draw_images(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Images:
    """Return inputs [count, C, H, W]: every second one smooth like a photograph, the others white noise."""
    images = rng.standard_normal((count, *shape))
    frequency = np.hypot(np.fft.fftfreq(shape[1])[:, None], np.fft.rfftfreq(shape[2]))
    smooth = np.fft.irfft2(np.fft.rfft2(images[::2]) / np.maximum(frequency, 1 / max(shape[1:])), s=shape[1:])
    images[::2] = smooth / smooth.std(axis=(1, 2, 3), keepdims=True)
    return images.astype(np.float32)


def jaccard(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the overlap of two sets of token numbers, 1 for equal sets."""
    left, right = set(a.tolist()), set(b.tolist())
    return len(left & right) / len(left | right)


@dataclass(frozen=True)
class _Reference:
    """What the model computes: logits [B, classes], kept per stage [B, K], and whether a selection is a tie [B]."""

    logits: Images
    kept: list[NDArray[np.int64]]
    tied: NDArray[np.bool_]

    def take(self, rows: NDArray[np.bool_]) -> _Reference:
        return _Reference(self.logits[rows], [stage[rows] for stage in self.kept], self.tied[rows])

    def join(self, other: _Reference) -> _Reference:
        kept = [np.concatenate(pair) for pair in zip(self.kept, other.kept, strict=True)]
        logits = np.concatenate([self.logits, other.logits])
        return _Reference(logits, kept, np.concatenate([self.tied, other.tied]))


def _draw_decided(
    model: nn.Module, shape: tuple[int, ...], count: int, seed: int, tie: float
) -> tuple[Images, _Reference]:
    """Return inputs and the reference for them; ties that are left after `DRAWS` are taken as they are."""
    rng = np.random.default_rng(seed)
    inputs = draw_images(shape, count, rng)
    reference = _refer(model, inputs, tie)
    for _ in range(DRAWS - 1):
        tied = reference.tied
        if not tied.any():
            break
        drawn = draw_images(shape, count, rng)[tied]
        inputs = np.concatenate([inputs[~tied], drawn])
        reference = reference.take(~tied).join(_refer(model, drawn, tie))
    return inputs, reference


def _refer(model: nn.Module, images: Images, tie: float) -> _Reference:
    import torch

    from edgeprune.pruning.model import PrunedViT

    with torch.inference_mode():
        x = torch.from_numpy(images)
        if not isinstance(model, PrunedViT):
            return _Reference(model(x).float().numpy(), [], np.zeros(len(images), bool))
        output = model.run(x)
    kept = [stage.numpy() for stage in output.kept]
    return _Reference(output.logits.numpy(), kept, _find_ties(model, output, tie))


def _find_ties(model: PrunedViT, output: PrunedOutput, tie: float) -> NDArray[np.bool_]:
    """Return for each image whether a stage's choice comes within `tie` of another one."""
    tied = np.zeros(len(output.logits), bool)
    for stage, scores, valid in zip(model.stages, output.scores, output.valid, strict=True):
        tied |= (stage.selector.margin(scores, valid, model.scorer_module(stage)) <= tie).numpy()
    return tied


def _groups(images: Images, batch: tuple[int, int]) -> Iterator[Images]:
    """Yield the images in groups: one of the smallest batch, the rest in the largest."""
    yield images[: batch[0]]
    for start in range(batch[0], len(images), batch[1]):
        yield images[start : start + batch[1]]


def _run_padded(
    run: Callable[[Images], Mapping[str, NDArray[Any]]], images: Images, smallest: int
) -> dict[str, NDArray[Any]]:
    """Run a group; copies of its last image fill up one that is smaller than the smallest batch."""
    missing = max(smallest - len(images), 0)
    outputs = run(np.concatenate([images, np.repeat(images[-1:], missing, 0)]))
    return {name: value[: len(images)] for name, value in outputs.items()}


def _overlap(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> float:
    """Return the mean Jaccard index of the kept sets over images and stages."""
    pairs = zip(ours, theirs, strict=True)
    return float(np.mean([jaccard(a, b) for stages in pairs for a, b in zip(*stages, strict=True)]))
