"""Take turns: measure several runners in one process so that each meets the same state of the machine.

A round visits every runner once; every second round goes backwards (A B C, C B A), and two rounds make a
block. All raw samples are kept. Frames may come at a fixed rate; otherwise a run follows the one before at once.
Time is an argument, so the whole of it is tested without waiting.
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

    def sleep(self, seconds: float) -> None:
        """Let wall time pass without work."""


class SystemClock:
    """The clocks of the machine."""

    def wall(self) -> float:
        """Return the wall clock."""
        return time.perf_counter()

    def cpu(self) -> float:
        """Return the processor time of this process."""
        return time.process_time()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class DeviceTimes(Protocol):
    """Where a backend leaves the times of a run that only it can tell apart, such as `DeviceTimer`."""

    def take(self) -> tuple[float, float] | None:
        """Return (milliseconds on the device, of giving it the work) since the last call; None without a run."""


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
        frame_s: a frame is due this often and runs wait for it; None starts a run when the one before is done.
    """

    rounds: int | None = None
    duration_s: float = 10.0
    warmup_s: float = 0.2
    max_warmup_s: float = 10.0
    warmup_window: int = 3
    warmup_tolerance: float = 0.05
    visit_s: float = 0.01
    frame_s: float | None = None


QUICK = MeasurePlan(duration_s=3.0, max_warmup_s=3.0)


@dataclass
class Samples:
    """Raw samples of one runner in the order they were taken, milliseconds per call.

    Attributes:
        wall_ms: from the start of the call, or from the moment its frame was due.
        cpu_ms: processor time of the call.
        at_s: the clock at the start of the call.
        run_ms: wall time of the call alone, where frames are due at fixed times; else empty.
        gpu_ms, enqueue_ms: as the backend tells them; empty where it does not.
        dropped: frames that were never run, because the next one was due before the runner was free.
    """

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    run_ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)
    enqueue_ms: list[float] = field(default_factory=list)
    dropped: int = 0


@dataclass(frozen=True)
class WarmupResult:
    """What was run before measuring.

    Attributes:
        rounds: of every runner.
        elapsed_s: seconds they took.
        stable: it ended because times stood still, not because its time was up.
        window: rounds of a window; it ends when two windows in a row agree.
        tolerance: largest change of any runner's median between two windows.
        changes: that largest change at every window but the first, as a share.
    """

    rounds: int
    elapsed_s: float
    stable: bool
    window: int
    tolerance: float
    changes: list[float] = field(default_factory=list)


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
        warmup: the whole of it.
        started_s: the clock when the measured part began.
    """

    samples: dict[str, Samples]
    rounds: int
    calls_per_visit: int
    warmup_rounds: int
    warm: bool
    elapsed_s: float
    warmup: WarmupResult | None = None
    started_s: float = 0.0

    def per_run(self, runs: int) -> Measurement:
        """Return a measurement of calls of several runs as one of the mean run of each call."""

        def divided(times: list[float]) -> list[float]:
            return [ms / runs for ms in times]

        samples = {
            name: replace(
                one,
                wall_ms=divided(one.wall_ms),
                cpu_ms=divided(one.cpu_ms),
                run_ms=divided(one.run_ms),
                gpu_ms=divided(one.gpu_ms),
                enqueue_ms=divided(one.enqueue_ms),
            )
            for name, one in self.samples.items()
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
    device: DeviceTimes | None = None,
) -> Measurement:
    """Warm the runners up until their times stand still, then measure them in turns.

    Args:
        runners: name -> a call that does one run and returns when it is done.
        plan: duration and warm-up.
        clock: source of time; the machine's by default.
        progress: called with ("warm-up" or "measure", share done).
        device: what the backends of the runners leave the device's times in, if they can tell.

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
        warmup, fastest_s = _warm_up(runners, plan, clock, report)
        calls = _calls_per_visit(plan, fastest_s)
        return _measure_rounds(runners, plan, calls, warmup, clock, report, device)


def _calls_per_visit(plan: MeasurePlan, fastest_s: float) -> int:
    each_s = fastest_s if plan.frame_s is None else plan.frame_s
    return max(1, math.ceil(plan.visit_s / each_s)) if each_s > 0 else 1


def _warm_up(
    runners: Mapping[str, Runner], plan: MeasurePlan, clock: Clock, report: Progress
) -> tuple[WarmupResult, float]:
    """Return what was run, and the fastest runner's wall seconds per call."""
    start, done = clock.wall(), 0
    before: dict[str, float] = {}
    changes: list[float] = []
    while True:
        window = {name: Samples() for name in runners}
        for _ in range(plan.warmup_window):
            for name in round_order(list(runners), done):
                _run_calls(runners[name], 1, window[name], clock)
            done += 1
        now = {name: float(median(samples.wall_ms)) for name, samples in window.items()}
        if before:
            changes.append(max(_change(now[name], before[name]) for name in runners))
        before, elapsed = now, clock.wall() - start
        report("warm-up", min(1.0, elapsed / plan.max_warmup_s))
        stable = bool(changes) and changes[-1] <= plan.warmup_tolerance and elapsed >= plan.warmup_s
        if stable or elapsed >= plan.max_warmup_s:
            report("warm-up", 1.0)
            made = WarmupResult(done, elapsed, stable, plan.warmup_window, plan.warmup_tolerance, changes)
            return made, min(now.values()) / 1000


def _change(now: float, before: float) -> float:
    """Return by what share a time has changed; a time of nothing stands still only while it stays nothing."""
    return abs(now - before) / before if before > 0 else float(now > 0)


def _measure_rounds(
    runners: Mapping[str, Runner],
    plan: MeasurePlan,
    calls: int,
    warmup: WarmupResult,
    clock: Clock,
    report: Progress,
    device: DeviceTimes | None,
) -> Measurement:
    samples = {name: Samples() for name in runners}
    wanted = None if plan.rounds is None else plan.rounds + plan.rounds % 2
    start, rounds, share = clock.wall(), 0, 0.0
    if device is not None:
        device.take()  # what the warm-up left
    while share < 1:
        for _ in range(2):
            for name in round_order(list(runners), rounds):
                if plan.frame_s is None:
                    _run_calls(runners[name], calls, samples[name], clock, device)
                else:
                    _run_frames(runners[name], calls, plan.frame_s, samples[name], clock, device)
            rounds += 1
        elapsed = clock.wall() - start
        by_time = min(elapsed / plan.duration_s if plan.duration_s > 0 else 1.0, rounds / (2 * MIN_BLOCKS))
        share = rounds / wanted if wanted else by_time
        report("measure", min(1.0, share))
    return Measurement(samples, rounds, calls, warmup.rounds, warmup.stable, elapsed, warmup, start)


def _run_calls(run: Runner, calls: int, into: Samples, clock: Clock, device: DeviceTimes | None = None) -> None:
    """Call a runner some times, each call when the one before is done."""
    for _ in range(calls):
        cpu, wall = clock.cpu(), clock.wall()
        run()
        wall_end, cpu_end = clock.wall(), clock.cpu()
        into.at_s.append(wall)
        into.wall_ms.append((wall_end - wall) * 1000)
        into.cpu_ms.append((cpu_end - cpu) * 1000)
        _take_device_times(device, into)


def _run_frames(
    run: Runner, frames: int, frame_s: float, into: Samples, clock: Clock, device: DeviceTimes | None = None
) -> None:
    """Run some frames that are due one every `frame_s`; a busy runner goes on with the newest frame there is."""
    first, number = clock.wall(), 0
    for _ in range(frames):
        due = first + number * frame_s
        if (early := due - clock.wall()) > 0:
            clock.sleep(early)
        cpu, wall = clock.cpu(), clock.wall()
        run()
        wall_end, cpu_end = clock.wall(), clock.cpu()
        into.at_s.append(wall)
        into.wall_ms.append((wall_end - due) * 1000)
        into.run_ms.append((wall_end - wall) * 1000)
        into.cpu_ms.append((cpu_end - cpu) * 1000)
        _take_device_times(device, into)
        newest = math.floor((wall_end - first) / frame_s + 1e-9)
        into.dropped += max(0, newest - number - 1)
        number = max(number + 1, newest)


def _take_device_times(device: DeviceTimes | None, into: Samples) -> None:
    told = None if device is None else device.take()
    if told is not None:
        into.gpu_ms.append(told[0])
        into.enqueue_ms.append(told[1])


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
