"""Machines that tell about themselves: captures, a stand-in for NVML, and trees like sysfs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgeprune.bench.telemetry import Channel

CAPTURES = Path(__file__).resolve().parents[1] / "fixtures/telemetry"


def capture(name: str) -> list[str]:
    """Return the lines of a capture of tegrastats."""
    return (CAPTURES / f"tegrastats-{name}.txt").read_text().splitlines()


def write(path: Path, text: object) -> None:
    """Write a file of a tree like sysfs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def cpu(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Told:
    """A source of one channel that tells given values, the last one for ever."""

    def __init__(self, channel: Channel, *values: float | None) -> None:
        self.channels, self._values = [channel], list(values)

    def read(self) -> list[float | None]:
        return [self._values.pop(0) if len(self._values) > 1 else self._values[0]]


class FakeNvml(SimpleNamespace):
    """The functions of pynvml, answering from the capture; `step` goes to the next reading."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, *lacking: str) -> None:
        super().__init__()
        self.capture, self.number, self.lacking = json.loads((CAPTURES / "nvml.json").read_text()), 0, lacking

    def step(self) -> None:
        self.number += 1

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacking"):
            return object.__getattribute__(self, "_refuse")
        return object.__getattribute__(self, name)

    def _refuse(self, *arguments: Any) -> Any:
        raise self.NVMLError("Not Supported")

    @property
    def now(self) -> dict[str, int]:
        return self.capture["readings"][self.number]

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTemperature(self, device: int, sensor: int) -> int:
        return self.now["temperature_c"]

    def nvmlDeviceGetClockInfo(self, device: int, clock: int) -> int:
        return self.now["sm_mhz" if clock == self.NVML_CLOCK_SM else "memory_mhz"]

    def nvmlDeviceGetMaxClockInfo(self, device: int, clock: int) -> int:
        return self.capture["max_sm_mhz"]

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        return self.now["power_mw"]

    def nvmlDeviceGetEnforcedPowerLimit(self, device: int) -> int:
        return self.capture["limit_mw"]

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=self.now["load"])

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: int) -> int:
        return self.now["reasons"]

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        return self.now["energy_mj"]

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.capture["processes"]]

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return self.capture["driver"].encode()
