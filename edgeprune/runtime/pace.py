"""The governor at work in a session: it sees every run and the device, and says which density comes next."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from edgeprune.errors import InputError
from edgeprune.runtime.device_state import DeviceReader
from edgeprune.runtime.governor import Observation, Policy, observe, start

LOG = logging.getLogger("edgeprune.governor")
REMEMBERED = 1000


@dataclass(frozen=True)
class DensityStep:
    """A change of density.

    Attributes:
        time_s: of the clock that was given, monotonic by default.
        before: keep rate until then.
        after: keep rate from the next run on.
        reason: what the governor saw.
    """

    time_s: float
    before: float
    after: float
    reason: str


class Pace:
    """Chooses the density by what runs take.

    Args:
        policy: deadline and patience.
        costs_ms: by keep rate, milliseconds of one run, measured.
        density: to begin with.
        reader: of the device's temperature and throttle state.
        clock: seconds.

    Raises:
        InputError: `deadline` when there is nothing to choose from.
    """

    def __init__(
        self,
        policy: Policy,
        costs_ms: Mapping[float, float],
        density: float,
        *,
        reader: DeviceReader | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if len(costs_ms) < 2:
            raise InputError(
                "a deadline needs several densities to choose from",
                code="deadline",
                expected="a bundle that was exported with several keep rates",
                hint="export with --keep-rate 1.0,0.7,0.5,0.3",
            )
        self.policy = policy
        self._levels = sorted(costs_ms, reverse=True)
        costs = [costs_ms[rate] for rate in self._levels]
        self._costs = [min(costs[: i + 1]) for i in range(len(costs))]  # measured: a sparser one may seem slower
        self._state = start(policy, self._costs, self._levels.index(density))
        self._reader, self._clock = reader or DeviceReader(), clock
        self._lock = threading.Lock()
        self.steps: deque[DensityStep] = deque(maxlen=REMEMBERED)

    def after(self, density: float, latency_ms: float) -> float:
        """Take note of a run and return the density of the next one.

        A run at another density than the present one was under way when that changed, and does not count.
        """
        device = self._reader.read()
        with self._lock:
            if density == self._levels[self._state.level]:
                now = self._clock()
                seen = Observation(now, latency_ms, device.temperature_c, device.throttled, device.hot_c)
                self._state, step = observe(self.policy, self._costs, self._state, seen)
                if step is not None:
                    taken = DensityStep(now, density, self._levels[step.after], step.reason)
                    self.steps.append(taken)
                    LOG.info("density %g -> %g: %s", taken.before, taken.after, taken.reason)
            return self._levels[self._state.level]
