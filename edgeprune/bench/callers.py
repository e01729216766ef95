"""Several threads that call one session at once, in turns with a single one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Barrier
from typing import TYPE_CHECKING, Any

from edgeprune.bench import stats
from edgeprune.bench.measure import round_order
from edgeprune.bench.stats import Ratio
from edgeprune.errors import CheckFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUNS = 16  # of each caller in one turn
BLOCKS = 10


@dataclass(frozen=True)
class Call:
    """One run of one caller: number of its batch, start and end in seconds, and what it gave."""

    batch: int
    start: float
    end: float
    result: Any


@dataclass(frozen=True)
class CallerResult:
    """Turns of some callers.

    Attributes:
        callers: threads that call at once.
        images_per_s: of all callers together, median over the turns.
        median_ms: of one run as its caller sees it.
        turns: images per second of each.
    """

    callers: int
    images_per_s: float
    median_ms: float
    turns: list[float]


@dataclass(frozen=True)
class CallersResult:
    """A single caller beside several.

    Attributes:
        runs: of each caller in one turn.
        one, many: a single caller, and all of them.
        scaling: images per second of many / one, paired.
        compared: runs of many whose result was bit-equal to that of a single caller; a difference is an error.
    """

    runs: int
    one: CallerResult
    many: CallerResult
    scaling: Ratio
    compared: int


def measure_callers(
    run: Callable[[NDArray[np.float32]], Any],
    batches: Sequence[NDArray[np.float32]],
    callers: int,
    *,
    blocks: int = BLOCKS,
    runs: int = RUNS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CallersResult:
    """Measure one and several callers in turns: 1 N, N 1 are a block. The first turns do not count.

    Args:
        run: images -> a dataclass of arrays; several threads may call it at once.
        batches: of one size; every caller takes them in order, each from a place of its own.
        callers: N, at least 2.
        blocks: of four turns.
        runs: of each caller in one turn.
        seed: of the bootstrap.
        clock: seconds.

    Raises:
        CheckFailed: `bench-callers` when a result is not that of a single caller.
    """
    expected = [result_bytes(run(images)) for images in batches]
    rates: dict[int, list[float]] = {1: [], callers: []}
    took: dict[int, list[float]] = {1: [], callers: []}
    compared = 0
    for index in range(-2, 2 * blocks):
        for number in round_order([1, callers], index):
            calls = take_turn(run, batches, number, runs=runs, clock=clock)
            wrong = sum(result_bytes(call.result) != expected[call.batch] for call in calls)
            if wrong:
                raise _differs(wrong, len(calls), number)
            compared += len(calls) if number > 1 else 0
            if index >= 0:
                wall_s = max(call.end for call in calls) - min(call.start for call in calls)
                rates[number].append(len(calls) * len(batches[0]) / wall_s)
                took[number] += [1000 * (call.end - call.start) for call in calls]
    one, many = (
        CallerResult(number, stats.median(rates[number]), stats.median(took[number]), rates[number])
        for number in (1, callers)
    )
    pairs = [stats.block_values(result.turns, 1) for result in (many, one)]
    return CallersResult(runs, one, many, stats.paired_ratio(*pairs, seed=seed), compared)


def take_turn(
    run: Callable[[NDArray[np.float32]], Any],
    batches: Sequence[NDArray[np.float32]],
    callers: int,
    *,
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Call]:
    """Let some threads start together and do `runs` runs each; return all of them."""
    barrier = Barrier(callers)

    def call(caller: int) -> list[Call]:
        first, calls = caller * len(batches) // callers, []
        barrier.wait()
        for i in range(first, first + runs):
            batch = i % len(batches)
            start = clock()
            result = run(batches[batch])
            calls.append(Call(batch, start, clock(), result))
        return calls

    with ThreadPoolExecutor(callers) as pool:
        return [done for calls in pool.map(call, range(callers)) for done in calls]


def result_bytes(result: Any) -> list[bytes]:
    """Return the arrays of a result, bit by bit, with their types and shapes."""
    values = [getattr(result, field.name) for field in fields(result)]
    arrays = [value for values_ in values for value in (values_ if isinstance(values_, list) else [values_])]
    return [b"" if a is None else f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays]


def _differs(wrong: int, runs: int, callers: int) -> CheckFailed:
    return CheckFailed(
        f"{wrong} of {runs} results of {callers} caller(s) at once are not what a single caller was given first",
        code="bench-callers",
        expected="the same bits for the same images, whoever else calls the session",
        hint="run again with --threads 1; if it stays, do not share a session between threads, and report it",
        details={"different": wrong, "runs": runs, "callers": callers},
    )
