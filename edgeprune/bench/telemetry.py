"""Temperature, clocks, throttling and power while measuring: what readers tell, over time, and what it means."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from numpy import median

from edgeprune.bench.stats import MAX_CLOCK_RANGE

ChannelKind = Literal["temperature", "clock", "power", "throttle", "load", "limit"]
HZ = 10.0

# Rails that together are all a board takes, by what the boards name them; where several match, the first counts.
WHOLE_BOARD = (
    ("VDD_IN",),  # Orin NX and Nano, Xavier NX, TX2: the module
    ("POM_5V_IN",),  # Nano: the module
    ("VIN",),  # Thor: the board
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin: the module
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier: the module
)


@dataclass(frozen=True)
class Channel:
    """One quantity that a source reads; fields as in `ChannelResult`."""

    name: str
    kind: ChannelKind
    unit: str
    source: str


class Source(Protocol):
    """Something that tells about the machine.

    Attributes:
        channels: what it reads.
    """

    channels: list[Channel]

    def read(self) -> list[float | None]:
        """Return a value per channel now; None where it cannot be read."""
        ...


class Counter(Protocol):
    """Energy that a machine counts itself.

    Attributes:
        rail, source: as in `EnergyResult`.
    """

    rail: str
    source: str

    def joules(self) -> float | None:
        """Return the energy since some moment; None when it cannot be read."""
        ...


@dataclass(frozen=True)
class ChannelResult:
    """One quantity over time.

    Attributes:
        name: as the source names it: "cpu-thermal", "VDD_IN", "gpu".
        kind: what it is.
        unit: "C", "MHz", "W", "%"; "" for throttle bits.
        source: "thermal", "cpufreq", "devfreq", "ina3221", "hwmon", "nvml", "rapl", "tegrastats".
        values: at the times of the whole telemetry; None where it could not be read.
        low, median, high: of the values.
    """

    name: str
    kind: ChannelKind
    unit: str
    source: str
    values: list[float | None]
    low: float | None
    median: float | None
    high: float | None


@dataclass(frozen=True)
class TelemetryResult:
    """What the machine told while measuring.

    Attributes:
        hz: readings per second that were reached; 0 where there is nothing to read.
        t_s: when each reading was taken, seconds since the measuring began.
        channels: all that could be read.
        throttled: why something was slowed down, as the source names it; empty when nothing was.
        lacking: sources that are not there or cannot be read, with the reason.
    """

    hz: float
    t_s: list[float]
    channels: list[ChannelResult] = field(default_factory=list)
    throttled: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    def of(self, kind: ChannelKind) -> list[ChannelResult]:
        """Return the channels of a kind."""
        return [channel for channel in self.channels if channel.kind == kind]

    def between(self, start_s: float, end_s: float) -> TelemetryResult:
        """Return the part from one moment to another."""
        inside = [i for i, t in enumerate(self.t_s) if start_s <= t < end_s]
        values = [[channel.values[i] for i in inside] for channel in self.channels]
        channels = [_summarise(_plain(c), v) for c, v in zip(self.channels, values, strict=True)]
        return TelemetryResult(self.hz, [self.t_s[i] for i in inside], channels, _throttled(channels))

    def whole_board(self) -> list[ChannelResult]:
        """Return the power channels that together are all the board takes, or else the largest one."""
        return whole_board(self.of("power"))

    def watts(self) -> float | None:
        """Return the mean power of the whole board, None where it is not known."""
        rails = [[v for v in channel.values if v is not None] for channel in self.whole_board()]
        return sum(sum(rail) / len(rail) for rail in rails) if rails and all(rails) else None


class Monitor:
    """Reads sources in a thread beside the measuring, several times a second.

    Args:
        sources: what is read.
        hz: readings per second, at most.
        clock: seconds; the one measuring goes by.

    Attributes:
        channels: of all sources.
        hz: readings per second, at most.
        log: (time, values) of every reading so far.
    """

    def __init__(
        self, sources: Sequence[Source], *, hz: float = HZ, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.channels = [channel for source in sources for channel in source.channels]
        self.log: list[tuple[float, list[float | None]]] = []
        self.hz = hz
        self._sources, self._interval_s, self._clock = sources, 1 / hz, clock
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Monitor:
        if self.channels:
            self._thread = threading.Thread(target=self._read_on, name="edgeprune-telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> None:
        """Take one reading."""
        at = self._clock()
        self.log.append((at, [value for source in self._sources for value in source.read()]))

    def _read_on(self) -> None:
        while not self._over.is_set():
            begin = self._clock()
            self.read()
            self._over.wait(max(0.0, self._interval_s - (self._clock() - begin)))

    def result(self, started_s: float, elapsed_s: float, lacking: Iterable[str] = ()) -> TelemetryResult:
        """Return what was read while measuring.

        Args:
            started_s: the clock when it began.
            elapsed_s: how long it took.
            lacking: sources that there are not.
        """
        log = [(at - started_s, values) for at, values in list(self.log) if 0 <= at - started_s <= elapsed_s]
        times = [at for at, _ in log]
        columns = [[values[i] for _, values in log] for i in range(len(self.channels))]
        channels = [
            _summarise(c, v) for c, v in zip(self.channels, columns, strict=True) if any(x is not None for x in v)
        ]
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        hz = (len(times) - 1) / span if span > 0 else 0.0
        return TelemetryResult(round(hz, 2), times, channels, _throttled(channels), list(lacking))

    def power(self, start_s: float, end_s: float) -> dict[Channel, list[tuple[float, float]]]:
        """Return the power readings (time, watts) of every rail from one moment to another, and the two around."""
        log = list(self.log)
        inside = [i for i, (at, _) in enumerate(log) if start_s <= at <= end_s]
        if inside:
            inside = list(range(max(0, inside[0] - 1), min(len(log), inside[-1] + 2)))
        found: dict[Channel, list[tuple[float, float]]] = {}
        for column, channel in enumerate(self.channels):
            readings = [(log[i][0], value) for i in inside if (value := log[i][1][column]) is not None]
            if channel.kind == "power" and readings:
                found[channel] = readings
        return found


def whole_board(rails: Sequence[ChannelResult]) -> list[ChannelResult]:
    """Return the rails that together are all the board takes; where that is not known, the largest one."""
    by_name = {rail.name: rail for rail in rails}
    for names in WHOLE_BOARD:
        if all(name in by_name for name in names):
            return [by_name[name] for name in names]
    packages = [rail for rail in rails if rail.source == "rapl"]
    if packages:
        return packages
    return [max(rails, key=lambda rail: rail.median or 0.0)] if rails else []


def telemetry_reasons(telemetry: TelemetryResult, *, on_device: bool) -> list[str]:
    """Return why what the machine told speaks against the run: a throttle bit, or a clock that moved.

    Args:
        telemetry: of the measured part.
        on_device: a GPU did the work; its clocks count then, and else that of the fastest core.
    """
    reasons = [f"slowed down: {reason}" for reason in telemetry.throttled]
    for name, values in _working_clocks(telemetry, on_device):
        low, high = min(values), max(values)
        if high > 0 and (high - low) / high > MAX_CLOCK_RANGE:
            reasons.append(f"the clock of {name} ranged from {low:.0f} to {high:.0f} MHz (limit {MAX_CLOCK_RANGE:.0%})")
    return reasons


def _working_clocks(telemetry: TelemetryResult, on_device: bool) -> Iterator[tuple[str, list[float]]]:
    clocks = telemetry.of("clock")
    if on_device:
        for channel in clocks:
            if "gpu" in channel.name.lower():
                yield channel.name, [value for value in channel.values if value is not None]
        return
    cores = [channel.values for channel in clocks if channel.source == "cpufreq"]
    fastest = [max((v for v in values if v is not None), default=None) for values in zip(*cores, strict=True)]
    known = [value for value in fastest if value is not None]
    if known:
        yield "the fastest core", known


def _summarise(channel: Channel, values: list[float | None]) -> ChannelResult:
    known = [value for value in values if value is not None]
    low, middle, high = (min(known), float(median(known)), max(known)) if known else (None, None, None)
    return ChannelResult(channel.name, channel.kind, channel.unit, channel.source, values, low, middle, high)


def _plain(channel: ChannelResult) -> Channel:
    return Channel(channel.name, channel.kind, channel.unit, channel.source)


def _throttled(channels: Sequence[ChannelResult]) -> list[str]:
    return [channel.name for channel in channels if channel.kind == "throttle" and (channel.high or 0) > 0]
