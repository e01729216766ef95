"""Temperature, clocks, throttling and power while measuring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ChannelKind = Literal["temperature", "clock", "power", "throttle", "load", "limit"]


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
        hz: readings per second that were reached.
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
