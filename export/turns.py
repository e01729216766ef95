"""Timing several calls in turns, so that each meets the same state of the machine. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TypeVar

import numpy as np

ROUNDS = 12
K = TypeVar("K")


def measure_in_turns(calls: Mapping[K, Callable[[], object]], rounds: int = ROUNDS) -> dict[K, float]:
    """Return the median milliseconds of each call, all taking turns; the first round does not count."""
    samples: dict[K, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if i:
                samples[name].append((perf_counter() - start) * 1000)
    return {name: float(np.median(values)) for name, values in samples.items()}
