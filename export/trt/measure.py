"""Times engines on this device, all in turns, through the backend that will run them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import EngineIndex, EngineInfo

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
    """Time engines through the backend that runs them; those of the same batch take turns. See `Stopwatch`."""
    raise NotImplementedError
