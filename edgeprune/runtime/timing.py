"""Times of a run that only its backend can tell apart: on the device, and of giving it the work."""

from __future__ import annotations


class DeviceTimer:
    """Adds up what backends tell; a backend that can has an attribute `timer` to put one in."""

    def __init__(self) -> None:
        self._gpu_ms = self._enqueue_ms = 0.0
        self._told = False

    def add(self, gpu_ms: float, enqueue_ms: float) -> None:
        """Take down a run of one graph: milliseconds between events around it, and of giving the device the work."""
        self._gpu_ms += gpu_ms
        self._enqueue_ms += enqueue_ms
        self._told = True

    def take(self) -> tuple[float, float] | None:
        """Return the sums since the last call, None without a run in between."""
        told = (self._gpu_ms, self._enqueue_ms) if self._told else None
        self._gpu_ms = self._enqueue_ms = 0.0
        self._told = False
        return told
