"""What NVIDIA's management library tells of a GPU, through nvidia-ml-py (extra `telemetry`). Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from edgeprune.bench.telemetry import Channel

# bit of the clock event reasons -> what it means; idle and clocks that somebody set are no throttling
THROTTLES = {
    0x4: "gpu: software power cap",
    0x8: "gpu: hardware slowdown",
    0x20: "gpu: software thermal slowdown",
    0x40: "gpu: hardware thermal slowdown",
    0x80: "gpu: hardware power brake",
}


class NvmlSource:
    """A GPU's temperature, clocks, power, load and throttle bits, as far as it tells them.

    Args:
        nvml: the module pynvml, initialised.
        index: of the GPU.

    Attributes:
        counter: the GPU's own energy counter, None when it has none.
    """

    def __init__(self, nvml: Any, index: int = 0) -> None:
        self._nvml, self._device = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        device = self._device
        readers: list[tuple[Channel, Callable[[], float]]] = [
            (
                Channel("gpu", "temperature", "C", "nvml"),
                lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            ),
            (
                Channel("gpu sm", "clock", "MHz", "nvml"),
                lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            ),
            (
                Channel("memory", "clock", "MHz", "nvml"),
                lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM),
            ),
            (Channel("gpu board", "power", "W", "nvml"), lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
            (
                Channel("power limit", "limit", "W", "nvml"),
                lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000,
            ),
            (Channel("gpu", "load", "%", "nvml"), lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu),
        ]
        self._readers = [(channel, reader) for channel, reader in readers if self._try(reader) is not None]
        self._bits = THROTTLES if self._try(self._reasons) is not None else {}
        self.channels = [
            *(channel for channel, _ in self._readers),
            *(Channel(text, "throttle", "", "nvml") for text in self._bits.values()),
        ]
        self.counter = NvmlCounter(self) if self.joules() is not None else None

    def read(self) -> list[float | None]:
        """Return a value per channel now."""
        values = [self._try(reader) for _, reader in self._readers]
        reasons = self._try(self._reasons) if self._bits else None
        return [*values, *(None if reasons is None else float(bool(int(reasons) & bit)) for bit in self._bits)]

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded, None when the GPU does not count it."""
        return self._try(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000)

    def describe(self, own: int) -> dict[str, Any]:
        """Return driver, highest clock in MHz, power limit in watts and how many processes but `own` compute on it."""
        nvml, device = self._nvml, self._device
        asked: dict[str, Callable[[], Any]] = {
            "driver_version": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000,
            "other_processes": lambda: sum(p.pid != own for p in nvml.nvmlDeviceGetComputeRunningProcesses(device)),
        }
        told = {}
        for name, ask in asked.items():
            with suppress(nvml.NVMLError):
                told[name] = ask()
        return told

    def _reasons(self) -> int:
        """Return the clock event reasons, which older drivers know by another name."""
        ask = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((ask or self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._device))

    def _try(self, reader: Callable[[], float]) -> float | None:
        """Return a reading, None when the GPU does not support it."""
        try:
            return float(reader())
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class NvmlCounter:
    """The energy counter of a GPU's board."""

    rail, source = "gpu board", "nvml"

    def __init__(self, gpu: NvmlSource) -> None:
        self._gpu = gpu

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded."""
        return self._gpu.joules()


def find_nvml(index: int = 0) -> tuple[NvmlSource | None, str | None]:
    """Return a GPU's source, or why there is none."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None, "nvml: the package 'nvidia-ml-py' is not installed: pip install 'edgeprune[telemetry]'"
    try:
        nvml.nvmlInit()
        return NvmlSource(nvml, index), None
    except nvml.NVMLError as error:
        return None, f"nvml: {error}"


def describe_nvml(own: int, index: int = 0) -> dict[str, Any]:
    """Return what the library tells of a GPU for a fingerprint; what it does not tell is left out.

    Args:
        own: number of this process.
        index: of the GPU.
    """
    source, _ = find_nvml(index)
    return {} if source is None else source.describe(own)
