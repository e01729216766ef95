"""What Linux tells of a machine in files: temperatures, clocks, throttling, power rails, energy counters.

Jetson boards tell all that `tegrastats` prints here, in containers too where /sys is there; x86 tells clocks, heat and,
to root since Linux 5.10, the energy of its packages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeprune.bench.telemetry import Channel, Counter, Source
from edgeprune.runtime.device_state import (
    find_throttle_counters,
    find_throttles,
    find_zones,
    read_celsius,
    read_integer,
    read_text,
)

SYS = Path("/sys")
_RAIL_CHIPS = ("ina3221", "ina3221x", "ina238", "ina2xx", "ina226", "ina219")


class FilesSource:
    """Channels that are a file each, and a function from the file to a value."""

    def __init__(self, channels: list[tuple[Channel, Callable[[], float | None]]]) -> None:
        self.channels = [channel for channel, _ in channels]
        self._readers = [reader for _, reader in channels]

    def read(self) -> list[float | None]:
        """Return a value per channel now."""
        return [reader() for reader in self._readers]


def find_sysfs(root: Path = SYS) -> Source:
    """Return what can be read under a sysfs, in a source that may have no channel."""
    found = [*_temperatures(root), *_clocks(root), *_throttling(root), *_rails(root)]
    return FilesSource([(channel, reader) for channel, reader in found if reader() is not None])


def _temperatures(root: Path) -> Iterator[tuple[Channel, Callable[[], float | None]]]:
    for zone in find_zones(root):
        name = read_text(zone / "type") or zone.name
        yield Channel(name, "temperature", "C", "thermal"), _reader(read_celsius, zone / "temp")


def _clocks(root: Path) -> Iterator[tuple[Channel, Callable[[], float | None]]]:
    for policy in sorted((root / "devices/system/cpu/cpufreq").glob("policy*"), key=_number):
        path = policy / "scaling_cur_freq"
        yield Channel(f"cpu{_number(policy)}", "clock", "MHz", "cpufreq"), _scaled(path, 1e-3)
    for device in sorted((root / "class/devfreq").glob("*")):
        yield Channel(_device_name(device), "clock", "MHz", "devfreq"), _scaled(device / "cur_freq", 1e-6)


def _throttling(root: Path) -> Iterator[tuple[Channel, Callable[[], float | None]]]:
    for path in find_throttles(root):
        name = f"{read_text(path.with_name('type'))} is limited"
        yield Channel(name, "throttle", "", "thermal"), _reader(_above_zero, path)
    counters = find_throttle_counters(root)
    if counters:
        yield Channel("a core was too hot", "throttle", "", "thermal"), _Grown(counters)
    events = sorted((root / "class/hwmon").glob("hwmon*/oc*_event_cnt"))
    for path in events:  # Jetson: over-current, which stops the clocks for a while
        yield Channel(f"over-current {path.name.split('_')[0]}", "throttle", "", "hwmon"), _Grown([path])


def _rails(root: Path) -> Iterator[tuple[Channel, Callable[[], float | None]]]:
    for chip in sorted((root / "class/hwmon").glob("hwmon*"), key=_number):
        kind = read_text(chip / "name")
        if kind not in _RAIL_CHIPS:
            continue
        source = "ina3221" if kind.startswith("ina3221") else "hwmon"
        for volts in sorted(chip.glob("in*_input"), key=_number):
            number = _number(volts)
            label, amps = read_text(chip / f"in{number}_label"), chip / f"curr{number}_input"
            if amps.exists() and label.upper() not in ("", "NC"):
                yield Channel(label, "power", "W", source), _product(volts, amps)
        for power in sorted(chip.glob("power*_input"), key=_number):
            label = read_text(chip / f"power{_number(power)}_label") or read_text(chip / "device/label")
            yield Channel(label or f"{kind} power{_number(power)}", "power", "W", source), _scaled(power, 1e-6)


class RaplCounter:
    """The energy counter of a package or its memory; it starts again at a maximum.

    Args:
        zone: its folder in powercap.
    """

    source = "rapl"

    def __init__(self, zone: Path, parent: str | None = None) -> None:
        name = read_text(zone / "name") or zone.name
        self.rail = name if parent is None else f"{parent} {name}"
        self._path, self._range = zone / "energy_uj", read_integer(zone / "max_energy_range_uj") or 0
        self._last, self._wraps = read_integer(self._path), 0

    def joules(self) -> float | None:
        """Return the energy since the machine started, give or take whole turns of the counter before the first."""
        now = read_integer(self._path)
        if now is None:
            return None
        if self._last is not None and now < self._last:
            self._wraps += 1
        self._last = now
        return (now + self._wraps * self._range) / 1e6


class CounterPower:
    """Power of energy counters: what was counted since the reading before.

    Args:
        counters: whose.
        clock: seconds.
    """

    def __init__(self, counters: list[Counter], clock: Callable[[], float] = time.perf_counter) -> None:
        self.channels = [Channel(counter.rail, "power", "W", counter.source) for counter in counters]
        self._counters, self._clock = counters, clock
        self._before: list[tuple[float, float | None]] | None = None

    def read(self) -> list[float | None]:
        """Return watts; None at the first reading."""
        now = [(self._clock(), counter.joules()) for counter in self._counters]
        before, self._before = self._before or now, now
        return [_watts(a, b) for a, b in zip(before, now, strict=True)]


def find_rapl(root: Path = SYS) -> tuple[list[Counter], str | None]:
    """Return the counters of the packages and their memory, and why there are none.

    What a package holds (core, uncore) and what holds it (psys) is left out, or energy would count twice.
    """
    counters: list[Counter] = []
    zones = sorted((root / "class/powercap").glob("intel-rapl:*"))
    unreadable = False
    for zone in zones:
        name = read_text(zone / "name")
        parent = read_text(zone.parent / zone.name.rpartition(":")[0] / "name") if zone.name.count(":") > 1 else None
        if not (name.startswith("package") if parent is None else name == "dram" and parent.startswith("package")):
            continue
        if read_integer(zone / "energy_uj") is None:
            unreadable = True
        else:
            counters.append(RaplCounter(zone, parent))
    if counters:
        return counters, None
    return [], "rapl: only root may read the energy counters" if unreadable else "rapl: no energy counters"


class _Grown:
    """Tells whether counters have grown since they were read before."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths, self._before = paths, self._counts(paths)

    @staticmethod
    def _counts(paths: list[Path]) -> list[int]:
        return [read_integer(path) or 0 for path in paths]

    def __call__(self) -> float | None:
        now = self._counts(self._paths)
        before, self._before = self._before, now
        return float(any(b > a for a, b in zip(before, now, strict=True)))


def _reader(function: Callable[[Path], float | None], path: Path) -> Callable[[], float | None]:
    return lambda: function(path)


def _above_zero(path: Path) -> float | None:
    state = read_integer(path)
    return None if state is None else float(state > 0)


def _scaled(path: Path, factor: float) -> Callable[[], float | None]:
    return lambda: None if (value := read_integer(path)) is None else value * factor


def _product(volts: Path, amps: Path) -> Callable[[], float | None]:
    """Return a reader of millivolts times milliamperes as watts."""

    def read() -> float | None:
        u, i = read_integer(volts), read_integer(amps)
        return None if u is None or i is None else u * i / 1e6

    return read


def _watts(before: tuple[float, float | None], now: tuple[float, float | None]) -> float | None:
    if before[1] is None or now[1] is None or now[0] <= before[0]:
        return None
    return (now[1] - before[1]) / (now[0] - before[0])


def _device_name(device: Path) -> str:
    """Return a clock's name without its address: Tegra calls its GPU 17000000.gpu, .ga10b or .gv11b."""
    name = device.name.partition(".")[2] or device.name
    return "gpu" if name in ("ga10b", "gv11b", "gp10b", "gm20b") else name


def _number(path: Path) -> int:
    digits = "".join(c for c in path.name if c.isdigit())
    return int(digits) if digits else 0
