"""Compare a graph with the PyTorch reference on inputs neither has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.runtime.manifest import ParityInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgeprune.pruning.model import PrunedOutput, PrunedViT
    from edgeprune.runtime.session import Session

Images = NDArray[np.float32]
DRAWS = 4  # rounds of inputs; what is undecided after the last is not replaced


@dataclass(frozen=True)
class Limits:
    """What a precision must reach.

    Attributes:
        relative_error: largest error of a logit, as a share of the largest logit of the reference.
        top1_agreement: share of images with the same best class.
        kept_overlap: mean Jaccard index of the kept sets.
        tie: scores closer than this, as a share of `scale_at`, may change places by rounding.
        loose: largest error and least top-1 agreement where rounding decides what every image keeps; None where that
            must not be.
    """

    relative_error: float
    top1_agreement: float
    kept_overlap: float
    tie: float
    loose: tuple[float, float] | None = None


LIMITS = {
    "fp32": Limits(1e-4, 1.0, 1.0, 1e-5),
    "fp16": Limits(2e-2, 0.995, 0.95, 1e-3, loose=(0.5, 0.5)),
    "bf16": Limits(1e-1, 0.98, 0.8, 1e-2, loose=(0.5, 0.5)),
    # By the shipped checkpoints, drawn inputs, ranges of digits: decided inputs differ by up to 0.15 in int8 and 0.27
    # in fp8; with one layer's input scaled by two by 0.4 to 1.1, but by less where most inputs are undecided.
    "int8": Limits(0.3, 0.95, 0.9, 2e-2, loose=(0.7, 0.8)),
    "fp8": Limits(0.4, 0.95, 0.8, 5e-2, loose=(1.2, 0.8)),
}


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
    model: nn.Module | Filled,
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
    side being wrong, and so may two classes. An input on which the sides disagree and which is such a tie is set aside
    as undecided and replaced, a few times at most. A disagreement without a tie counts, and so does an agreement with
    one.

    Args:
        run: images [B, C, H, W] -> outputs by name: `logits` and, where the graph has them, `kept_indices_<s>`,
            `kept_counts` and `overflow`.
        model: the reference in eval mode: a `PrunedViT`, any module images -> logits, or `Filled`.
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
        assert not isinstance(model, Filled)
        config: Any = model.config
        shape = (config.in_chans, *config.image_size)
    sizes = (batch, batch) if isinstance(batch, int) else batch
    bound = limits.relative_error if tolerance is None else tolerance
    rng = np.random.default_rng(seed)
    inputs = draw_images(shape, images, rng)
    decided: list[_Trial] = []
    undecided: list[_Trial] = []
    for _ in range(DRAWS):
        trials = _try_all(run, model, inputs, sizes, limits.tie, bound)
        aside = np.array([trial.tied and not trial.agrees(bound) for trial in trials])
        for trial, is_aside in zip(trials, aside, strict=True):
            (undecided if is_aside else decided).append(trial)
        if not aside.any():
            break
        inputs = draw_images(shape, images, rng)[: len(trials)][aside]
    return _summarize(decided, undecided, bound)


def compare_session(session: Session, model: nn.Module, **options: Any) -> ParityInfo:
    """Return how well a session agrees with the model its bundle was made of; `options` as in `compare`."""
    manifest = session.manifest
    adaptive = manifest.adaptive

    def run(images: Images) -> dict[str, NDArray[Any]]:
        result = session.run(images)
        outputs = {"logits": result.logits, "kept_counts": result.kept_counts, "overflow": result.overflow}
        outputs |= {f"kept_indices_{s}": kept for s, kept in enumerate(result.kept)}
        return {name: value for name, value in outputs.items() if value is not None}

    filled = adaptive is not None and adaptive.fill == "next-best"
    return compare(
        run,
        Filled(model, [tuple(b.capacities) for b in adaptive.buckets]) if adaptive is not None and filled else model,
        batch=manifest.batch,
        precision=manifest.precision,
        shape=tuple(session.sides),
        **options,
    )


class Filled:
    """The reference for buckets whose free slots hold the next best tokens: a model of the same weights per bucket.

    Args:
        model: a `PrunedViT`.
        buckets: slots of each stage, nested.
    """

    def __init__(self, model: Any, buckets: Sequence[tuple[int, ...]]) -> None:
        from edgeprune.pruning.adaptive import with_capacities

        self.slots = [stage.counts.kept for stage in model.stages]
        self.models = [model.with_stages(with_capacities(model.stages, b, fill=True)) for b in buckets]

    def run(self, image: torch.Tensor) -> tuple[PrunedViT, PrunedOutput]:
        """Return the model of the smallest bucket that holds an image [1, C, H, W], and what it gives."""
        for model in self.models:
            output = model.run(image)
            if not output.overflow.any() or model is self.models[-1]:
                return model, output
        raise AssertionError("the last bucket holds every image")


def failures(parity: ParityInfo, precision: str = "fp32") -> list[str]:
    """Return what a comparison fails by, in words; empty when it passes."""
    limits, found = limits_of(precision), []
    if parity.images == 0 and limits.loose is not None:
        error, top1 = limits.loose
        if not (parity.max_rel_error <= error and parity.top1_agreement >= top1):
            found.append(
                f"rounding decides what every image keeps, and still logits differ by {parity.max_rel_error:.2e} "
                f"relative and top-1 agrees on {parity.top1_agreement:.1%}, the limits are {error:g} and {top1:.0%}"
            )
        return found
    if not parity.max_rel_error <= parity.tolerance:  # NaN fails
        found.append(f"logits differ by {parity.max_rel_error:.2e} relative, the limit is {parity.tolerance:g}")
    if parity.top1_agreement < limits.top1_agreement:
        found.append(
            f"top-1 agrees on {parity.top1_agreement:.1%} of the images, the limit is {limits.top1_agreement:.1%}"
        )
    if parity.kept_overlap is not None and parity.kept_overlap < limits.kept_overlap:
        found.append(f"kept tokens overlap by {parity.kept_overlap:.2%}, the limit is {limits.kept_overlap:.0%}")
    if parity.counts_agreement is not None and parity.counts_agreement < 1:
        found.append(f"token counts are the same for {parity.counts_agreement:.1%} of the images, the limit is 100%")
    if parity.undecided > parity.images and limits.loose is None:
        found.append(
            f"{parity.undecided} images disagreed at a tie of their selection, more than the {parity.images} others"
        )
    return found


def remark(parity: ParityInfo) -> str | None:
    """Return what to know of a comparison that passes: that most images could not be decided."""
    if parity.undecided <= parity.images:
        return None
    total = parity.images + parity.undecided
    overlap = "" if parity.kept_overlap is None else f", kept tokens overlap by {parity.kept_overlap:.0%}"
    of = "these" if parity.images == 0 else "the others"
    return (
        f"rounding decides which tokens {parity.undecided} of {total} images keep; on {of} top-1 agrees with PyTorch "
        f"on {parity.top1_agreement:.0%}{overlap}: compare accuracies with `edgeprune evaluate`"
    )


def passes(parity: ParityInfo, precision: str = "fp32") -> bool:
    """Return whether logits, best classes, kept tokens and counts are within the limits; NaN never is."""
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
    return len(left & right) / len(left | right) if left | right else 1.0


@dataclass(frozen=True)
class _Trial:
    """What both sides say of one image.

    Attributes:
        ours, theirs: logits [classes] float64 of the graph and of the reference.
        overlaps: per stage the Jaccard index of the kept sets; empty when the graph does not tell them.
        same_counts: whether counts and overflow are equal; None when the graph does not tell them.
        tied: a stage's choice comes within `tie` of another one, or the best class within rounding of the second.
    """

    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    overlaps: tuple[float, ...]
    same_counts: bool | None
    tied: bool

    @property
    def same_class(self) -> bool:
        """Whether both sides give the same best class."""
        return bool(self.ours.argmax() == self.theirs.argmax())

    @property
    def error(self) -> float:
        """Largest difference of a logit."""
        return float(np.abs(self.ours - self.theirs).max())

    def agrees(self, tolerance: float) -> bool:
        """Return whether kept sets and counts are the same and the logits within the tolerance; NaN never is."""
        same = all(overlap == 1 for overlap in self.overlaps) and self.same_counts is not False
        return same and self.same_class and self.error <= tolerance * float(np.abs(self.theirs).max())


def _summarize(decided: list[_Trial], undecided: list[_Trial], tolerance: float) -> ParityInfo:
    """Return the figures of the decided images; when there is none, of the others, so that they can be looked at."""
    trials = decided or undecided
    error = float(np.max([trial.error for trial in trials]))
    overlaps = [overlap for trial in trials for overlap in trial.overlaps]
    same = [trial.same_counts for trial in trials if trial.same_counts is not None]
    return ParityInfo(
        images=len(decided),
        max_abs_error=error,
        max_rel_error=error / max(float(np.max([np.abs(trial.theirs).max() for trial in trials])), 1e-12),
        top1_agreement=float(np.mean([trial.same_class for trial in trials])),
        kept_overlap=float(np.mean(overlaps)) if overlaps else None,
        counts_agreement=float(np.mean(same)) if same else None,
        undecided=len(undecided),
        tolerance=tolerance,
    )


def _try_all(
    run: Callable[[Images], Mapping[str, NDArray[Any]]],
    model: nn.Module | Filled,
    images: Images,
    batch: tuple[int, int],
    tie: float,
    tolerance: float,
) -> list[_Trial]:
    """Run both sides on images, the graph in groups of its batch sizes."""
    trials: list[_Trial] = []
    for group in _groups(images, batch):
        padded = np.concatenate([group, np.repeat(group[-1:], max(batch[0] - len(group), 0), 0)])
        theirs = _refer(model, group, padded, tie)
        theirs = replace(theirs, tied=theirs.tied | _same_best(theirs.logits, tolerance))
        trials += _pair(run(padded), theirs, len(group))
    return trials


def _pair(ours: Mapping[str, NDArray[Any]], theirs: _Reference, count: int) -> list[_Trial]:
    """Put the first `count` images of both sides together."""
    names = [f"kept_indices_{s}" for s in range(len(theirs.kept))]
    known = all(name in ours for name in names)
    told = [(ours[key], value) for key, value in theirs.numbers.items() if key in ours]
    return [
        _Trial(
            ours["logits"][i].astype(np.float64),
            theirs.logits[i].astype(np.float64),
            tuple(jaccard(ours[n][i], kept[i]) for n, kept in zip(names, theirs.kept, strict=True)) if known else (),
            all(np.array_equal(a[i], b[i]) for a, b in told) if told else None,
            bool(theirs.tied[i]),
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class _Reference:
    """What the model computes.

    Attributes:
        logits: [B, classes].
        kept: per stage [B, K].
        numbers: `kept_counts` [B, S] and `overflow` [B], as the graph would give them; empty without stages.
        tied: [B] whether a selection is a tie.
    """

    logits: Images
    kept: list[NDArray[np.int64]]
    numbers: dict[str, NDArray[np.int64]]
    tied: NDArray[np.bool_]


def _refer(model: nn.Module | Filled, group: Images, padded: Images, tie: float) -> _Reference:
    """Return the reference for a group; when images depend on their batch, for the padded one the graph runs."""
    import torch

    from edgeprune.pruning.model import PrunedViT

    if isinstance(model, Filled):
        return _refer_filled(model, group, tie)
    with torch.inference_mode():
        if not isinstance(model, PrunedViT):
            return _Reference(model(torch.from_numpy(group)).float().numpy(), [], {}, np.zeros(len(group), bool))
        output = model.run(torch.from_numpy(group if model.exact_in_batch else padded))
        tied = _find_ties(model, output, tie)
    if not model.exact_in_batch:
        tied[:] = tied.any()
    numbers = {}
    if output.counts:
        numbers["kept_counts"] = torch.stack(output.counts, 1).numpy()
        numbers["overflow"] = output.overflow.long().numpy()
    return _Reference(output.logits.numpy(), [stage.numpy() for stage in output.kept], numbers, tied)


def _refer_filled(filled: Filled, group: Images, tie: float) -> _Reference:
    """Return the reference image by image; kept sets are padded to the slots, as a session gives them."""
    import torch

    logits, ties, counts, overflow = [], [], [], []
    kept: list[list[NDArray[np.int64]]] = [[] for _ in filled.slots]
    with torch.inference_mode():
        for image in torch.from_numpy(group).split(1):
            model, output = filled.run(image)
            wanted, held = torch.cat(output.counts).numpy(), [stage.counts.kept for stage in model.stages]
            logits.append(output.logits.numpy())
            ties.append(_find_ties(model, output, tie))
            counts.append(np.maximum(wanted, held))
            overflow.append(int((wanted > filled.slots).any()))
            for stage, ids, width in zip(kept, output.kept, filled.slots, strict=True):
                stage.append(np.pad(ids.numpy(), ((0, 0), (0, width - ids.shape[1])), constant_values=-1))
    numbers = {"kept_counts": np.stack(counts), "overflow": np.array(overflow)}
    return _Reference(np.concatenate(logits), [np.concatenate(k) for k in kept], numbers, np.concatenate(ties))


def _find_ties(model: PrunedViT, output: PrunedOutput, tie: float) -> NDArray[np.bool_]:
    """Return for each image whether a stage's choice comes within `tie` of another one."""
    tied = np.zeros(len(output.logits), bool)
    for stage, scores, valid in zip(model.stages, output.scores, output.valid, strict=True):
        tied |= (stage.selector.margin(scores, valid, model.scorer_module(stage)) <= tie).numpy()
    return tied


def _same_best(logits: Images, tolerance: float) -> NDArray[np.bool_]:
    """Return for each image whether the two best of its classes change places when each logit is off by so much."""
    if logits.shape[1] < 2:
        return np.zeros(len(logits), bool)
    second, best = np.partition(logits, -2, axis=1)[:, -2:].T
    return best - second <= 2 * tolerance * np.abs(logits).max(axis=1)


def _groups(images: Images, batch: tuple[int, int]) -> Iterator[Images]:
    """Yield the images in groups: one of the smallest batch, the rest in the largest."""
    yield images[: batch[0]]
    for start in range(batch[0], len(images), batch[1]):
        yield images[start : start + batch[1]]
