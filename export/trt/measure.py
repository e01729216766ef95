"""Times engines on this device, all in turns, through the backend that will run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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
    for batch, entries in by_batch.items():
        backends = [engines.open(info.profiles[n].graph, [(info, n)]) for info, n in entries]
        given = _given(batch, backends, stem)
        calls = {}
        for backend, (info, n) in zip(backends, entries, strict=True):
            feeds = {**given, SLOTS: np.array(info.profiles[n].slots or [], np.int64)}
            calls[info.file, n] = partial(backend.run, {tensor.name: feeds[tensor.name] for tensor in backend.inputs})
        times |= measure_in_turns(calls, ROUNDS)
    return times


def _numbered(info: EngineInfo) -> Iterator[tuple[EngineInfo, int]]:
    return ((info, number) for number in range(len(info.profiles)))


def _given(batch: int, backends: Sequence[Backend], stem: Backend | None) -> dict[str, Any]:
    """Return images of noise, or what the stem makes of them."""
    if stem is None:
        return {IMAGES: _noise(backends[0], batch)}
    wanted = {tensor.name for backend in backends for tensor in backend.inputs}
    return stem.run({IMAGES: _noise(stem, batch)}, keep=wanted - {COUNT})


def _noise(backend: Backend, batch: int) -> np.ndarray:
    shape = next(tensor.shape for tensor in backend.inputs if tensor.name == IMAGES)
    return np.random.default_rng(batch).normal(size=(batch, *shape[1:])).astype(np.float32)
