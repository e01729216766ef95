"""What `tegrastats` prints on a Jetson, for boards and containers whose sysfs does not show the power rails.

The line changes between boards and releases: rails are `NAME 1234mW/1200mW` (now/mean; JetPack 7 adds the highest),
JetPack 4 leaves out the unit, and the GPU's clock is `GR3D_FREQ 12%@1300`, `12%@[1300,1300]` or `@[1000,1000,1000]`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from edgeprune.bench.telemetry import Channel

INTERVAL_MS = 100
FIRST_LINE_S = 2.0
_RAIL = re.compile(r"\b([A-Za-z][A-Za-z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+mW)?(?=\s|$)")
_TEMPERATURE = re.compile(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
_GPU = re.compile(r"\bGR3D(?:_FREQ)? (?:(\d+)%)?(?:@(\d+|\[[\d,]+\]))?")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(r"(\d+)%@(\d+)")
_NO_RAILS = ("RAM", "SWAP", "IRAM", "NC")
_OFF_C = -40.0  # a sensor that is switched off says -256
_CONSTANT = "pmic"


@dataclass(frozen=True)
class TegraLine:
    """One line of tegrastats.

    Attributes:
        temperatures_c: by sensor; those that are switched off are left out.
        rails_w: by rail, the power now.
        core_mhz: clocks of the cores that are on.
        gpu_mhz: the slowest of the GPU's clocks, None when the line has none.
        gpu_load: percent.
    """

    temperatures_c: dict[str, float] = field(default_factory=dict)
    rails_w: dict[str, float] = field(default_factory=dict)
    core_mhz: list[float] = field(default_factory=list)
    gpu_mhz: float | None = None
    gpu_load: float | None = None


def parse_tegrastats(line: str) -> TegraLine:
    """Return what a line of tegrastats says; what it does not say is left out."""
    temperatures = {
        name: float(value)
        for name, value in _TEMPERATURE.findall(line)
        if float(value) > _OFF_C and _CONSTANT not in name.lower()
    }
    rails = {name: int(milli) / 1000 for name, milli in _RAIL.findall(line) if name not in _NO_RAILS}
    cores = _CPU.search(line)
    clocks = [float(mhz) for _, mhz in _CORE.findall(cores[1])] if cores else []
    gpu = _GPU.search(line)
    load = float(gpu[1]) if gpu and gpu[1] else None
    mhz = min(float(one) for one in gpu[2].strip("[]").split(",")) if gpu and gpu[2] else None
    return TegraLine(temperatures, rails, clocks, mhz, load)


class TegrastatsSource:
    """The newest line of a running tegrastats.

    Args:
        lines: of tegrastats, as they come; the first is waited for.
        wait_s: how long at most.
    """

    def __init__(self, lines: Iterable[str], *, wait_s: float = FIRST_LINE_S) -> None:
        self._newest: TegraLine | None = None
        self._first = threading.Event()
        threading.Thread(target=self._follow, args=(lines,), name="edgeprune-tegrastats", daemon=True).start()
        self._first.wait(wait_s)
        line = self._newest or TegraLine()
        self._names = (list(line.temperatures_c), list(line.rails_w))
        self.channels = [
            *(Channel(name, "temperature", "C", "tegrastats") for name in line.temperatures_c),
            *(Channel(name, "power", "W", "tegrastats") for name in line.rails_w),
            Channel("fastest core", "clock", "MHz", "cpufreq"),
            Channel("gpu", "clock", "MHz", "tegrastats"),
            Channel("gpu", "load", "%", "tegrastats"),
        ]

    def _follow(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._newest = parse_tegrastats(line)
            self._first.set()

    def read(self) -> list[float | None]:
        """Return a value per channel, of the newest line."""
        line = self._newest or TegraLine()
        temperatures, rails = self._names
        return [
            *(line.temperatures_c.get(name) for name in temperatures),
            *(line.rails_w.get(name) for name in rails),
            max(line.core_mhz, default=None),
            line.gpu_mhz,
            line.gpu_load,
        ]


class Tegrastats:
    """A tegrastats of our own, ended when the block is left.

    Attributes:
        source: what it tells, None where there is no tegrastats or it says nothing.
    """

    def __init__(self, command: str = "tegrastats", interval_ms: int = INTERVAL_MS) -> None:
        self._path, self._interval_ms = shutil.which(command), interval_ms
        self._process: subprocess.Popen[str] | None = None
        self.source: TegrastatsSource | None = None

    def __enter__(self) -> Tegrastats:
        if self._path is not None:
            arguments = [self._path, "--interval", str(self._interval_ms)]
            self._process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
            assert self._process.stdout is not None
            made = TegrastatsSource(self._process.stdout)
            self.source = made if any(value is not None for value in made.read()) else None
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
