from __future__ import annotations

from collections.abc import Callable

import pytest

from edgeprune.bench.energy import integrate, measure_energy
from edgeprune.bench.telemetry import Channel, Monitor
from tests.helpers.telemetry import Time, Told


class Board:
    """A board that takes `idle_w`, and while a runner works what that takes; it counts its energy."""

    rail, source = "package-0", "rapl"

    def __init__(self, idle_w: float = 2.0) -> None:
        self.time, self.idle_w, self.energy_j = Time(), idle_w, 0.0
        self.told = Told(Channel("VDD_IN", "power", "W", "ina3221"), idle_w)
        self.monitor = Monitor([self.told], clock=self.time)
        self.order: list[str] = []

    def spend(self, seconds: float, watts: float) -> None:
        self.told._values = [watts]
        for passes in (1e-9, seconds - 2e-9):  # read when it has begun, and before it ends
            self.time.now += passes
            self.monitor.read()
        self.time.now += 1e-9
        self.energy_j += watts * seconds

    def runner(self, name: str, seconds: float, watts: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.spend(seconds, watts)

        return run

    def joules(self) -> float | None:
        return self.energy_j

    def sleep(self, seconds: float) -> None:
        self.spend(seconds, self.idle_w)


@pytest.mark.parametrize("counters", [True, False])
def test_energy_of_an_image_is_what_the_board_took_while_one_graph_ran(counters: bool) -> None:
    board = Board()
    runners = {"dense": board.runner("dense", 0.5, 10.0), "pruned": board.runner("pruned", 0.25, 8.0)}
    found = measure_energy(
        runners,
        board.monitor,
        [board] if counters else [],
        images_per_call=4,
        window_s=1.0,
        clock=board.time,
        sleep=board.sleep,
    )
    dense, pruned = found["dense"], found["pruned"]
    assert dense.joules_per_image == pytest.approx(10 * 0.5 / 4)
    assert dense.net_joules_per_image == pytest.approx(8 * 0.5 / 4)
    assert pruned.joules_per_image == pytest.approx(8 * 0.25 / 4)
    assert (dense.mean_w, dense.idle_w) == (pytest.approx(10.0), pytest.approx(2.0))
    assert (dense.images, pruned.images, dense.window_s) == (16, 32, pytest.approx(2.0))
    assert (dense.method, dense.rail) == (("counter", "package-0") if counters else ("power over time", "VDD_IN"))
    assert board.order == ["dense"] * 2 + ["pruned"] * 8 + ["dense"] * 2


def test_a_board_that_tells_no_power_has_no_energy() -> None:
    board = Board()
    nothing = Monitor([], clock=board.time)
    assert measure_energy({"dense": board.runner("dense", 1, 1)}, nothing, [], images_per_call=1) == {}
    assert board.order == []


def test_a_counter_that_fails_tells_no_energy() -> None:
    board = Board()
    board.joules = lambda: None  # type: ignore[method-assign]
    runners = {"dense": board.runner("dense", 1.0, 1.0)}
    options = {"images_per_call": 1, "window_s": 1.0, "clock": board.time, "sleep": board.sleep}
    assert measure_energy(runners, board.monitor, [board], **options) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("readings", "start", "end", "expected"),
    [
        ([(0, 1), (2, 3)], 0, 2, 4.0),
        ([(0, 1), (2, 3)], 1, 2, 2.5),
        ([(0, 5)], 1, 3, 10.0),
        ([(5, 5)], 1, 3, 10.0),
        ([(0, 1), (1, 3), (2, 1)], 0, 2, 4.0),
        ([], 0, 1, None),
        ([(0, 1)], 1, 1, None),
    ],
)
def test_power_is_integrated_by_trapezoids(
    readings: list[tuple[float, float]], start: float, end: float, expected: float | None
) -> None:
    assert integrate(readings, start, end) == expected
