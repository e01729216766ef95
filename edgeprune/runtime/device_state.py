"""How hot the device is and whether it slows itself down, from Linux's sysfs. None where it does not tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_THROTTLES = ("processor", "cpu", "gpu", "devfreq")
_LIMITS = ("passive", "hot")
_PLAUSIBLE_C = (-40.0, 150.0)  # a sensor that is switched off says 0 K, or fails
_PLAUSIBLE_LIMIT_C = (40.0, 130.0)  # a trip point that is not set says 0 or below
_CONSTANT = "pmic"  # Jetson's PMIC-Die always says 100 degrees


@dataclass(frozen=True)
class DeviceState:
    """What the device tells.

    Attributes:
        temperature_c: degrees Celsius of the zone that is nearest to its limit; of the hottest when none has a limit.
        throttled: a processor or GPU is slowed down now, or was for heat since the reading before.
        hot_c: the limit of that same zone, its lowest passive or hot trip point.
    """

    temperature_c: float | None
    throttled: bool | None
    hot_c: float | None


class DeviceReader:
    """Reads a device's state, at most once per interval, because sysfs is slow to read.

    Zones, their limits and the cooling devices are looked up once; a reading then opens one file for each.

    Args:
        root: where sysfs is mounted.
        interval_s: seconds for which a reading is kept.
        clock: seconds.
    """

    def __init__(
        self, root: Path = Path("/sys"), *, interval_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._zones = [(zone / "temp", _limit(zone)) for zone in find_zones(root)]
        self._throttles = find_throttles(root)
        self._counters = find_throttle_counters(root)
        self._counts = self._read_counts()
        self._interval_s, self._clock = interval_s, clock
        self._kept: tuple[float, DeviceState] | None = None

    def read(self) -> DeviceState:
        """Return the state now, or the last one when it is younger than the interval."""
        now = self._clock()
        if self._kept and 0 <= now - self._kept[0] < self._interval_s:
            return self._kept[1]
        temperature_c, hot_c = self._read_zones()
        state = DeviceState(temperature_c, self._read_throttled(), hot_c)
        self._kept = (now, state)
        return state

    def _read_zones(self) -> tuple[float | None, float | None]:
        """Return (temperature, limit) of the zone nearest to its limit, or of the hottest."""
        read = [(read_celsius(temp), limit) for temp, limit in self._zones]
        found = [(degrees, limit) for degrees, limit in read if degrees is not None]
        limited = [(degrees - limit, degrees, limit) for degrees, limit in found if limit is not None]
        if limited:
            return max(limited)[1:]
        return max((degrees for degrees, _ in found), default=None), None

    def _read_throttled(self) -> bool | None:
        states = [state for path in self._throttles if (state := read_integer(path)) is not None]
        counts, before = self._read_counts(), self._counts
        self._counts = counts
        if not states and not counts:
            return None
        return any(state > 0 for state in states) or any(n > before.get(path, n) for path, n in counts.items())

    def _read_counts(self) -> dict[Path, int]:
        return {path: count for path in self._counters if (count := read_integer(path)) is not None}


def find_zones(root: Path) -> list[Path]:
    """Return the folders of all thermal zones that measure something; `type` names one, `temp` is its reading."""
    zones = sorted((root / "class/thermal").glob("thermal_zone*"))
    return [zone for zone in zones if _CONSTANT not in read_text(zone / "type").lower()]


def find_throttles(root: Path) -> list[Path]:
    """Return the files that are above 0 while a processor or GPU is slowed down; `type` beside one names it."""
    devices = sorted((root / "class/thermal").glob("cooling_device*"))
    return [device / "cur_state" for device in devices if _slows_processors(read_text(device / "type").lower())]


def find_throttle_counters(root: Path) -> list[Path]:
    """Return the files in which the cores of an x86 count how often heat slowed them down."""
    return sorted((root / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count"))


def _limit(zone: Path) -> float | None:
    """Return a zone's lowest plausible limit in degrees Celsius."""
    kinds = [path for path in zone.glob("trip_point_*_type") if read_text(path) in _LIMITS]
    temps = [read_celsius(path.with_name(path.name.replace("_type", "_temp")), _PLAUSIBLE_LIMIT_C) for path in kinds]
    return min((degrees for degrees in temps if degrees is not None), default=None)


def _slows_processors(kind: str) -> bool:
    return "fan" not in kind and any(word in kind for word in _THROTTLES)


def read_celsius(path: Path, plausible: tuple[float, float] = _PLAUSIBLE_C) -> float | None:
    """Return a file of millidegrees in degrees, None outside of what is plausible."""
    milli = read_integer(path)
    return milli / 1000 if milli is not None and plausible[0] <= milli / 1000 <= plausible[1] else None


def read_integer(path: Path) -> int | None:
    """Return the number in a file, None where there is none."""
    try:
        return int(read_text(path))
    except ValueError:
        return None


def read_text(path: Path) -> str:
    """Return what a file says, without the line's end; "" where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
