"""How runs follow each other: the scenarios of a bench, in the words of MLPerf."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from edgeprune.bench import stats
from edgeprune.bench.measure import Measurement, MeasurePlan, Samples
from edgeprune.bench.stats import Percentile
from edgeprune.bench.telemetry import TelemetryResult
from edgeprune.errors import InputError

ScenarioKind = Literal["single-stream", "multi-stream", "fixed-fps", "sustained"]
HEADLINES = {"single-stream": 90, "multi-stream": 99, "fixed-fps": 90, "sustained": 90}
EXPECTED = "single-stream, multi-stream[:N], fixed-fps[:FPS] or sustained[:DURATION], for example sustained:10m"
QUERY, FPS, SUSTAINED_S = 8, 30.0, 600.0
MAX_QUERY, MAX_FPS, MAX_SUSTAINED_S = 1024, 1000.0, 24 * 3600.0
VISIT_S, QUICK_VISIT_S = 1.0, 0.25  # of frames in a row of one graph
WINDOW_S, WINDOWS = 60.0, 10  # a minute, or a tenth of what is shorter than two
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True)
class FramesResult:
    """Frames that came at a fixed rate.

    Attributes:
        due: frames that came while the graph had its turns.
        dropped: never run, because the next one was there before the graph was free.
        late: run, and done after the next frame was due.
        missed: share of the frames that were dropped or late.
        run_ms: median of the runs alone, without waiting.
        start_delay_ms: median from the moment a frame was due to the start of its run.
    """

    due: int
    dropped: int
    late: int
    missed: float
    run_ms: float
    start_delay_ms: float


@dataclass(frozen=True)
class WindowResult:
    """A minute of a sustained bench, or a tenth of a shorter one.

    Attributes:
        start_s, end_s: since the measuring began.
        temperature_c: highest of any sensor, None where there is none.
        mhz: lowest clock of any unit, None likewise.
        watts: mean power of all rails, None likewise.
        throttled: something was slowed down.
    """

    start_s: float
    end_s: float
    n: int
    median_wall_ms: float
    median_cpu_ms: float
    temperature_c: float | None = None
    mhz: float | None = None
    watts: float | None = None
    throttled: bool | None = None


@dataclass(frozen=True)
class ScenarioRunner:
    """One graph in the scenario.

    Attributes:
        headline_ms: the percentile of the wall time that stands for the scenario.
        frames: with fixed-fps.
        windows: with sustained; a window without a sample of this graph is left out.
        last_over_first: median wall time of the last window / that of the first.
    """

    name: str
    headline_ms: Percentile
    frames: FramesResult | None = None
    windows: list[WindowResult] = field(default_factory=list)
    last_over_first: float | None = None


@dataclass(frozen=True)
class ScenarioResult:
    """The scenario of a bench.

    Attributes:
        kind: what it is.
        text: as it is asked for, "fixed-fps:30".
        headline: the percentile that stands for it, "p90".
        samples_per_query: images of a sample: of a query with multi-stream, else the batch.
        fps: with fixed-fps.
        duration_s: with sustained.
        window_s: of its windows.
        runners: in the order of the result's.
    """

    kind: ScenarioKind
    text: str
    headline: str
    samples_per_query: int
    fps: float | None = None
    duration_s: float | None = None
    window_s: float | None = None
    runners: list[ScenarioRunner] = field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    """What was asked for; fields as in `ScenarioResult`.

    Attributes:
        query: images of a query, with multi-stream.
    """

    kind: ScenarioKind = "single-stream"
    query: int | None = None
    fps: float | None = None
    duration_s: float | None = None

    @property
    def text(self) -> str:
        """The scenario as it is asked for."""
        values = {"multi-stream": self.query, "fixed-fps": self.fps, "sustained": self.duration_s}
        value = values.get(self.kind)
        unit = "s" if self.kind == "sustained" else ""
        return self.kind if value is None else f"{self.kind}:{value:g}{unit}"

    def plan(self, plan: MeasurePlan, *, quick: bool) -> MeasurePlan:
        """Return a plan of measuring that follows the scenario; a quick one stays as short as it is."""
        if self.fps is not None:
            return replace(plan, frame_s=1 / self.fps, visit_s=QUICK_VISIT_S if quick else VISIT_S)
        if self.duration_s is not None and not quick:
            return replace(plan, duration_s=self.duration_s)
        return plan


def parse_scenario(text: str) -> Scenario:
    """Return the scenario of a text such as "fixed-fps:30".

    Raises:
        InputError: `bench-scenario`.
    """
    kind, colon, value = text.strip().partition(":")
    try:
        if kind == "single-stream" and not colon:
            return Scenario()
        if kind == "multi-stream":
            return Scenario(
                "multi-stream", query=int(_within(value if colon else str(QUERY), 2, MAX_QUERY, whole=True))
            )
        if kind == "fixed-fps":
            return Scenario("fixed-fps", fps=_within(value if colon else str(FPS), 0.1, MAX_FPS))
        if kind == "sustained":
            return Scenario("sustained", duration_s=_seconds(value) if colon else SUSTAINED_S)
    except ValueError as error:
        raise _bad_scenario(text, str(error)) from None
    raise _bad_scenario(text, "no such scenario" if kind not in HEADLINES else f"{kind} takes no value")


def _within(text: str, low: float, high: float, *, whole: bool = False) -> float:
    if not re.fullmatch(r"\d+" if whole else r"\d+(\.\d+)?", text):
        raise ValueError(f"'{text}' is not a {'whole ' if whole else ''}number")
    value = float(text)
    if not low <= value <= high:
        raise ValueError(f"{text} is not within {low:g} and {high:g}")
    return value


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise ValueError(f"'{text}' is not a duration such as 90s, 10m or 1h")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 1 <= seconds <= MAX_SUSTAINED_S:
        raise ValueError(f"{text} is not within 1s and {MAX_SUSTAINED_S / 3600:g}h")
    return seconds


def _bad_scenario(text: str, why: str) -> InputError:
    return InputError(f"scenario '{text}': {why}", code="bench-scenario", expected=EXPECTED)


def query_batch(query: int, batch: int | None, allowed: tuple[int, int]) -> int:
    """Return the batch that a query of so many images runs in: the one given, or the largest that divides it.

    Raises:
        InputError: `bench-scenario` when no batch of the bundle divides the query.
    """
    low, high = allowed
    fits = [b for b in range(low, min(high, query) + 1) if query % b == 0]
    if not fits or (batch is not None and query % batch):
        raise InputError(
            f"a query of {query} images does not fall into batches of {batch or low}",
            code="bench-scenario",
            expected="a query that the batch divides" if batch or not fits else f"one of {fits}",
            hint=f"--scenario multi-stream:{(batch or low) * max(1, query // (batch or low))}",
        )
    return batch or fits[-1]


def scenario_result(
    scenario: Scenario, measurement: Measurement, telemetry: TelemetryResult | None, *, samples_per_query: int
) -> ScenarioResult:
    """Work out what a scenario tells beside the times of the runners: pure."""
    q = HEADLINES[scenario.kind]
    width = None if scenario.duration_s is None else window_width(measurement.elapsed_s)
    return ScenarioResult(
        kind=scenario.kind,
        text=scenario.text,
        headline=f"p{q}",
        samples_per_query=samples_per_query,
        fps=scenario.fps,
        duration_s=scenario.duration_s,
        window_s=width,
        runners=[
            _runner(name, samples, scenario, measurement, telemetry, width)
            for name, samples in measurement.samples.items()
        ],
    )


def window_width(elapsed_s: float) -> float:
    """Return the seconds of a window: a minute, or a tenth of less than two minutes."""
    return WINDOW_S if elapsed_s >= 2 * WINDOW_S else elapsed_s / WINDOWS


def _runner(
    name: str,
    samples: Samples,
    scenario: Scenario,
    measurement: Measurement,
    telemetry: TelemetryResult | None,
    width: float | None,
) -> ScenarioRunner:
    headline = stats.percentile(samples.wall_ms, HEADLINES[scenario.kind])
    frames = None if scenario.fps is None else _frames(samples, 1000 / scenario.fps)
    if width is None:
        return ScenarioRunner(name, headline, frames)
    windows = _windows(samples, measurement, telemetry, width)
    moved = windows[-1].median_wall_ms / windows[0].median_wall_ms if len(windows) > 1 else None
    return ScenarioRunner(name, headline, frames, windows, moved)


def _frames(samples: Samples, frame_ms: float) -> FramesResult:
    due, late = len(samples.wall_ms) + samples.dropped, sum(ms > frame_ms for ms in samples.wall_ms)
    delays = [wall - run for wall, run in zip(samples.wall_ms, samples.run_ms, strict=True)]
    missed = (samples.dropped + late) / due
    return FramesResult(due, samples.dropped, late, missed, stats.median(samples.run_ms), stats.median(delays))


def _windows(
    samples: Samples, measurement: Measurement, telemetry: TelemetryResult | None, width: float
) -> list[WindowResult]:
    """Return the windows that hold a sample; what is left behind the last whole one belongs to it."""
    count = max(1, int(measurement.elapsed_s / width + 1e-9)) if width > 0 else 1
    groups: list[list[int]] = [[] for _ in range(count)]
    for i, at in enumerate(samples.at_s):
        number = int((at - measurement.started_s) / width) if width > 0 else 0
        groups[min(count - 1, max(0, number))].append(i)
    made = []
    for number, group in enumerate(groups):
        start, end = number * width, measurement.elapsed_s if number == count - 1 else (number + 1) * width
        if group:
            wall, cpu = ([times[i] for i in group] for times in (samples.wall_ms, samples.cpu_ms))
            heat = _heat(None if telemetry is None else telemetry.between(start, end))
            made.append(WindowResult(start, end, len(group), stats.median(wall), stats.median(cpu), *heat))
    return made


def _heat(telemetry: TelemetryResult | None) -> tuple[float | None, float | None, float | None, bool | None]:
    """Return temperature, lowest clock, power and whether something throttled."""
    if telemetry is None or not telemetry.t_s:
        return None, None, None, None
    hottest = max((c.high for c in telemetry.of("temperature") if c.high is not None), default=None)
    slowest = min((c.low for c in telemetry.of("clock") if c.low is not None), default=None)
    throttled = bool(telemetry.throttled) if telemetry.of("throttle") else None
    return hottest, slowest, telemetry.watts(), throttled
