from __future__ import annotations

import pytest

from edgeprune.bench.measure import MeasurePlan, measure
from edgeprune.bench.scenarios import Scenario, parse_scenario, query_batch, scenario_result, window_width
from edgeprune.bench.telemetry import Channel, Monitor
from edgeprune.errors import InputError
from tests.helpers.telemetry import Time, Told

PLAN = MeasurePlan(rounds=4, warmup_s=0.0, visit_s=0.0)


class Device(Time):
    """A device whose runs take the given seconds in turn, the last for ever."""

    def runner(self, *seconds: float) -> object:
        times = list(seconds)

        def run() -> None:
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("single-stream", Scenario()),
        ("multi-stream", Scenario("multi-stream", query=8)),
        ("multi-stream:4", Scenario("multi-stream", query=4)),
        ("fixed-fps", Scenario("fixed-fps", fps=30.0)),
        ("fixed-fps:12.5", Scenario("fixed-fps", fps=12.5)),
        ("sustained", Scenario("sustained", duration_s=600.0)),
        ("sustained:10m", Scenario("sustained", duration_s=600.0)),
        ("sustained:90", Scenario("sustained", duration_s=90.0)),
        ("sustained:1h", Scenario("sustained", duration_s=3600.0)),
    ],
)
def test_scenarios_by_their_names(text: str, expected: Scenario) -> None:
    assert parse_scenario(text) == expected
    assert parse_scenario(expected.text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("offline", "no such scenario"),
        ("", "no such scenario"),
        ("single-stream:1", "takes no value"),
        ("multi-stream:1", "not within 2"),
        ("multi-stream:2.5", "not a whole number"),
        ("multi-stream:", "not a whole number"),
        ("fixed-fps:0", "not within 0.1"),
        ("fixed-fps:fast", "not a number"),
        ("fixed-fps:nan", "not a number"),
        ("sustained:10 minutes", "not a duration"),
        ("sustained:0s", "not within 1s"),
        ("sustained:48h", "not within 1s"),
    ],
)
def test_what_is_no_scenario_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_scenario(text)
    assert (caught.value.code, caught.value.exit_code) == ("bench-scenario", 2)
    assert "sustained:10m" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("query", "batch", "allowed", "expected"),
    [(8, None, (1, 8), 8), (8, None, (1, 3), 2), (8, 4, (1, 8), 4), (6, None, (1, 4), 3), (8, None, (1, 64), 8)],
)
def test_a_query_runs_in_the_largest_batch_that_divides_it(
    query: int, batch: int | None, allowed: tuple[int, int], expected: int
) -> None:
    assert query_batch(query, batch, allowed) == expected


@pytest.mark.parametrize(("query", "batch", "allowed"), [(8, 3, (1, 8)), (7, None, (2, 4)), (4, None, (8, 8))])
def test_a_query_that_no_batch_divides_is_refused(query: int, batch: int | None, allowed: tuple[int, int]) -> None:
    with pytest.raises(InputError) as caught:
        query_batch(query, batch, allowed)
    assert caught.value.code == "bench-scenario"


def test_plans_follow_the_scenario_and_quick_ones_stay_short() -> None:
    assert parse_scenario("sustained:10m").plan(PLAN, quick=False).duration_s == 600
    assert parse_scenario("sustained:10m").plan(PLAN, quick=True).duration_s == PLAN.duration_s
    frames = parse_scenario("fixed-fps:50").plan(PLAN, quick=True)
    assert (frames.frame_s, frames.visit_s) == (0.02, 0.25)
    assert Scenario().plan(PLAN, quick=False) == PLAN


def frames_of(device: Device, runner: object, fps: float = 10.0, visit_s: float = 0.3) -> object:
    plan = MeasurePlan(rounds=2, warmup_s=0.0, visit_s=visit_s, frame_s=1 / fps)
    return measure({"a": runner}, plan, clock=device)  # type: ignore[dict-item]


def test_frames_wait_for_their_time() -> None:
    device = Device()
    measured = frames_of(device, device.runner(0.02))
    samples = measured.samples["a"]  # type: ignore[attr-defined]
    assert len(samples.wall_ms) == 6  # two visits of three frames
    assert samples.wall_ms == pytest.approx([20] * 6)
    assert samples.run_ms == pytest.approx([20] * 6)
    assert [b - a for a, b in zip(samples.at_s[:2], samples.at_s[1:3], strict=True)] == pytest.approx([0.1, 0.1])
    result = scenario_result(Scenario("fixed-fps", fps=10), measured, None, samples_per_query=1)  # type: ignore[arg-type]
    frames = result.runners[0].frames
    assert frames is not None
    assert (frames.due, frames.dropped, frames.late, frames.missed) == (6, 0, 0, 0.0)


def test_latency_counts_from_the_moment_a_frame_was_due() -> None:
    device = Device()
    late = device.runner(*[0.02] * 6, 0.15, 0.02, 0.02, 0.02)  # six to warm up
    samples = frames_of(device, late).samples["a"]  # type: ignore[attr-defined]
    assert samples.wall_ms[:3] == pytest.approx([150, 70, 20])  # the second frame waited 50 ms
    assert samples.run_ms[:3] == pytest.approx([150, 20, 20])
    assert samples.dropped == 0


def test_a_graph_that_is_too_slow_drops_frames() -> None:
    device = Device()
    measured = frames_of(device, device.runner(0.35), visit_s=0.2)
    samples = measured.samples["a"]  # type: ignore[attr-defined]
    # frames 0 and 3 of a visit run: 1 and 2 are never run, and 4 and 5 not because 6 is there when 3 is done
    assert samples.dropped == 2 * (2 + 3)
    assert samples.wall_ms[:2] == pytest.approx([350, 400])
    result = scenario_result(Scenario("fixed-fps", fps=10), measured, None, samples_per_query=1)  # type: ignore[arg-type]
    frames = result.runners[0].frames
    assert frames is not None
    assert (frames.due, frames.late, frames.missed) == (14, 4, 1.0)
    assert frames.start_delay_ms == pytest.approx(25.0)


def test_windows_are_minutes_or_tenths() -> None:
    assert window_width(600) == window_width(120) == 60
    assert window_width(30) == 3


def test_a_sustained_bench_compares_its_first_window_with_its_last() -> None:
    device = Device()
    heat = Told(Channel("cpu-thermal", "temperature", "C", "thermal"), *range(40, 60))
    clock = Told(Channel("cpu0", "clock", "MHz", "cpufreq"), *[2000.0] * 10, 1000.0)
    throttle = Told(Channel("cpu is limited", "throttle", "", "thermal"), *[0.0] * 10, 1.0)
    plan = MeasurePlan(rounds=20, warmup_s=0.0, max_warmup_s=1.0, visit_s=0.0)
    runner = device.runner(*[1.0] * 13, *[2.0] * 10)  # three to warm up
    measured = measure({"a": runner}, plan, clock=device)  # type: ignore[dict-item]
    monitor = Monitor([heat, clock, throttle], clock=device)
    device.now = measured.started_s
    for _ in range(20):
        monitor.read()
        device.now += 1.5
    telemetry = monitor.result(measured.started_s, measured.elapsed_s)
    result = scenario_result(Scenario("sustained", duration_s=30), measured, telemetry, samples_per_query=1)
    (one,) = result.runners
    assert result.window_s == pytest.approx(3.0)
    assert sum(window.n for window in one.windows) == 20
    assert one.last_over_first == 2.0
    first, last = one.windows[0], one.windows[-1]
    assert (first.median_wall_ms, last.median_wall_ms) == (1000.0, 2000.0)
    assert (first.temperature_c, last.temperature_c) == (41, 59)
    assert (first.mhz, last.mhz) == (2000.0, 1000.0)
    assert (first.throttled, last.throttled) == (False, True)
    assert first.watts is None


def test_headlines_are_those_of_mlperf() -> None:
    device = Device()
    measured = measure({"a": device.runner(0.1)}, PLAN, clock=device)  # type: ignore[dict-item]
    headline = {
        kind: scenario_result(Scenario(kind), measured, None, samples_per_query=1).headline
        for kind in ("single-stream", "multi-stream")
    }
    assert headline == {"single-stream": "p90", "multi-stream": "p99"}
