"""Times of a run that only its backend can tell apart: on the device, of giving it the work, of single layers."""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass
class LayerLog:
    """What the layers of an engine take while it runs in one of its profiles.

    Attributes:
        information: what the engine inspector tells of all layers, as JSON.
        profile: its number.
        times: milliseconds of every run by the name TensorRT has for the layer.
    """

    information: str
    profile: int
    times: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, ms: float) -> None:
        """Take down a layer of a run."""
        self.times.setdefault(name, []).append(ms)
