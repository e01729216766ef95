from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from edgeprune.bench.measure import MeasurePlan, SystemClock, measure, round_order
from edgeprune.bench.stats import MIN_BLOCKS
from edgeprune.errors import InputError

PLAN = MeasurePlan(rounds=4, warmup_s=0.0, visit_s=0.0)


class FakeClock:
    """Time that only the runners move."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.calls: list[str] = []

    def wall(self) -> float:
        return self.wall_s

    def cpu(self) -> float:
        return self.cpu_s

    def runner(self, name: str, *wall_s: float, cpu_share: float = 1.0) -> Callable[[], None]:
        """A runner that takes the given times in turn, the last one for ever."""
        times = list(wall_s)

        def run() -> None:
            seconds = times.pop(0) if len(times) > 1 else times[0]
            self.calls.append(name)
            self.wall_s += seconds
            self.cpu_s += seconds * cpu_share

        return run


def test_round_order_turns_around_every_second_round() -> None:
    assert [round_order(["a", "b", "c"], i) for i in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_measure_interleaves_in_abba_blocks() -> None:
    clock = FakeClock()
    runners = {"a": clock.runner("a", 0.1), "b": clock.runner("b", 0.2)}
    result = measure(runners, PLAN, clock=clock)
    measured = clock.calls[result.warmup_rounds * 2 :]
    assert "".join(measured) == "abba" * 2


def test_measure_keeps_raw_samples_of_both_clocks() -> None:
    clock = FakeClock()
    runners = {"a": clock.runner("a", 0.1), "b": clock.runner("b", 0.2, cpu_share=0.5)}
    samples = measure(runners, PLAN, clock=clock).samples
    assert samples["a"].wall_ms == pytest.approx([100] * 4)
    assert samples["b"].wall_ms == pytest.approx([200] * 4)
    assert samples["b"].cpu_ms == pytest.approx([100] * 4)


def test_measure_makes_odd_rounds_even() -> None:
    clock = FakeClock()
    plan = MeasurePlan(rounds=3, visit_s=0.0)
    result = measure({"a": clock.runner("a", 0.1)}, plan, clock=clock)
    assert (result.rounds, len(result.samples["a"].wall_ms)) == (4, 4)


def test_measure_lasts_for_the_duration() -> None:
    clock = FakeClock()
    plan = MeasurePlan(duration_s=10.0, visit_s=0.0)
    result = measure({"a": clock.runner("a", 0.125), "b": clock.runner("b", 0.125)}, plan, clock=clock)
    assert result.rounds == 40
    assert result.elapsed_s == 10.0


def test_measure_takes_enough_blocks_when_the_duration_is_short() -> None:
    clock = FakeClock()
    result = measure({"a": clock.runner("a", 1.0)}, MeasurePlan(duration_s=1.0, visit_s=0.0), clock=clock)
    assert result.rounds == 2 * MIN_BLOCKS


def test_measure_repeats_calls_when_runs_are_short() -> None:
    clock = FakeClock()
    plan = MeasurePlan(rounds=2, visit_s=0.01)
    result = measure({"a": clock.runner("a", 0.0035), "b": clock.runner("b", 0.5)}, plan, clock=clock)
    assert result.calls_per_visit == 3
    assert "".join(clock.calls[result.warmup_rounds * 2 :]) == "aaabbb" + "bbbaaa"


def test_warm_up_ends_when_times_stand_still() -> None:
    clock = FakeClock()
    falling = [4.0] * 3 + [2.0] * 3 + [1.0] * 3 + [1.0]
    result = measure({"a": clock.runner("a", *falling)}, MeasurePlan(rounds=2, max_warmup_s=100.0), clock=clock)
    assert (result.warmup_rounds, result.warm) == (12, True)
    assert result.samples["a"].wall_ms == pytest.approx([1000, 1000])


def test_warm_up_waits_for_the_slowest_to_settle() -> None:
    clock = FakeClock()
    runners = {"a": clock.runner("a", 1.0), "b": clock.runner("b", *[3.0] * 3, *[2.0] * 3, 1.0)}
    result = measure(runners, MeasurePlan(rounds=2, max_warmup_s=100.0), clock=clock)
    assert result.warmup_rounds == 12


def test_warm_up_lasts_its_shortest_time_when_already_steady() -> None:
    clock = FakeClock()
    result = measure({"a": clock.runner("a", 0.01)}, MeasurePlan(rounds=2, warmup_s=0.2), clock=clock)
    assert result.warmup_rounds >= 20


def test_warm_up_gives_up_and_says_so_when_times_never_settle() -> None:
    clock = FakeClock()
    growing = [1.1**i for i in range(60)]
    plan = MeasurePlan(rounds=2, max_warmup_s=5.0)
    result = measure({"a": clock.runner("a", *growing)}, plan, clock=clock)
    assert result.warm is False


def test_measure_reports_both_steps_up_to_one() -> None:
    clock = FakeClock()
    seen: list[tuple[str, float]] = []
    measure(
        {"a": clock.runner("a", 0.1)},
        PLAN,
        clock=clock,
        progress=lambda step, share: seen.append((step, share)),
    )
    assert [step for step, share in seen if share == 1.0] == ["warm-up", "measure"]
    assert all(0 <= share <= 1 for _, share in seen)


def test_measure_switches_garbage_collection_back_on_when_a_runner_fails() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        measure({"a": fail}, PLAN)
    assert gc.isenabled()


@pytest.mark.parametrize(("runners", "rounds"), [({}, 2), ({"a": lambda: None}, 0)])
def test_measure_refuses_nothing_to_do(runners: dict[str, Callable[[], None]], rounds: int) -> None:
    with pytest.raises(InputError) as error:
        measure(runners, MeasurePlan(rounds=rounds))
    assert error.value.code == "bench-plan"


def test_system_clock_counts_work_on_both_clocks() -> None:
    clock = SystemClock()
    wall, cpu = clock.wall(), clock.cpu()
    sum(range(200_000))
    assert clock.wall() > wall
    assert clock.cpu() > cpu


def test_per_run_divides_the_samples_of_a_pass() -> None:
    clock = FakeClock()
    passes = measure({"a": clock.runner("a", 0.4, cpu_share=0.5)}, PLAN, clock=clock)
    runs = passes.per_run(4)
    assert runs.samples["a"].wall_ms == pytest.approx([100] * 4)
    assert runs.samples["a"].cpu_ms == pytest.approx([50] * 4)
    assert runs.rounds == passes.rounds
