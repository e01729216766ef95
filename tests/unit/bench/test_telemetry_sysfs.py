from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench.telemetry_sysfs import CounterPower, find_rapl, find_sysfs
from edgeprune.bench.watch import find_sensors
from tests.helpers.telemetry import Time, write


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """A tree like that of an Orin Nano with JetPack 6."""
    for i, (kind, milli) in enumerate((("cpu-thermal", 52031), ("gpu-thermal", 52500), ("cv0-thermal", -256000))):
        write(tmp_path / f"class/thermal/thermal_zone{i}/type", kind)
        write(tmp_path / f"class/thermal/thermal_zone{i}/temp", milli)
    write(tmp_path / "class/thermal/cooling_device0/type", "17000000.gpu")
    write(tmp_path / "class/thermal/cooling_device0/cur_state", 0)
    for policy in (0, 4):
        write(tmp_path / f"devices/system/cpu/cpufreq/policy{policy}/scaling_cur_freq", 1510400)
    write(tmp_path / "class/devfreq/17000000.gpu/cur_freq", 624750000)
    chip = tmp_path / "class/hwmon/hwmon1"
    write(chip / "name", "ina3221")
    for number, (label, volts, amps) in enumerate(
        (("VDD_IN", 5040, 1800), ("VDD_CPU_GPU_CV", 5040, 600), ("NC", 0, 0))
    ):
        write(chip / f"in{number + 1}_label", label)
        write(chip / f"in{number + 1}_input", volts)
        write(chip / f"curr{number + 1}_input", amps)
    write(chip / "in7_label", "sum of shunt voltages")
    write(chip / "in7_input", 3)
    write(tmp_path / "class/hwmon/hwmon2/name", "soctherm_oc")
    write(tmp_path / "class/hwmon/hwmon2/oc1_event_cnt", 4)
    return tmp_path


def values(source: Any) -> dict[str, Any]:
    return {f"{c.name} {c.kind}": v for c, v in zip(source.channels, source.read(), strict=True)}


def test_a_jetson_tells_all_in_files(orin: Path) -> None:
    assert values(find_sysfs(orin)) == {
        "cpu-thermal temperature": 52.031,
        "gpu-thermal temperature": 52.5,
        "cpu0 clock": pytest.approx(1510.4),
        "cpu4 clock": pytest.approx(1510.4),
        "gpu clock": pytest.approx(624.75),
        "17000000.gpu is limited throttle": 0.0,
        "over-current oc1 throttle": 0.0,
        "VDD_IN power": pytest.approx(9.072),
        "VDD_CPU_GPU_CV power": pytest.approx(3.024),
    }


def test_limits_and_over_current_are_throttling(orin: Path) -> None:
    source = find_sysfs(orin)
    write(orin / "class/thermal/cooling_device0/cur_state", 2)
    write(orin / "class/hwmon/hwmon2/oc1_event_cnt", 5)
    told = values(source)
    assert told["17000000.gpu is limited throttle"] == 1.0
    assert told["over-current oc1 throttle"] == 1.0
    assert values(source)["over-current oc1 throttle"] == 0.0  # it is counted once


def test_a_file_that_goes_away_is_none(orin: Path) -> None:
    source = find_sysfs(orin)
    (orin / "class/devfreq/17000000.gpu/cur_freq").unlink()
    assert values(source)["gpu clock"] is None


def test_a_thor_has_a_clock_per_unit_and_power_in_microwatts(tmp_path: Path) -> None:
    write(tmp_path / "class/devfreq/gpu-gpc-0/cur_freq", 1575000000)
    write(tmp_path / "class/hwmon/hwmon3/name", "ina238")
    write(tmp_path / "class/hwmon/hwmon3/power1_input", 23400000)
    write(tmp_path / "class/hwmon/hwmon3/power1_label", "VIN")
    assert values(find_sysfs(tmp_path)) == {"gpu-gpc-0 clock": pytest.approx(1575), "VIN power": pytest.approx(23.4)}


def test_an_empty_tree_tells_nothing(tmp_path: Path) -> None:
    assert find_sysfs(tmp_path).channels == []
    assert find_rapl(tmp_path) == ([], "rapl: no energy counters")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A tree like that of a server with two packages."""
    for name, kind, energy in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 3_000_000),
        ("intel-rapl:0:1", "dram", 1_000_000),
        ("intel-rapl:1", "psys", 9_000_000),
    ):
        zone = tmp_path / "class/powercap" / name
        write(zone / "name", kind)
        write(zone / "energy_uj", energy)
        write(zone / "max_energy_range_uj", 10_000_000)
    return tmp_path


def test_rapl_counts_packages_and_their_memory_once(server: Path) -> None:
    counters, why = find_rapl(server)
    assert [(counter.rail, counter.joules()) for counter in counters] == [("package-0", 5.0), ("package-0 dram", 1.0)]
    assert why is None


def test_a_rapl_counter_starts_again_at_its_maximum(server: Path) -> None:
    (package, _), _ = find_rapl(server)
    write(server / "class/powercap/intel-rapl:0/energy_uj", 9_000_000)
    assert package.joules() == 9.0
    write(server / "class/powercap/intel-rapl:0/energy_uj", 2_000_000)
    assert package.joules() == 12.0


def test_a_rapl_that_only_root_may_read_is_named(server: Path) -> None:
    for path in server.glob("class/powercap/*/energy_uj"):
        path.unlink()
        path.mkdir()
    assert find_rapl(server) == ([], "rapl: only root may read the energy counters")


def test_power_of_a_counter_is_what_was_counted_since(server: Path) -> None:
    time = Time()
    counters, _ = find_rapl(server)
    source = CounterPower(counters, clock=time)
    assert source.read() == [None, None]
    time.now = 0.5
    write(server / "class/powercap/intel-rapl:0/energy_uj", 25_000_000)
    assert source.read() == [40.0, 0.0]


def test_sensors_of_a_processor_are_files_and_rapl(server: Path) -> None:
    with ExitStack() as stack:
        found = find_sensors(stack, on_device=False, root=server)
    assert [counter.rail for counter in found.counters] == ["package-0", "package-0 dram"]
    assert found.lacking == ["sysfs: no temperature, clock or rail can be read"]
    assert [channel.source for channel in found.monitor().channels] == ["rapl", "rapl"]


def test_rails_of_a_board_are_preferred_to_counters(orin: Path) -> None:
    with ExitStack() as stack:
        found = find_sensors(stack, on_device=True, root=orin)
    assert list(found.counters) == []
    assert {"VDD_IN", "VDD_CPU_GPU_CV"} <= {channel.name for channel in found.monitor().channels}
