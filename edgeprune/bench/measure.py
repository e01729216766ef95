"""Take turns: measure several runners in one process so that each meets the same state of the machine.

A round visits every runner once; every second round goes backwards (A B C, C B A), and two rounds make a
block. All raw samples are kept. Time is an argument, so the whole of it is tested without waiting.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from numpy import median

from edgeprune.bench.stats import MIN_BLOCKS
from edgeprune.errors import InputError

Runner = Callable[[], object]
Progress = Callable[[str, float], None]
T = TypeVar("T")


class Clock(Protocol):
    """Two clocks in seconds: time that passed, and processor time of this process over all its threads."""

    def wall(self) -> float:
        """Return the wall clock."""

    def cpu(self) -> float:
        """Return the processor time used so far."""


class SystemClock:
    """The clocks of the machine."""

    def wall(self) -> float:
        """Return the wall clock."""
        return time.perf_counter()

    def cpu(self) -> float:
        """Return the processor time of this process."""
        return time.process_time()


@dataclass(frozen=True)
class MeasurePlan:
    """How long and how carefully to measure.

    Attributes:
        rounds: exact number of rounds, made even; None measures for `duration_s`.
        duration_s: measured time at least, and never fewer than `MIN_BLOCKS` blocks.
        warmup_s: shortest warm-up.
        max_warmup_s: warm-up ends here even when times still move.
        warmup_window: rounds per warm-up window; it ends when two windows in a row agree.
        warmup_tolerance: largest change of any runner's median between two windows.
        visit_s: a visit repeats the fastest runner until it lasts about this long; all get as many calls.
    """

    rounds: int | None = None
    duration_s: float = 10.0
    warmup_s: float = 0.2
    max_warmup_s: float = 10.0
    warmup_window: int = 3
    warmup_tolerance: float = 0.05
    visit_s: float = 0.01


QUICK = MeasurePlan(duration_s=3.0, max_warmup_s=3.0)


@dataclass
class Samples:
    """Raw samples of one runner in the order they were taken, milliseconds per call."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        samples: runner -> raw samples; every runner has `rounds * calls_per_visit`.
        rounds: even; two rounds are a block.
        calls_per_visit: calls in a row of one runner in one round.
        warmup_rounds: rounds thrown away first.
        warm: the warm-up ended because times stood still, not because its time was up.
        elapsed_s: measured part, warm-up not included.
    """

    samples: dict[str, Samples]
    rounds: int
    calls_per_visit: int
    warmup_rounds: int
    warm: bool
    elapsed_s: float

    def per_run(self, runs: int) -> Measurement:
        """Return a measurement of calls of several runs as one of the mean run of each call."""
        samples = {
            name: Samples([ms / runs for ms in s.wall_ms], [ms / runs for ms in s.cpu_ms])
            for name, s in self.samples.items()
        }
        return replace(self, samples=samples)


def round_order(names: list[T], round_index: int) -> list[T]:
    """Return the order of a round: forwards in even rounds, backwards in odd ones."""
    return names if round_index % 2 == 0 else names[::-1]


def measure(
    runners: Mapping[str, Runner],
    plan: MeasurePlan,
    *,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Warm the runners up until their times stand still, then measure them in turns.

    Args:
        runners: name -> a call that does one run and returns when it is done.
        plan: duration and warm-up.
        clock: source of time; the machine's by default.
        progress: called with ("warm-up" or "measure", share done).

    Raises:
        InputError: `bench-plan` when there is no runner or the plan has no round.
    """
    if not runners:
        raise InputError("nothing to measure", code="bench-plan", expected="at least one runner")
    if plan.rounds is not None and plan.rounds < 1:
        raise InputError(f"{plan.rounds} rounds", code="bench-plan", expected="at least one round")
    clock = clock or SystemClock()
    report = progress or (lambda phase, share: None)
    with _no_garbage_collection():
        warmup_rounds, warm, fastest_s = _warm_up(runners, plan, clock, report)
        calls = max(1, math.ceil(plan.visit_s / fastest_s)) if fastest_s > 0 else 1
        return _measure_rounds(runners, plan, calls, warmup_rounds, warm, clock, report)


def _warm_up(
    runners: Mapping[str, Runner], plan: MeasurePlan, clock: Clock, report: Progress
) -> tuple[int, bool, float]:
    """Return rounds run, whether the times stood still, and the fastest runner's wall seconds per call."""
    start, done = clock.wall(), 0
    before: dict[str, float] = {}
    while True:
        window = {name: Samples() for name in runners}
        for _ in range(plan.warmup_window):
            _run_round(runners, done, 1, window, clock)
            done += 1
        now = {name: float(median(samples.wall_ms)) for name, samples in window.items()}
        steady = bool(before) and all(
            abs(now[name] - before[name]) <= plan.warmup_tolerance * before[name] for name in runners
        )
        before, elapsed = now, clock.wall() - start
        report("warm-up", min(1.0, elapsed / plan.max_warmup_s))
        warm = steady and elapsed >= plan.warmup_s
        if warm or elapsed >= plan.max_warmup_s:
            report("warm-up", 1.0)
            return done, warm, min(now.values()) / 1000


def _measure_rounds(
    runners: Mapping[str, Runner],
    plan: MeasurePlan,
    calls: int,
    warmup_rounds: int,
    warm: bool,
    clock: Clock,
    report: Progress,
) -> Measurement:
    samples = {name: Samples() for name in runners}
    wanted = None if plan.rounds is None else plan.rounds + plan.rounds % 2
    start, rounds, share = clock.wall(), 0, 0.0
    while share < 1:
        for _ in range(2):
            _run_round(runners, rounds, calls, samples, clock)
            rounds += 1
        elapsed = clock.wall() - start
        by_time = min(elapsed / plan.duration_s if plan.duration_s > 0 else 1.0, rounds / (2 * MIN_BLOCKS))
        share = rounds / wanted if wanted else by_time
        report("measure", min(1.0, share))
    return Measurement(samples, rounds, calls, warmup_rounds, warm, elapsed)


def _run_round(
    runners: Mapping[str, Runner], index: int, calls: int, into: Mapping[str, Samples], clock: Clock
) -> None:
    for name in round_order(list(runners), index):
        run, sample = runners[name], into[name]
        for _ in range(calls):
            cpu, wall = clock.cpu(), clock.wall()
            run()
            wall_end, cpu_end = clock.wall(), clock.cpu()
            sample.wall_ms.append((wall_end - wall) * 1000)
            sample.cpu_ms.append((cpu_end - cpu) * 1000)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
