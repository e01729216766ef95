from __future__ import annotations

import sys
from typing import Any

import pytest

from edgeprune.bench.telemetry_nvml import NvmlSource, describe_nvml, find_nvml
from tests.helpers.telemetry import FakeNvml


def values(source: NvmlSource) -> dict[tuple[str, str], Any]:
    return {(c.name, c.kind): v for c, v in zip(source.channels, source.read(), strict=True)}


def test_a_gpu_tells_temperature_clocks_power_and_load() -> None:
    nvml = FakeNvml()
    source = NvmlSource(nvml)
    nvml.step()
    told = values(source)
    assert told["gpu", "temperature"] == 63
    assert (told["gpu sm", "clock"], told["memory", "clock"]) == (1980, 2619)
    assert (told["gpu board", "power"], told["power limit", "limit"], told["gpu", "load"]) == (310.0, 350.0, 98)


def test_idling_is_no_throttling_but_caps_and_heat_are() -> None:
    nvml = FakeNvml()
    source = NvmlSource(nvml)

    def reasons() -> list[str]:
        return [name for (name, kind), value in values(source).items() if kind == "throttle" and value]

    assert reasons() == []
    nvml.step()
    assert reasons() == ["gpu: software power cap"]
    nvml.step()
    assert reasons() == ["gpu: software thermal slowdown"]


def test_the_energy_counter_counts_joules() -> None:
    nvml = FakeNvml()
    source = NvmlSource(nvml)
    assert source.counter is not None
    before = source.counter.joules()
    nvml.step()
    assert (before, source.counter.joules()) == (1000.0, 1031.0)
    assert (source.counter.rail, source.counter.source) == ("gpu board", "nvml")


def test_what_a_gpu_does_not_support_is_left_out() -> None:
    lacking = (
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetCurrentClocksEventReasons",
    )
    source = NvmlSource(FakeNvml(*lacking))
    kinds = {channel.kind for channel in source.channels}
    assert "power" not in kinds
    assert "throttle" not in kinds
    assert source.counter is None
    assert "temperature" in kinds


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    source, why = find_nvml()
    assert source is None
    assert "edgeprune[telemetry]" in str(why)


def test_a_driver_that_is_not_there_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("nvmlInit"))
    assert find_nvml() == (None, "nvml: Not Supported")
    assert describe_nvml(1) == {}


def test_fingerprint_of_a_gpu_counts_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    told = describe_nvml(4321)
    assert told == {"driver_version": "570.86.15", "max_mhz": 1980, "power_limit_w": 350.0, "other_processes": 1}
