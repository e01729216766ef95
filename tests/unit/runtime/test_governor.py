from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.runtime.governor import Observation, Policy, State, Step, observe, start

TRACES = Path(__file__).parents[2] / "fixtures" / "governor"
COSTS = (1.0, 0.7, 0.5, 0.3)
LAST = len(COSTS) - 1
POLICY = Policy(deadline_ms=8.0)


def replay(
    policy: Policy, observations: Iterable[Observation], *, state: State | None = None
) -> tuple[State, list[Step], list[State]]:
    """Return the last state, every step and the state after each."""
    state = state or start(policy, COSTS)
    steps, after = [], []
    for observation in observations:
        state, step = observe(policy, COSTS, state, observation)
        if step:
            steps.append(step)
            after.append(state)
    return state, steps, after


def runs(latency_ms: float, count: int, *, since: float = 0.0, every: float = 0.1, **told: Any) -> list[Observation]:
    return [Observation(since + i * every, latency_ms, **told) for i in range(count)]


# Down


def test_overload_steps_down_after_the_fewest_samples_to_the_densest_level_that_fits() -> None:
    state, steps, _ = replay(POLICY, runs(11.0, 8))
    assert [(s.before, s.after, s.p95_ms, s.time_s) for s in steps] == [(0, 1, 11.0, pytest.approx(0.7))]
    assert steps[0].reason == "p95 11 ms over the deadline of 8 ms"
    assert (state.level, state.runs_ms) == (1, ())


@pytest.mark.parametrize(
    ("latency_ms", "level"), [(8.0, 0), (8.1, 1), (11.5, 2), (16.1, 3), (1000.0, 3), (math.inf, 3)]
)
def test_overload_jumps_as_far_as_costs_predict(latency_ms: float, level: int) -> None:
    assert replay(POLICY, runs(latency_ms, 8))[0].level == level


def test_a_wrong_prediction_is_corrected_after_the_dwell() -> None:
    _, steps, _ = replay(replace(POLICY, down_dwell_s=2.0), runs(11.0, 40))
    assert [(s.after, s.time_s) for s in steps[:2]] == [(1, pytest.approx(0.7)), (2, pytest.approx(2.7))]


def test_one_run_far_off_does_not_decide_how_far_to_go() -> None:
    assert replay(POLICY, [*runs(10.0, 7), Observation(0.7, 500.0)])[0].level == 1


def test_a_miss_in_twenty_is_allowed() -> None:
    latencies = [12.0 if i % 20 == 0 else 6.0 for i in range(2000)]
    assert replay(POLICY, [Observation(i / 50, ms) for i, ms in enumerate(latencies)])[1] == []


def test_a_miss_in_four_is_not() -> None:
    latencies = [12.0 if i % 4 == 0 else 6.0 for i in range(200)]
    assert replay(POLICY, [Observation(i / 50, ms) for i, ms in enumerate(latencies)])[1][0].after > 0


def test_one_level_has_nowhere_to_go() -> None:
    state = start(POLICY, (1.0,))
    for observation in runs(100.0, 100, throttled=True):
        state, step = observe(POLICY, (1.0,), state, observation)
        assert step is None


# Up


def test_going_up_takes_a_dwell_a_level_at_a_time() -> None:
    _, steps, after = replay(POLICY, runs(2.0, 200), state=start(POLICY, COSTS, level=3))
    assert [(s.before, s.after) for s in steps] == [(3, 2), (2, 1), (1, 0)]
    assert [s.time_s for s in steps] == pytest.approx([5.0, 10.0, 15.0], abs=0.2)
    assert [state.runs_ms for state in after] == [()] * 3
    assert steps[0].reason == "p95 2 ms, level above predicted 3.33 ms, within 85 % of the deadline of 8 ms"


def test_going_up_needs_headroom() -> None:
    below, above = 0.85 * 8 * 0.7 - 0.01, 0.85 * 8 * 0.7 + 0.01
    assert replay(POLICY, runs(above, 400), state=start(POLICY, COSTS, level=1))[0].level == 1
    assert replay(POLICY, runs(below, 400), state=start(POLICY, COSTS, level=1))[0].level == 0


def dwells(policy: Policy, hold_s: float, turns: int) -> list[float]:
    """Return the dwell after each step down, when every step up is taken back after a time."""
    state, now, seen = start(policy, COSTS, level=1), 0.0, []
    while len(seen) < turns:
        now += 0.1
        overloaded = state.level == 0 and now - (state.raised_s or state.stepped_s) >= hold_s
        before = state
        state, step = observe(policy, COSTS, state, Observation(now, 11.0 if overloaded else 2.0))
        if step and step.after > step.before:
            seen.append(state.up_dwell_s)
        elif step:
            assert now - before.stepped_s >= before.up_dwell_s - 1e-6
    return seen


def test_steps_up_that_fail_double_the_dwell_up_to_its_limit() -> None:
    assert dwells(POLICY, 2.0, 6) == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_steps_up_that_hold_do_not() -> None:
    assert dwells(POLICY, 61.0, 3) == [5.0, 5.0, 5.0]


def test_a_step_up_that_holds_halves_the_dwell() -> None:
    patient = replace(start(POLICY, COSTS, level=1), up_dwell_s=40.0)
    state, steps, _ = replay(POLICY, runs(2.0, 410), state=patient)
    assert (steps[0].time_s, state.up_dwell_s) == (pytest.approx(40.0, abs=0.11), 40.0)
    assert replay(POLICY, runs(2.0, 1100), state=patient)[0].up_dwell_s == 20.0
    assert replay(POLICY, runs(2.0, 5000), state=patient)[0].up_dwell_s == 20.0


# Heat


def test_throttling_steps_down_one_level_per_dwell() -> None:
    _, steps, _ = replay(POLICY, runs(2.0, 200, throttled=True))
    assert [(s.after, s.reason) for s in steps] == [(1, "throttled"), (2, "throttled"), (3, "throttled")]
    assert [s.time_s for s in steps] == pytest.approx([0.0, 5.0, 10.0], abs=0.2)


def test_heat_waits_after_a_step_for_the_deadline_too() -> None:
    _, steps, _ = replay(POLICY, [*runs(11.0, 8), *runs(2.0, 60, since=0.8, throttled=True)])
    assert [s.time_s for s in steps] == pytest.approx([0.7, 5.7], abs=0.2)


@pytest.mark.parametrize("told", [{"hot_c": 95.0}, {}])
def test_the_limit_comes_from_the_policy_or_the_device(told: dict[str, float]) -> None:
    policy = POLICY if told else replace(POLICY, hot_c=95.0)
    assert replay(policy, runs(2.0, 20, temperature_c=94.9, **told))[1] == []
    (step,) = replay(policy, runs(2.0, 20, temperature_c=96.0, **told))[1]
    assert (step.after, step.reason) == (1, "96.0 °C, limit 95 °C")


def test_the_policys_own_limit_comes_first() -> None:
    assert replay(replace(POLICY, hot_c=80.0), runs(2.0, 2, temperature_c=85.0, hot_c=95.0))[0].level == 1


@pytest.mark.parametrize(
    ("temperature_c", "throttled", "level"),
    [(90.0, False, 1), (89.9, False, 0), (89.9, True, 3), (None, None, 0), (math.nan, False, 0), (None, True, 3)],
)
def test_going_up_waits_until_the_device_is_cool(
    temperature_c: float | None, throttled: bool | None, level: int
) -> None:
    observations = runs(2.0, 52, temperature_c=temperature_c, throttled=throttled, hot_c=95.0)
    assert replay(POLICY, observations, state=start(POLICY, COSTS, level=1))[0].level == level


def test_a_temperature_without_a_limit_means_nothing() -> None:
    assert replay(POLICY, runs(2.0, 20, temperature_c=500.0))[1] == []


# What cannot be used


@pytest.mark.parametrize("latency_ms", [math.nan, -1.0, -math.inf])
def test_a_latency_that_is_none_does_not_count(latency_ms: float) -> None:
    state, steps, _ = replay(POLICY, runs(latency_ms, 100))
    assert (state.runs_ms, steps, state.now_s) == ((), [], pytest.approx(9.9))
    assert replay(POLICY, runs(latency_ms, 1, throttled=True))[1][0].p95_ms is None


def test_an_infinite_latency_is_a_miss() -> None:
    (step,) = replay(POLICY, runs(math.inf, 8))[1]
    assert step.reason == "p95 inf ms over the deadline of 8 ms"


def test_a_clock_that_is_set_back_or_broken_only_delays() -> None:
    times = [100.0, 101.0, 50.0, math.nan, 51.0, 51.0, math.inf, 53.0, 1e300, 54.0, 55.0]
    state, _, _ = replay(POLICY, [Observation(t, 2.0) for t in times])
    assert (state.now_s, state.clock_s) == (3605.0, 55.0)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("deadline_ms", [0.0, -1.0, math.nan, math.inf]),
        ("window", [7, 1001]),
        ("min_samples", [0, 33]),
        ("percentile", [0.0, 100.0, math.nan]),
        ("headroom", [0.0, 1.0, math.nan]),
        ("down_dwell_s", [-1.0, math.nan, math.inf]),
        ("up_dwell_s", [0.0, 61.0, math.nan]),
        ("max_up_dwell_s", [4.9, math.inf]),
        ("probation_s", [-1.0, math.inf]),
        ("heat_dwell_s", [-1.0, math.nan]),
        ("hot_c", [math.nan, math.inf]),
        ("cool_margin_c", [-1.0, math.nan]),
    ],
)
def test_policy_refuses_what_makes_no_sense(field: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(InputError) as error:
            replace(POLICY, **{field: value})
        assert error.value.code == "governor"


@pytest.mark.parametrize("costs", [(), (1.0, 1.1), (1.0, 0.0), (math.nan,), (math.inf, 1.0), (1.0, math.nan)])
def test_start_refuses_costs_that_do_not_fall(costs: tuple[float, ...]) -> None:
    with pytest.raises(InputError) as error:
        start(POLICY, costs)
    assert error.value.code == "governor"


@pytest.mark.parametrize("level", [-1, 4])
def test_start_refuses_a_level_there_is_not(level: int) -> None:
    with pytest.raises(InputError, match=f"level {level}"):
        start(POLICY, COSTS, level)


# What holds for every trace

LATENCIES = st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1.0, 4.0, 6.5, 8.0, 8.1, 12.0, 100.0]) | st.floats()
SEGMENT = st.tuples(
    st.integers(1, 60),
    st.sampled_from([-100.0, -0.5, 0.0, 0.001, 0.05, 0.3, 1.0, 7.0]) | st.floats(),
    LATENCIES,
    LATENCIES,
    st.sampled_from([None, 50.0, 92.0, 96.0, math.nan]),
    st.sampled_from([None, False, False, True]),
)
POLICIES = st.builds(
    Policy,
    deadline_ms=st.just(8.0),
    window=st.integers(8, 40),
    min_samples=st.integers(1, 8),
    percentile=st.sampled_from([50.0, 95.0, 99.9]),
    down_dwell_s=st.sampled_from([0.0, 0.25]),
    up_dwell_s=st.sampled_from([0.1, 1.0, 5.0]),
    max_up_dwell_s=st.sampled_from([5.0, 60.0]),
    probation_s=st.sampled_from([0.0, 7.0, 60.0]),
    heat_dwell_s=st.sampled_from([0.0, 5.0]),
)


def trace(segments: list[Any]) -> list[Observation]:
    """Observations of segments of (runs, seconds apart, even latency, odd latency, temperature, throttled)."""
    now, seen = 0.0, []
    for count, every, even, odd, temperature_c, throttled in segments:
        for i in range(count):
            now = now + every if math.isfinite(now + every) else 0.0
            seen.append(Observation(now, odd if i % 2 else even, temperature_c, throttled, hot_c=95.0))
    return seen


def most_turns(policy: Policy) -> int:
    gap, total, turns = policy.up_dwell_s, policy.up_dwell_s, 1
    while total <= policy.probation_s:
        gap, turns = min(2 * gap, policy.max_up_dwell_s), turns + 1
        total += gap
    return turns


def assert_bounded(policy: Policy, steps: list[Step], after: list[State]) -> None:
    times = [state.stepped_s for state in after]
    for seconds in (0.5, 6.0, 60.0, 600.0):
        most = LAST + 2 * (1 + math.floor(seconds / policy.up_dwell_s))
        assert most_within(times, seconds) <= most
    rises = [step.after < step.before for step in steps]
    turns = [time for time, rose, now_rose in zip(times[1:], rises, rises[1:], strict=False) if rose and not now_rose]
    assert most_within(turns, policy.probation_s) <= most_turns(policy)


def most_within(times: list[float], seconds: float) -> int:
    """The most of the times, which never fall, within a span slightly shorter than so many seconds."""
    first, most = 0, 0
    for last, time in enumerate(times):
        while time - times[first] > seconds * (1 - 1e-9):
            first += 1
        most = max(most, last + 1 - first)
    return most


@given(POLICIES, st.lists(SEGMENT, max_size=25))
@settings(max_examples=150)
def test_steps_are_bounded_for_every_trace(policy: Policy, segments: list[Any]) -> None:
    _, steps, after = replay(policy, trace(segments))
    assert_bounded(policy, steps, after)
    assert all(0 <= step.after <= LAST and step.before - step.after <= 1 for step in steps)
    assert [step.before for step in steps[1:]] == [step.after for step in steps[:-1]]


@pytest.mark.parametrize("hold_s", [0.0, 3.0, 59.0, 60.1])
@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("to_last", [False, True])
def test_steps_are_bounded_against_an_adversary_that_sees_the_state(hold_s: float, top: int, to_last: bool) -> None:
    state, steps, after = start(POLICY, COSTS), [], []
    for i in range(20_000):
        held = state.now_s - state.stepped_s >= hold_s
        overload = (100.0 if to_last else 8.1) if state.level <= top and held else 0.1
        state, step = observe(POLICY, COSTS, state, Observation(i * 0.05, overload))
        if step:
            steps.append(step)
            after.append(state)
    assert_bounded(POLICY, steps, after)
    assert len(steps) > 5
    if hold_s < 60:
        assert sum(step.after < step.before for step in steps if step.time_s > 300) <= (700 / 60 + 1) * LAST


@given(POLICIES, st.lists(SEGMENT, max_size=12))
@settings(max_examples=100)
def test_level_0_comes_back_from_every_state(policy: Policy, segments: list[Any]) -> None:
    state, _, _ = replay(policy, trace(segments))
    every, since = 0.1, 1000.0
    bound_s = LAST * policy.max_up_dwell_s + len(COSTS) * policy.window * every
    calm = [Observation(since + i * every, 1.0, 89.0, False, 95.0) for i in range(1, math.floor(bound_s / every) + 1)]
    assert replay(policy, calm, state=state)[0].level == 0


@given(POLICIES, st.lists(SEGMENT, max_size=12))
@settings(max_examples=100)
def test_the_sparsest_level_is_reached_when_every_run_misses(policy: Policy, segments: list[Any]) -> None:
    state, _, _ = replay(policy, trace(segments))
    every, since = 0.01, 1000.0
    count = policy.window + LAST * policy.min_samples + math.ceil(LAST * policy.down_dwell_s / every)
    misses = [Observation(since + i * every, 8.1) for i in range(1, count + 1)]
    assert replay(policy, misses, state=state)[0].level == LAST


@given(st.floats(8.1, 26.0))
@settings(max_examples=30)
def test_the_densest_level_that_fits_is_reached_and_kept(dense_ms: float) -> None:
    fits = next(i for i, cost in enumerate(COSTS) if dense_ms * cost <= 8.0)
    state, steps = start(POLICY, COSTS), []
    for i in range(3000):
        state, step = observe(POLICY, COSTS, state, Observation(i * 0.05, dense_ms * COSTS[state.level]))
        steps += [step] if step else []
    assert [(s.before, s.after) for s in steps] == [(0, fits)]


# Traces


def load(name: str) -> list[Observation]:
    with (TRACES / name).open(newline="") as file:
        return [
            Observation(
                float(row["time_s"]),
                float(row["latency_ms"]),
                float(row["temperature_c"]) if "temperature_c" in row else None,
                row["throttled"] == "1" if "throttled" in row else None,
            )
            for row in csv.DictReader(file)
        ]


def replay_scaled(policy: Policy, observations: list[Observation]) -> tuple[list[int], list[Step], list[float]]:
    """Return per run the level it ran at and its latency, the trace's scaled to the level, and all steps."""
    state, levels, steps, latencies = start(policy, COSTS), [], [], []
    for observation in observations:
        latency_ms = observation.latency_ms * COSTS[state.level]
        levels.append(state.level)
        latencies.append(latency_ms)
        state, step = observe(policy, COSTS, state, replace(observation, latency_ms=latency_ms))
        steps += [step] if step else []
    return levels, steps, latencies


def test_recorded_load_that_comes_and_goes() -> None:
    observations = load("load_step.csv")
    policy = Policy(deadline_ms=13.0)
    levels, steps, latencies = replay_scaled(policy, observations)
    times = [o.time_s for o in observations]
    assert {level for level, t in zip(levels, times, strict=True) if t < 6} == {0}
    assert {level for level, t in zip(levels, times, strict=True) if 8 < t < 11} <= {2, 3}
    assert levels[-1] < LAST
    missed = sum(ms > 13 for ms in latencies)
    assert missed < sum(o.latency_ms > 13 for o in observations) / 3
    assert len(steps) <= 8


def test_a_board_that_heats_up_goes_down_and_comes_back() -> None:
    observations = load("heating.csv")
    policy = Policy(deadline_ms=14.0, hot_c=95.0)
    levels, steps, _ = replay_scaled(policy, observations)
    first_hot = next(i for i, o in enumerate(observations) if o.temperature_c == 95.0)
    assert set(levels[: first_hot + 1]) == {0}
    assert levels[first_hot + 1] == 1
    assert max(levels) == LAST
    assert levels[-1] == 0
    ups = [step for step in steps if step.after < step.before]
    assert all(step.time_s > 150 for step in ups[-3:])
    temperature = {o.time_s: o.temperature_c for o in observations}
    assert all((temperature[step.time_s] or 0) < 90 for step in ups)


@pytest.mark.parametrize("seed", range(3))
def test_noise_with_three_percent_outliers_does_not_step(seed: int) -> None:
    rng = random.Random(seed)
    latencies = [6.0 * math.exp(rng.gauss(0, 0.06)) * (3 if rng.random() < 0.03 else 1) for _ in range(20_000)]
    assert 0.02 < sum(ms > 8 for ms in latencies) / len(latencies) < 0.04
    assert replay(POLICY, [Observation(i / 50, ms) for i, ms in enumerate(latencies)])[1] == []


def test_level_that_fits_without_headroom_is_tried_after_the_longest_dwell() -> None:
    policy, costs, now = Policy(10.0), (9.5, 5.0), 0.0
    state, step = start(policy, costs, 1), None
    while step is None and now < 100:
        now += 0.1
        state, step = observe(policy, costs, state, Observation(now, 5.0))
    assert step is not None
    assert (step.after, step.reason.endswith("within 100 % of the deadline of 10 ms")) == (0, True)
    assert policy.max_up_dwell_s <= now <= policy.max_up_dwell_s + 1


def test_level_that_does_not_fit_is_never_tried() -> None:
    policy, costs = Policy(10.0), (10.5, 5.0)
    state = start(policy, costs, 1)
    for i in range(3000):
        state, step = observe(policy, costs, state, Observation(i * 0.1, 5.0))
        assert step is None
