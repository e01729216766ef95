"""A device that computes nothing and only keeps time, for tests and demonstrations of the governor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.runtime.governor import Observation


@dataclass(frozen=True)
class Thermal:
    """How a device heats up and slows itself down.

    Attributes:
        ambient_c: degrees Celsius it cools to when idle.
        rise_c: degrees above that it approaches when always busy.
        tau_s: seconds in which 63 % of the way is gone.
        trip_c: degrees at which it starts to throttle.
        release_c: degrees at which it stops.
        slowdown: factor on latency while it throttles; a run heats as much as before, over a longer time.
    """

    ambient_c: float = 40.0
    rise_c: float = 70.0
    tau_s: float = 60.0
    trip_c: float = 95.0
    release_c: float = 88.0
    slowdown: float = 1.8


class NullDevice:
    """A device whose runs take the programmed time on a clock of its own.

    Args:
        latency_ms: of a run at each level, densest first, in milliseconds.
        frame_s: runs start this often in seconds, the device idles in between; 0 runs back to back.
        loads: (start, end, factor): latency is multiplied for runs that start between the two times in seconds.
        jitter: spread of the logarithm of latency.
        thermal: None keeps no temperature.
        seed: of the jitter.
    """

    def __init__(
        self,
        latency_ms: Sequence[float],
        *,
        frame_s: float = 0.0,
        loads: Sequence[tuple[float, float, float]] = (),
        jitter: float = 0.0,
        thermal: Thermal | None = None,
        seed: int = 0,
    ) -> None:
        self.latency_ms = tuple(latency_ms)
        self.now_s = 0.0
        self.throttled = False
        self.temperature_c = thermal.ambient_c if thermal else math.nan
        self._frame_s, self._loads, self._jitter, self._thermal = frame_s, tuple(loads), jitter, thermal
        self._random = random.Random(seed)

    def run(self, level: int) -> Observation:
        """Return what a run at a level was like, with the time and temperature at its end; idle until the next."""
        latency = self.latency_ms[level] * math.exp(self._random.gauss(0.0, self._jitter))
        latency *= math.prod(factor for start, end, factor in self._loads if start <= self.now_s < end)
        if self._thermal and self.throttled:
            latency *= self._thermal.slowdown
        self._pass(latency / 1000, busy=True)
        told = (self.temperature_c, self.throttled, self._thermal.trip_c) if self._thermal else (None, None, None)
        seen = Observation(self.now_s, latency, *told)
        self.idle(max(0.0, self._frame_s - latency / 1000))
        return seen

    def idle(self, seconds: float) -> None:
        """Let time pass without work."""
        self._pass(seconds, busy=False)

    def _pass(self, seconds: float, *, busy: bool) -> None:
        self.now_s += seconds
        if self._thermal:
            rise = self._thermal.rise_c / (self._thermal.slowdown if self.throttled else 1.0)
            target = self._thermal.ambient_c + (rise if busy else 0.0)
            self.temperature_c = target + (self.temperature_c - target) * math.exp(-seconds / self._thermal.tau_s)
            limit = self._thermal.release_c if self.throttled else self._thermal.trip_c
            self.throttled = self.temperature_c >= limit
