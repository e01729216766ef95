"""What else the machine does while measuring: other work, and what its sensors tell."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.bench import fingerprint as env
from edgeprune.bench.measure import Progress
from edgeprune.bench.result import MachineResult
from edgeprune.bench.telemetry import Counter, Monitor, Source
from edgeprune.bench.telemetry_nvml import find_nvml
from edgeprune.bench.telemetry_sysfs import SYS, CounterPower, find_rapl, find_sysfs
from edgeprune.bench.telemetry_tegrastats import Tegrastats


@dataclass
class Sensors:
    """What a machine tells.

    Attributes:
        sources: to be read several times a second.
        counters: of energy, read around what is measured.
        lacking: what there is not, with the reason.
    """

    sources: list[Source] = field(default_factory=list)
    counters: Sequence[Counter] = ()
    lacking: list[str] = field(default_factory=list)

    def monitor(self) -> Monitor:
        """Return what reads the sources."""
        return Monitor([*self.sources, *([CounterPower(list(self.counters))] if self.counters else [])])


def find_sensors(stack: ExitStack, *, on_device: bool, root: Path = SYS) -> Sensors:
    """Return the sensors that speak of what does the work; a tegrastats among them ends with the stack.

    Args:
        stack: ends what has to be.
        on_device: a GPU does the work.
        root: of sysfs.
    """
    found = Sensors()
    sysfs = find_sysfs(root)
    if sysfs.channels:
        found.sources.append(sysfs)
    else:
        found.lacking.append("sysfs: no temperature, clock or rail can be read")
    has_rails = any(channel.kind == "power" for channel in sysfs.channels)
    if not has_rails:
        tegrastats = stack.enter_context(Tegrastats()).source
        if tegrastats is not None:
            found.sources.append(tegrastats)
            has_rails = any(channel.kind == "power" for channel in tegrastats.channels)
    if on_device:
        gpu, why = find_nvml()
        if gpu is not None:
            found.sources.append(gpu)
            found.counters = [] if gpu.counter is None or has_rails else [gpu.counter]
        if why is not None:
            found.lacking.append(why)
    elif not has_rails:
        found.counters, why = find_rapl(root)
        if why is not None:
            found.lacking.append(why)
    return found


class MachineWatch:
    """Notes what else the machine does; its steps lie between the timed calls."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.load = env.read_load()
        self.before: env.CpuTimes | None = None
        self.mhz: list[float] = []

    def step(self, name: str, share: float) -> None:
        """Start the accounts with the first step and read the clock after every block."""
        if self.before is None:
            self.before = env.read_cpu_times()
        mhz = env.read_mhz() if name == "measure" else None
        if mhz is not None:
            self.mhz.append(mhz)
        if self.progress:
            self.progress(name, share)

    def result(self) -> MachineResult:
        """Return the accounts since the first step."""
        other = steal = None
        after = env.read_cpu_times()
        if after is not None and self.before is not None:
            other = round(after.other_cores(self.before), 3)
            steal = round(after.steal_share(self.before, os.cpu_count() or 1), 4)
        return MachineResult(
            load_1min_before=self.load,
            load_1min_after=env.read_load(),
            other_cores=other,
            steal=steal,
            mhz=self.mhz,
        )
