"""Which density to run next, so that runs meet a deadline: a pure function of what was observed.

A level is an index into a bundle's densities, 0 the densest and slowest. `observe` takes the state and one finished
run and returns the next state, and a step when the level changes. Nothing here reads a clock or a sensor.

Down: as soon as the runs at this level prove that the percentile is over the deadline, to the densest level that is
predicted to fit, else to the sparsest. "Prove" means more misses than the percentile allows by chance, so that rare
outliers do not step. One level down while the device is hot or throttled.

Up: one level, after a dwell, when the device is cool and the level above is predicted to fit with headroom. A step up
that has to be taken back within `probation_s` doubles the dwell; one that holds for `probation_s` halves it. A level
between headroom and deadline is held, and tried again after `max_up_dwell_s`.

What holds for every sequence of observations, with N levels:

- In any T seconds at most `N - 1 + 2 * (1 + floor(T / up_dwell_s))` steps: two steps up are a dwell apart, and nobody
  goes down further than he came up. With the defaults and four levels, 29 a minute.
- A turn is a step up followed by a step down. In any `probation_s` seconds at most n turns, n the largest number for
  which the first n - 1 of the dwells `up_dwell_s * (1, 2, 4, ...)`, none above `max_up_dwell_s`, sum to no more than
  `probation_s`. With the defaults, 4 in a minute, and about one a minute for as long as it goes on.
- From any state, once the device is cool and the level above is always predicted to fit, level 0 is reached within
  `(N - 1) * max_up_dwell_s` and the time of `N * window` runs.
- From any state, once every run misses, the sparsest level is reached within `(N - 1) * down_dwell_s` and the time of
  `window + (N - 1) * min_samples` runs; where a level between fits as the costs predict, that one, and it is kept.

Time is what the clock moved forward, an hour at most per run: a clock that stands still, leaps or is set back delays
steps and breaks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from edgeprune.errors import InputError

CHANCE = 0.0005  # of stepping down although the percentile is at the deadline
_LEAP_S = 3600.0


@dataclass(frozen=True)
class Policy:
    """What is wanted, and how patiently.

    Attributes:
        deadline_ms: milliseconds that `percentile` of the runs shall take at most.
        window: newest runs at a level that count, up to 1000.
        min_samples: runs at a level before its latency decides anything.
        percentile: 95 lets one run in twenty miss; nearest rank.
        headroom: share of the deadline that the level above must be predicted to stay within; the whole of it after
            `max_up_dwell_s` at a level.
        down_dwell_s: least time between two steps down.
        up_dwell_s: least time at a level before a step up.
        max_up_dwell_s: longest that steps up which failed make it.
        probation_s: time a step up must hold not to have failed.
        heat_dwell_s: least time from a step down to one for heat, so that the device can cool.
        hot_c: limit in degrees Celsius; None takes the one that came with the observation.
        cool_margin_c: degrees below the limit that allow steps up again.

    Raises:
        InputError: `governor`.
    """

    deadline_ms: float
    window: int = 32
    min_samples: int = 8
    percentile: float = 95.0
    headroom: float = 0.85
    down_dwell_s: float = 0.25
    up_dwell_s: float = 5.0
    max_up_dwell_s: float = 60.0
    probation_s: float = 60.0
    heat_dwell_s: float = 5.0
    hot_c: float | None = None
    cool_margin_c: float = 5.0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("deadline_ms", 0 < self.deadline_ms < math.inf, "a finite time above 0"),
            ("min_samples", self.min_samples >= 1, "at least 1"),
            ("window", self.min_samples <= self.window <= 1000, f"from min_samples ({self.min_samples}) to 1000"),
            ("percentile", 0 < self.percentile < 100, "between 0 and 100"),
            ("headroom", 0 < self.headroom < 1, "between 0 and 1"),
            ("down_dwell_s", 0 <= self.down_dwell_s < math.inf, "a finite time, 0 or more"),
            ("up_dwell_s", 0 < self.up_dwell_s < math.inf, "a finite time above 0"),
            ("max_up_dwell_s", self.up_dwell_s <= self.max_up_dwell_s < math.inf, "up_dwell_s or more, finite"),
            ("probation_s", 0 <= self.probation_s < math.inf, "a finite time, 0 or more"),
            ("heat_dwell_s", 0 <= self.heat_dwell_s < math.inf, "a finite time, 0 or more"),
            ("hot_c", self.hot_c is None or math.isfinite(self.hot_c), "degrees Celsius, or None"),
            ("cool_margin_c", 0 <= self.cool_margin_c < math.inf, "degrees, 0 or more"),
        ):
            if not holds:
                raise InputError(f"{name} {getattr(self, name)}", code="governor", expected=expected)


@dataclass(frozen=True)
class Observation:
    """One finished run at the state's level, and how the device was.

    Attributes:
        time_s: any clock in seconds.
        latency_ms: of the run; infinite is a miss, NaN and negative values do not count as a run.
        temperature_c: None or NaN when the device does not tell.
        throttled: the device slowed itself down; None when it does not tell.
        hot_c: limit that belongs to this temperature; the policy's own comes first.
    """

    time_s: float
    latency_ms: float
    temperature_c: float | None = None
    throttled: bool | None = None
    hot_c: float | None = None


@dataclass(frozen=True)
class State:
    """All that is remembered between runs.

    Attributes:
        level: to run next.
        up_dwell_s: the dwell before a step up as it is now.
        runs_ms: latencies at this level, newest last, at most `window`.
        clock_s: `time_s` of the last observation, None before the first.
        now_s: seconds the clock moved forward since the start.
        stepped_s: now_s of the last step, 0 at the start.
        lowered_s: now_s of the last step down.
        raised_s: now_s of the last step if that was up and its probation goes on, else None.
    """

    level: int
    up_dwell_s: float
    runs_ms: tuple[float, ...] = ()
    clock_s: float | None = None
    now_s: float = 0.0
    stepped_s: float = 0.0
    lowered_s: float = -math.inf
    raised_s: float | None = None


@dataclass(frozen=True)
class Step:
    """A change of level.

    Attributes:
        time_s: of the observation that caused it.
        before: level until then.
        after: level from the next run on.
        p95_ms: the policy's percentile of the runs at `before`, None when none counted.
        reason: for a log.
    """

    time_s: float
    before: int
    after: int
    p95_ms: float | None
    reason: str


def start(policy: Policy, costs: Sequence[float], level: int = 0) -> State:
    """Return the state before the first run.

    Args:
        policy: what is wanted.
        costs: of each level, densest first, in any unit: multiply-accumulates, or better, measured times.
        level: to begin with.

    Raises:
        InputError: `governor` when the costs do not fall, or there is no such level.
    """
    if not costs or not all(0 < c < math.inf for c in costs) or any(a < b for a, b in pairwise(costs)):
        raise InputError(
            f"costs {list(costs)}",
            code="governor",
            expected="one finite number above 0 per level, densest first, none larger than the one before",
        )
    if not 0 <= level < len(costs):
        raise InputError(f"level {level}", code="governor", expected=f"from 0 to {len(costs) - 1}")
    return State(level, policy.up_dwell_s)


def observe(
    policy: Policy, costs: Sequence[float], state: State, observation: Observation
) -> tuple[State, Step | None]:
    """Return the state after a run, and the step if the level changes.

    Args:
        policy: what is wanted.
        costs: those given to `start`.
        state: before the run.
        observation: the run, at `state.level`.
    """
    state = _with_run(policy, state, observation)
    ordered = sorted(state.runs_ms)
    p95 = ordered[math.ceil(len(ordered) * policy.percentile / 100) - 1] if ordered else math.nan
    level, reason = _choose(policy, costs, state, observation, ordered, p95)
    if level == state.level:
        return state, None
    step = Step(observation.time_s, state.level, level, p95 if ordered else None, reason)
    return _after_step(policy, state, level), step


def _with_run(policy: Policy, state: State, observation: Observation) -> State:
    """Return the state with time moved on, the run in its window, and a step up that held forgiven."""
    time_s, latency = observation.time_s, observation.latency_ms
    clock, now = state.clock_s, state.now_s
    if math.isfinite(time_s):
        now += min(max(0.0, time_s - clock), _LEAP_S) if clock is not None else 0.0
        clock = time_s
    runs = (*state.runs_ms, latency)[-policy.window :] if latency >= 0 else state.runs_ms
    dwell, raised = state.up_dwell_s, state.raised_s
    if raised is not None and now - raised >= policy.probation_s:
        dwell, raised = max(policy.up_dwell_s, dwell / 2), None
    return replace(state, runs_ms=runs, clock_s=clock, now_s=now, up_dwell_s=dwell, raised_s=raised)


def _choose(
    policy: Policy,
    costs: Sequence[float],
    state: State,
    observation: Observation,
    ordered: list[float],
    p95: float,
) -> tuple[int, str]:
    """Return the next level and why; the same level when nothing is to change."""
    level, now, deadline = state.level, state.now_s, policy.deadline_ms
    enough, seen = len(ordered) >= policy.min_samples, f"p{policy.percentile:g} {p95:.3g} ms"
    if enough and level + 1 < len(costs) and now - state.lowered_s >= policy.down_dwell_s:
        sure = ordered[-_misses_beyond_chance(len(ordered), policy.percentile)]
        if sure > deadline:
            fitting = (i for i in range(level + 1, len(costs)) if sure * costs[i] / costs[level] <= deadline)
            return next(fitting, len(costs) - 1), f"{seen} over the deadline of {deadline:g} ms"
    degrees, limit = observation.temperature_c, policy.hot_c if policy.hot_c is not None else observation.hot_c
    below = limit - degrees if degrees is not None and limit is not None else math.nan
    if observation.throttled or below <= 0:
        if level + 1 < len(costs) and now - state.lowered_s >= policy.heat_dwell_s:
            reason = "throttled" if observation.throttled else f"{degrees:.1f} °C, limit {limit:g} °C"
            return level + 1, reason
    elif enough and level and now - state.stepped_s >= state.up_dwell_s and not below <= policy.cool_margin_c:
        predicted = p95 * costs[level - 1] / costs[level]
        room = policy.headroom if now - state.stepped_s < policy.max_up_dwell_s else 1.0
        if predicted <= room * deadline:
            share = f"within {100 * room:.0f} % of the deadline of {deadline:g} ms"
            return level - 1, f"{seen}, level above predicted {predicted:.3g} ms, {share}"
    return level, ""


def _after_step(policy: Policy, state: State, level: int) -> State:
    """Return the state after a step: the window empty, so that levels never mix."""
    now = state.now_s
    if level < state.level:
        return replace(state, level=level, runs_ms=(), stepped_s=now, raised_s=now)
    failed = state.raised_s is not None
    return replace(
        state,
        level=level,
        runs_ms=(),
        stepped_s=now,
        lowered_s=now,
        raised_s=None,
        up_dwell_s=min(policy.max_up_dwell_s, 2 * state.up_dwell_s) if failed else state.up_dwell_s,
    )


@cache
def _misses_beyond_chance(runs: int, percentile: float) -> int:
    """Return the fewest misses in `runs` that a percentile at the deadline gives with `CHANCE` at most, or `runs`.

    The sample of that rank from above is a lower confidence limit of the percentile.
    """
    share, fewer = 1 - percentile / 100, 0.0
    for misses in range(runs):
        fewer += math.comb(runs, misses) * share**misses * (1 - share) ** (runs - misses)
        if 1 - fewer <= CHANCE:
            return misses + 1
    return runs
