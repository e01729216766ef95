from __future__ import annotations

from collections import Counter

import pytest

from edgeprune.runtime.governor import Policy, Step, observe, start
from edgeprune.runtime.null import NullDevice, Thermal

LATENCY_MS = (12.0, 8.8, 6.6, 4.4)
POLICY = Policy(deadline_ms=15.0)


def drive(device: NullDevice, seconds: float, *, governed: bool = True) -> tuple[list[bool], list[int], list[Step]]:
    """Return per run whether it missed the deadline and the level it ran at, and the steps."""
    state, missed, levels, steps = start(POLICY, LATENCY_MS), [], [], []
    while device.now_s < seconds:
        levels.append(state.level)
        seen = device.run(state.level)
        missed.append(seen.latency_ms > POLICY.deadline_ms)
        if governed:
            state, step = observe(POLICY, LATENCY_MS, state, seen)
            steps += [step] if step else []
    return missed, levels, steps


def test_a_run_takes_its_time() -> None:
    device = NullDevice((4.0, 2.0))
    first, second = device.run(0), device.run(1)
    assert (first.time_s, first.latency_ms) == (pytest.approx(0.004), 4.0)
    assert (second.time_s, second.latency_ms) == (pytest.approx(0.006), 2.0)
    assert (first.temperature_c, first.throttled, first.hot_c) == (None, None, None)


def test_runs_start_once_per_frame_unless_late() -> None:
    device = NullDevice((4.0, 30.0), frame_s=0.02)
    assert [device.run(level).time_s for level in (0, 0, 1, 0)] == pytest.approx([0.004, 0.024, 0.07, 0.074])


def test_loads_multiply_latency_between_their_times() -> None:
    device = NullDevice((4.0,), frame_s=1.0, loads=[(1.0, 3.0, 2.0), (2.0, 4.0, 3.0)])
    assert [device.run(0).latency_ms for _ in range(5)] == [4.0, 8.0, 24.0, 12.0, 4.0]


def test_jitter_repeats_with_its_seed() -> None:
    def latencies(seed: int) -> list[float]:
        device = NullDevice((4.0,), jitter=0.1, seed=seed)
        return [device.run(0).latency_ms for _ in range(20)]

    assert latencies(1) == latencies(1) != latencies(2)
    assert len(set(latencies(1))) == 20
    assert min(latencies(1)) > 0


def test_work_heats_and_idling_cools() -> None:
    thermal = Thermal(ambient_c=40.0, rise_c=50.0, tau_s=10.0)
    device = NullDevice((10_000.0,), thermal=thermal)
    assert device.run(0).temperature_c == pytest.approx(40 + 50 * 0.632, abs=0.1)
    device.idle(10.0)
    assert device.temperature_c == pytest.approx(40 + 50 * 0.632 * 0.368, abs=0.1)
    device.idle(1000.0)
    assert device.temperature_c == pytest.approx(40.0)


def test_throttling_lasts_until_it_has_cooled() -> None:
    thermal = Thermal(ambient_c=40.0, rise_c=70.0, tau_s=10.0, trip_c=95.0, release_c=80.0, slowdown=2.0)
    device = NullDevice((1000.0,), thermal=thermal)
    seen = [device.run(0) for _ in range(20)]
    first = next(i for i, o in enumerate(seen) if o.throttled)
    assert [o.latency_ms for o in seen[: first + 2]] == [1000.0] * (first + 1) + [2000.0]
    assert seen[0].hot_c == 95.0
    device.idle(1.0)
    assert device.throttled
    device.idle(10.0)
    assert not device.throttled


def test_the_governor_keeps_the_deadline_under_load() -> None:
    def device() -> NullDevice:
        return NullDevice(LATENCY_MS, frame_s=0.02, loads=[(10.0, 30.0, 1.9)], jitter=0.03)

    without, _, _ = drive(device(), 60.0, governed=False)
    missed, levels, steps = drive(device(), 60.0)
    assert sum(without) > 800
    assert sum(missed) < sum(without) / 20
    assert [(s.before, s.after) for s in steps] == [(0, 2), (2, 1), (1, 0)]
    assert levels[:400] == [0] * 400
    assert levels[-500:] == [0] * 500


def test_the_governor_keeps_the_deadline_in_a_hot_place() -> None:
    def device() -> NullDevice:
        return NullDevice(LATENCY_MS, frame_s=0.02, jitter=0.03, thermal=Thermal(ambient_c=65.0, rise_c=60.0))

    without, _, _ = drive(device(), 900.0, governed=False)
    missed, levels, steps = drive(device(), 900.0)
    assert sum(without) > len(without) / 3
    assert sum(missed) < len(missed) / 100
    assert steps[0].reason == "throttled"
    late = [step for step in steps if step.time_s > 300]
    assert len(late) <= 2 * 600 / 60 + 3
    assert Counter(levels)[3] < len(levels) / 2  # it does not hide at the sparsest level
