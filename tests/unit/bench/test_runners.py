from __future__ import annotations

from typing import Any, cast

import numpy as np

from edgeprune.bench.runners import LoggedPass, pass_runner, switch_us
from edgeprune.runtime.router import Trace
from edgeprune.runtime.session import Result, Session

BATCHES = [np.full((1, 3, 2, 2), i, np.float32) for i in range(3)]


class FakeSession:
    """Keeps as many tokens as the image is bright; each run and each switch takes a second."""

    def __init__(self, *densities: float) -> None:
        self.densities = densities
        self.asked: list[tuple[float | None, float]] = []
        self.seconds = 0.0
        self._density = densities[0] if densities else None

    @property
    def density(self) -> float | None:
        return self._density

    @density.setter
    def density(self, rate: float) -> None:
        self.seconds += 1
        self._density = rate

    def clock(self) -> float:
        return self.seconds

    def run(self, images: np.ndarray, trace: Trace | None = None) -> Result:
        self.seconds += 1
        self.asked.append((self.density, float(images.max())))
        if trace is not None:
            trace.runs.append((0, 1))
        counts = images.max((1, 2, 3))[:, None].astype(np.int32)
        return Result(np.zeros((1, 2)), kept_counts=counts, bucket=np.zeros(1, np.int32))


def fake(*densities: float) -> Any:
    return cast(Session, FakeSession(*densities))


def test_pass_runs_all_batches_at_its_density() -> None:
    session = fake(1.0, 0.5)
    pass_runner(session, BATCHES, 0.5)()
    assert session.asked == [(0.5, 0), (0.5, 1), (0.5, 2)]


def test_logged_pass_takes_every_run_down() -> None:
    session = fake(1.0, 0.5)
    log = LoggedPass(session, BATCHES, 0.5, session.clock)
    log()
    log()
    assert [run.wall_s for run in log.runs] == [1.0] * 6  # the switch does not count
    assert [int(run.counts[0, 0]) for run in log.runs] == [0, 1, 2] * 2
    assert [run.trace.runs for run in log.runs] == [[(0, 1)]] * 6
    assert session.asked[0] == (0.5, 0)


def test_logged_pass_leaves_the_warm_up_out() -> None:
    log = LoggedPass(fake(), BATCHES)
    for _ in range(3):
        log()
    assert len(log.measured(2)) == 3


def test_switch_is_timed_and_taken_back() -> None:
    session = fake(0.7, 0.5)
    session.density = 0.5
    assert switch_us(session, repeats=3, clock=session.clock) == 1e6
    assert session.density == 0.5


def test_single_density_has_no_switch() -> None:
    assert switch_us(fake()) is None
