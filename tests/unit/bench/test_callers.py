from __future__ import annotations

import threading
from itertools import count

import numpy as np
import pytest

from edgeprune.bench.callers import measure_callers, result_bytes, take_turn
from edgeprune.bench.report import callers_table, report_notes, report_tables
from edgeprune.bench.result import Extras
from edgeprune.errors import CheckFailed
from edgeprune.runtime.session import Result
from tests.helpers.bench import summary

BATCHES = [np.full((2, 3), i, np.float32) for i in range(4)]


def echo(images: np.ndarray) -> Result:
    return Result(images * 2, [images.astype(np.int32)])


def test_turn_runs_every_caller_from_a_place_of_its_own() -> None:
    calls = take_turn(echo, BATCHES, 2, runs=5)
    assert [call.batch for call in calls] == [0, 1, 2, 3, 0, 2, 3, 0, 1, 2]
    assert all((call.result.logits == 2 * call.batch).all() for call in calls)


def test_callers_of_a_turn_start_together() -> None:
    together = threading.Barrier(3, timeout=60)

    def run(images: np.ndarray) -> Result:
        together.wait()  # passes only when three run at once
        return echo(images)

    assert len(take_turn(run, BATCHES, 3, runs=2)) == 6


def test_turns_alternate_and_the_first_block_does_not_count() -> None:
    seen: list[int] = []

    def run(images: np.ndarray) -> Result:
        seen.append(threading.active_count())
        return echo(images)

    result = measure_callers(run, BATCHES, 2, blocks=3, runs=4)
    assert (len(result.one.turns), len(result.many.turns), result.scaling.blocks) == (6, 6, 3)
    assert result.compared == 8 * 2 * 4
    assert len(seen) == len(BATCHES) + 8 * (4 + 8)


def test_images_per_second_are_those_of_the_whole_turn() -> None:
    ticks = count()
    result = measure_callers(echo, BATCHES, 2, blocks=1, runs=1, clock=lambda: float(next(ticks)))
    assert result.one.turns == [2.0, 2.0]  # a run of two images from one tick to the next
    assert result.one.median_ms == 1000


def test_other_bits_are_an_error() -> None:
    def run(images: np.ndarray) -> Result:
        shifted = threading.current_thread() is not threading.main_thread() and images[0, 0] == 3
        return Result(images + np.float32(1e-7 if shifted else 0) * images)

    with pytest.raises(CheckFailed) as error:
        measure_callers(run, BATCHES, 2, blocks=1, runs=4)
    assert (error.value.code, error.value.exit_code) == ("bench-callers", 1)
    assert error.value.details["different"] == 1


def test_error_of_a_caller_is_passed_on() -> None:
    def run(images: np.ndarray) -> Result:
        if threading.current_thread() is not threading.main_thread():
            raise CheckFailed("broken", code="broken")
        return echo(images)

    with pytest.raises(CheckFailed, match="broken"):
        measure_callers(run, BATCHES, 2, blocks=1)


def test_result_bytes_tell_results_apart() -> None:
    zero = Result(np.zeros((1, 2), np.float32), [np.array([[1]])], overflow=np.array([False]))
    negative = Result(-np.zeros((1, 2), np.float32), [np.array([[1]])], overflow=np.array([False]))
    fewer = Result(np.zeros((1, 2), np.float32), overflow=np.array([False]))
    nan = Result(np.full((1, 2), np.nan, np.float32))
    assert result_bytes(nan) == result_bytes(nan)
    assert len({tuple(result_bytes(result)) for result in (zero, negative, fewer, nan)}) == 4


def test_report_shows_one_and_many_callers() -> None:
    callers = measure_callers(echo, BATCHES, 2, blocks=1, runs=1)
    one, many = callers_table(callers, 2)
    assert (one["callers"], many["callers"], one["images/s (x) [95 % CI]"]) == ("1", "2", "1.00")
    result = summary({"dense": 9.0, "pruned": 3.0}, extras=Extras(callers=callers))
    assert [title for title, _ in report_tables(result)][-1] == "callers of one session at once"
    assert any("8 results of 2 at once are bit-equal" in note for note in report_notes(result))
