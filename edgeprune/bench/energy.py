"""Energy of an image: each graph runs alone for a while, after a while without work, in turns.

Where the machine counts energy itself the counter is read; else power readings are integrated over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from edgeprune.bench.measure import Progress, Runner, round_order
from edgeprune.bench.telemetry import Channel, ChannelResult, Counter, Monitor, whole_board

WINDOW_S, QUICK_WINDOW_S = 2.0, 0.5
TURNS = 2  # windows of each graph; the second ones in reverse order
Readings = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class EnergyResult:
    """Energy of an image while one graph ran and nothing else was asked for.

    Attributes:
        joules_per_image: all of the rail's energy, of an idle machine too.
        net_joules_per_image: without what the machine takes when idle; None where that was not measured.
        mean_w: power of the rail while the graph ran.
        idle_w: power of the rail before, without work.
        method: "counter", or "power over time" for the integral (trapezoid) of power readings.
        source: what was read: "rapl", "nvml", "ina3221", "hwmon", "tegrastats".
        rail: what the energy covers, as the source names it; several joined by " + ".
        window_s: seconds the graph ran.
        images: that it ran on.
        readings: that the energy rests on.
    """

    joules_per_image: float
    net_joules_per_image: float | None
    mean_w: float
    idle_w: float | None
    method: str
    source: str
    rail: str
    window_s: float
    images: int
    readings: int


@dataclass
class Window:
    """A stretch of time: seconds of the clock, the calls in it, and every counter at both ends."""

    start_s: float
    end_s: float
    calls: int
    counters: tuple[Sequence[float | None], Sequence[float | None]] = field(default=((), ()))


def measure_energy(
    runners: Mapping[str, Runner],
    monitor: Monitor,
    counters: Sequence[Counter],
    *,
    images_per_call: int,
    window_s: float = WINDOW_S,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Progress | None = None,
) -> dict[str, EnergyResult]:
    """Return the energy of an image by runner; empty where the machine tells neither energy nor power.

    Args:
        runners: name -> a call that runs once.
        monitor: reads meanwhile.
        counters: the machine's own; where there are some, power is not looked at.
        images_per_call: images a call runs on.
        window_s: of one turn; a turn lasts until the call that passes it is done.
        clock: seconds, the monitor's.
        sleep: lets time pass without work.
        progress: called with ("energy", share done).
    """
    if not counters and not any(channel.kind == "power" for channel in monitor.channels):
        return {}

    def window(work: Callable[[], int]) -> Window:
        before, start = [counter.joules() for counter in counters], clock()
        calls = work()
        end = clock()
        return Window(start, end, calls, (before, [counter.joules() for counter in counters]))

    def rest() -> int:
        sleep(window_s)
        return 0

    def repeat(run: Runner) -> int:
        calls, until = 0, clock() + window_s
        while calls == 0 or clock() < until:
            run()
            calls += 1
        return calls

    report = progress or (lambda step, share: None)
    idle, busy = window(rest), {name: list[Window]() for name in runners}
    for turn in range(TURNS):
        for i, name in enumerate(round_order(list(runners), turn)):
            busy[name].append(window(partial(repeat, runners[name])))
            report("energy", (turn + (i + 1) / len(runners)) / TURNS)
    if not counters:
        sleep(2 / monitor.hz)  # a reading behind the last window
    made = {name: _energy(windows, idle, monitor, counters, images_per_call) for name, windows in busy.items()}
    return {name: result for name, result in made.items() if result is not None}


def _energy(
    windows: Sequence[Window], idle: Window, monitor: Monitor, counters: Sequence[Counter], images_per_call: int
) -> EnergyResult | None:
    total_s, images = sum(w.end_s - w.start_s for w in windows), images_per_call * sum(w.calls for w in windows)
    if counters:
        told = [counted(w) for w in windows]
        at_rest, readings, method = counted(idle), 2 * len(windows), "counter"
        source, rail = counters[0].source, " + ".join(counter.rail for counter in counters)
    else:
        rails = _rails(monitor, windows)
        told = [_integral(monitor, rails, w) for w in windows]
        at_rest, method = _integral(monitor, rails, idle), "power over time"
        readings = sum(w.start_s <= at <= w.end_s for w in windows for at, _ in monitor.log)
        if not rails:
            return None
        source, rail = rails[0].source, " + ".join(channel.name for channel in rails)
    known = [joules for joules in told if joules is not None]
    if len(known) < len(told) or total_s <= 0:
        return None
    joules, idle_s = sum(known), idle.end_s - idle.start_s
    idle_w = None if at_rest is None or idle_s <= 0 else at_rest / idle_s
    net = None if idle_w is None else (joules - idle_w * total_s) / images
    return EnergyResult(joules / images, net, joules / total_s, idle_w, method, source, rail, total_s, images, readings)


def counted(window: Window) -> float | None:
    """Return what the counters counted in a window; None when one could not be read."""
    pairs = list(zip(*window.counters, strict=True))
    known = [after - before for before, after in pairs if before is not None and after is not None]
    return sum(known) if len(known) == len(pairs) else None


def _rails(monitor: Monitor, windows: Sequence[Window]) -> list[Channel]:
    """Return the rails that together are the whole board."""
    found = monitor.power(windows[0].start_s, windows[-1].end_s)
    means = {channel: sum(w for _, w in readings) / len(readings) for channel, readings in found.items()}
    by_name = {channel.name: channel for channel in means}
    results = [ChannelResult(c.name, c.kind, c.unit, c.source, [], mean, mean, mean) for c, mean in means.items()]
    return [by_name[rail.name] for rail in whole_board(results)]


def _integral(monitor: Monitor, rails: Sequence[Channel], window: Window) -> float | None:
    found = monitor.power(window.start_s, window.end_s)
    parts = [integrate(found.get(rail, ()), window.start_s, window.end_s) for rail in rails]
    known = [part for part in parts if part is not None]
    return sum(known) if parts and len(known) == len(parts) else None


def integrate(readings: Readings, start: float, end: float) -> float | None:
    """Return the integral of readings (time, value) from one moment to another, by trapezoids.

    Between readings the value is a straight line; before the first and behind the last one it stays. None without a
    reading.
    """
    if not readings or end <= start:
        return None
    inside = [(at, value) for at, value in readings if start < at < end]
    points = [(start, _value_at(readings, start)), *inside, (end, _value_at(readings, end))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def _value_at(readings: Readings, moment: float) -> float:
    before = [(at, value) for at, value in readings if at <= moment]
    after = [(at, value) for at, value in readings if at > moment]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (t0, v0), (t1, v1) = before[-1], after[0]
    return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)
