"""How runs follow each other: the scenarios of a bench, in the words of MLPerf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgeprune.bench.stats import Percentile

ScenarioKind = Literal["single-stream", "multi-stream", "fixed-fps", "sustained"]


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
        samples_per_query: images of a query, with multi-stream; else 1 or the batch.
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
