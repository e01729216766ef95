"""What the runs of an adaptive bundle took, by what their images kept: pure functions of a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgeprune.bench import stats
from edgeprune.bench.stats import Percentile
from edgeprune.errors import InputError
from edgeprune.runtime.manifest import AdaptiveInfo, CalibrationInfo
from edgeprune.runtime.router import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.integer]

MIXED = "mixed"
QUARTILES = (0.25, 0.5, 0.75)


class Run(NamedTuple):
    """One run inside a measured pass.

    Attributes:
        wall_s: seconds of the call.
        trace: where they went in a bundle with buckets.
        counts: [B, S] tokens the images kept.
        buckets: [B] where they ended, None in a bundle without.
    """

    wall_s: float
    trace: Trace
    counts: Numbers
    buckets: Numbers | None


@dataclass(frozen=True)
class RunGroup:
    """Runs whose images ended in the same bucket, or in the same quartile of the tokens kept.

    Attributes:
        name: "1", "2", ... or "mixed" for runs of several images that differ.
        capacities: slots of the bucket, None for a quartile.
        tokens: least and most that an image kept at the first stage, None without a run.
        share: of the images measured that belong here, in mixed runs too; None for the mixed runs themselves.
        calibration_share: of the images the bundle was calibrated with.
        runs: measured.
        median_ms, max_ms: of one run, stem and wasted runs of the rest included; None without a run.
        p90_ms: as far as the number of runs carries it.
        expected_ms: stem and one run of the rest, as calibrated.
        ratio: median / expected, None where the calibration cannot be compared.
        wall_ms: raw samples in the order they were taken.
    """

    name: str
    capacities: list[int] | None
    tokens: tuple[int, int] | None
    share: float | None
    calibration_share: float | None
    runs: int
    median_ms: float | None
    p90_ms: Percentile
    max_ms: float | None
    expected_ms: float | None
    ratio: float | None
    wall_ms: list[float]


@dataclass(frozen=True)
class AdaptiveResult:
    """What the images of a pass kept, and what their runs took.

    Attributes:
        form: of the bundle, as in the manifest.
        runner: the one whose runs these are.
        images: of one pass.
        runs: measured in all passes.
        tokens: mean number kept per stage.
        slots: most an image can keep per stage.
        groups: per bucket, or per quartile of the tokens kept at the first stage; none where every image takes the
            same time. Runs of several images that differ come last.
        mean_ms: of a run.
        calibrated_on: data and number of images of the calibration.
        expected_ms: mean that the calibration expects for its own images.
        expected_here_ms: the calibrated times added up over the buckets that these images ran in, mean of a run.
        ratio: mean / expected for these images, None where the calibration cannot be compared.
        differs: why the calibration cannot be compared.
        ran_again: share of the images that ran in a second bucket; one that ran in three counts twice when batches
            hold several images.
        router_us: median of what is neither stem nor rest, microseconds of a run.
        router_share: the same as a share of the run.
    """

    form: Literal["slots", "computed", "ragged", "buckets"]
    runner: str
    images: int
    runs: int
    tokens: list[float]
    slots: list[int]
    groups: list[RunGroup]
    mean_ms: float
    calibrated_on: str | None = None
    expected_ms: float | None = None
    expected_here_ms: float | None = None
    ratio: float | None = None
    differs: tuple[str, ...] = ()
    ran_again: float | None = None
    router_us: float | None = None
    router_share: float | None = None


@dataclass(frozen=True)
class RunSetting:
    """What the runs were made with, to set beside the calibration's; `threads` and `batch` are those of a run."""

    runner: str
    images: int
    batch: int
    threads: int
    cpu: str


def summarise_runs(
    info: AdaptiveInfo, slots: Sequence[int], runs: Sequence[Run], setting: RunSetting
) -> AdaptiveResult:
    """Work out what the log of the measured passes says.

    Args:
        info: of the bundle.
        slots: most an image can keep per stage.
        runs: of whole passes, warm-up not included.
        setting: what they were made with.

    Raises:
        InputError: `bench-samples` when there is no run.
    """
    if not runs:
        raise InputError("no runs", code="bench-samples", expected="at least one measured pass")
    tokens = np.concatenate([run.counts for run in runs]).mean(0)
    differs = () if info.calibration is None else tuple(differences(info.calibration, setting))
    result = AdaptiveResult(
        form=info.form,
        runner=setting.runner,
        images=setting.images,
        runs=len(runs),
        tokens=[round(float(mean), 2) for mean in tokens],
        slots=list(slots),
        groups=_groups(info, runs, comparable=not differs),
        mean_ms=1000 * float(np.mean([run.wall_s for run in runs])),
        differs=differs,
    )
    return _with_routes(result, info, runs) if info.form == "buckets" else result


def differences(calibration: CalibrationInfo, setting: RunSetting) -> Iterator[str]:
    """Yield why latencies cannot be compared with those a bundle was calibrated with."""
    if calibration.cpu != setting.cpu:
        yield f"made on {calibration.cpu}, this is {setting.cpu}"
    if calibration.threads != setting.threads:
        yield f"made with {calibration.threads} thread(s), this run has {setting.threads or 'all'}"
    if calibration.batch != setting.batch:
        yield f"made with batch {calibration.batch}, this run has {setting.batch}"


def mean_macs(runs: Sequence[Run], macs: Callable[[tuple[int, ...]], float]) -> float:
    """Return the mean over all images of their multiply-accumulates; `macs` tells them by the counts of an image."""
    counts, images = np.unique(np.concatenate([run.counts for run in runs]), axis=0, return_counts=True)
    return float(np.average([macs(tuple(image)) for image in counts.tolist()], weights=images))


def _with_routes(result: AdaptiveResult, info: AdaptiveInfo, runs: Sequence[Run]) -> AdaptiveResult:
    """Add what only a bundle with buckets has."""
    wall = np.array([run.wall_s for run in runs])
    router = wall - [run.trace.stem_s + run.trace.rest_s for run in runs]
    images = sum(len(run.counts) for run in runs)
    ran = sum(number for run in runs for _, number in run.trace.runs)
    result = replace(
        result,
        ran_again=(ran - images) / images,
        router_us=1e6 * float(np.median(router)),
        router_share=float(np.median(router / wall)),
    )
    calibration = info.calibration
    if calibration is None:
        return result
    rest_ms = [bucket.latency_ms or 0.0 for bucket in info.buckets]
    here = calibration.stem_ms + float(np.mean([sum(rest_ms[b] for b, _ in run.trace.runs) for run in runs]))
    return replace(
        result,
        calibrated_on=f"{calibration.images} images of {calibration.data}",
        expected_ms=calibration.expected_ms,
        expected_here_ms=None if result.differs else here,
        ratio=None if result.differs else result.mean_ms / here,
    )


def _groups(info: AdaptiveInfo, runs: Sequence[Run], *, comparable: bool) -> list[RunGroup]:
    """Return a row per bucket or quartile, then one of the runs that are of several."""
    if info.form == "slots":
        return []
    first = np.concatenate([run.counts[:, 0] for run in runs])
    if info.form == "buckets":
        places = [run.buckets for run in runs if run.buckets is not None]
        number = len(info.buckets)
    else:
        edges = np.quantile(first, QUARTILES)
        places = [np.searchsorted(edges, run.counts[:, 0]) for run in runs]
        number = len(QUARTILES) + 1
    of_image = np.concatenate(places)
    of_run = [int(place[0]) if (place == place[0]).all() else number for place in places]
    rows = []
    for group in range(number):
        here = of_image == group
        if info.form == "computed" and not here.any():
            continue  # equal counts fall into the quartile below
        found = [run for run, place in zip(runs, of_run, strict=True) if place == group]
        rows.append(_group(info, group, found, share=float(here.mean()), kept=first[here], comparable=comparable))
    mixed = [run for run, place in zip(runs, of_run, strict=True) if place == number]
    return [*rows, _row(MIXED, mixed)] if mixed else rows


def _group(
    info: AdaptiveInfo, place: int, runs: Sequence[Run], *, share: float, kept: Numbers, comparable: bool
) -> RunGroup:
    tokens = (int(kept.min()), int(kept.max())) if len(kept) else None
    row = replace(_row(str(place + 1), runs), share=share, tokens=tokens)
    if info.form != "buckets":
        return row
    bucket, calibration = info.buckets[place], info.calibration
    row = replace(row, capacities=list(bucket.capacities), calibration_share=bucket.share)
    if calibration is None or bucket.latency_ms is None:
        return row
    expected = calibration.stem_ms + bucket.latency_ms
    ratio = row.median_ms / expected if comparable and row.median_ms is not None else None
    return replace(row, expected_ms=expected, ratio=ratio)


def _row(name: str, runs: Sequence[Run]) -> RunGroup:
    ms = [1000 * run.wall_s for run in runs]
    counts = np.concatenate([run.counts[:, 0] for run in runs]) if runs else None
    return RunGroup(
        name=name,
        capacities=None,
        tokens=None if counts is None else (int(counts.min()), int(counts.max())),
        share=None,
        calibration_share=None,
        runs=len(ms),
        median_ms=stats.median(ms) if ms else None,
        p90_ms=stats.percentile(ms, 90),
        max_ms=max(ms) if ms else None,
        expected_ms=None,
        ratio=None,
        wall_ms=ms,
    )
