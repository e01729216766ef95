"""Energy of an image, from counters where the machine has them, else from power over time: pure functions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnergyResult:
    """Energy of an image while one graph ran and nothing else was asked for.

    Attributes:
        joules_per_image: all of the rail's energy, of an idle machine too.
        net_joules_per_image: without what the machine takes when idle; None where that was not measured.
        mean_w: power of the rail while the graph ran.
        idle_w: power of the rail before, without work.
        method: "counter", or "power over time" for the integral (trapezoid) of power readings.
        source: what was read: "rapl", "nvml", "ina3221", "tegrastats".
        rail: what the energy covers, as the source names it; several joined by " + ".
        window_s: seconds the graph ran.
        images: that it ran on.
        readings: that the energy rests on.
    """

    joules_per_image: float
    net_joules_per_image: float | None
    mean_w: float
    idle_w: float | None
    method: str
    source: str
    rail: str
    window_s: float
    images: int
    readings: int
