"""Times engines on this device, all in turns, through the backend that will run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeprune.export.turns import measure_in_turns
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import EngineIndex, EngineInfo
from edgeprune.runtime.router import COUNT, IMAGES, SLOTS, Backend

ROUNDS = 40


class Stopwatch(Protocol):
    """What times engines."""

    def __call__(
        self, bundle: Bundle, folder: Path, index: EngineIndex, before: EngineInfo | None
    ) -> dict[tuple[str, int], float]:
        """Return the median milliseconds of a run by (file of the engine, number of the profile).

        Args:
            bundle: the engines are of.
            folder: holds the engines.
            index: the engines to time; several may run the same graph.
            before: the engine that makes their inputs, for rests.
        """
        ...


def time_profiles(
    bundle: Bundle, folder: Path, index: EngineIndex, before: EngineInfo | None
) -> dict[tuple[str, int], float]:
    """Time engines through the backend that runs them; those of the same batch take turns. See `Stopwatch`.

    What the rests read comes from the stem, and stays on the device as it does when the bundle runs.

    Raises:
        EnvironmentLackError: those of `edgeprune.runtime.trt.Engines`.
    """
    from edgeprune.runtime.trt import Engines

    engines = Engines(bundle, folder, index)
    stem = None if before is None else engines.open(before.profiles[0].graph, list(_numbered(before)))
    by_batch: dict[int, list[tuple[EngineInfo, int]]] = defaultdict(list)
    for info in index.engines:
        for _, number in _numbered(info):
            by_batch[info.profiles[number].batch].append((info, number))
    times: dict[tuple[str, int], float] = {}
    for entries in by_batch.values():
        calls = {(i.file, n): _call(engines.open(i.profiles[n].graph, [(i, n)]), i, n, stem) for i, n in entries}
        times |= measure_in_turns(calls, ROUNDS)
    return times


def _numbered(info: EngineInfo) -> Iterator[tuple[EngineInfo, int]]:
    return ((info, number) for number in range(len(info.profiles)))


def _call(backend: Backend, info: EngineInfo, number: int, stem: Backend | None) -> Callable[[], object]:
    """Return a call that runs a profile on images of noise, or on what the stem makes of them."""
    profile = info.profiles[number]
    wanted = [tensor.name for tensor in backend.inputs]
    images = {IMAGES: _noise(backend if stem is None else stem, profile.batch)}
    made = images if stem is None else stem.run(images, keep=set(wanted) - {COUNT})
    given = {**made, SLOTS: np.array(profile.slots or [], np.int64)}
    return partial(backend.run, {name: given[name] for name in wanted})


def _noise(backend: Backend, batch: int) -> np.ndarray:
    shape = next(tensor.shape for tensor in backend.inputs if tensor.name == IMAGES)
    return np.random.default_rng(batch).normal(size=(batch, *shape[1:])).astype(np.float32)
