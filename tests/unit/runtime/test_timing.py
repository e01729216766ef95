from __future__ import annotations

from edgeprune.runtime.timing import DeviceTimer


def test_a_timer_adds_up_the_graphs_of_a_run() -> None:
    timer = DeviceTimer()
    timer.add(2.0, 0.25)
    timer.add(1.0, 0.5)
    assert timer.take() == (3.0, 0.75)


def test_a_timer_tells_nothing_without_a_run() -> None:
    timer = DeviceTimer()
    assert timer.take() is None
    timer.add(1.0, 0.1)
    timer.take()
    assert timer.take() is None
