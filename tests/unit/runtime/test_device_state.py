from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.runtime.device_state import DeviceReader, DeviceState

NOTHING = DeviceState(None, None, None)


def read(root: Path) -> DeviceState:
    return DeviceReader(root).read()


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def add_zone(root: Path, number: int, kind: str, temp: object, *trips: tuple[str, object]) -> Path:
    """Write a thermal zone; a temperature of None makes one whose reading fails, as of a part without power."""
    zone = root / f"class/thermal/thermal_zone{number}"
    write(zone / "type", kind)
    if temp is None:
        (zone / "temp").mkdir()
    else:
        write(zone / "temp", temp)
    for i, (trip, milli) in enumerate(trips):
        write(zone / f"trip_point_{i}_type", trip)
        write(zone / f"trip_point_{i}_temp", milli)
    return zone


def add_cooling(root: Path, number: int, kind: str, state: object) -> Path:
    device = root / f"class/thermal/cooling_device{number}"
    write(device / "type", kind)
    write(device / "cur_state", state)
    return device / "cur_state"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    trips = (("active", 50000), ("passive", 99000), ("hot", 103000), ("critical", 104500))
    add_zone(tmp_path, 0, "cpu-thermal", 61250, *trips)
    add_zone(tmp_path, 1, "gpu-thermal", 58000, *trips)
    add_zone(tmp_path, 2, "cv0-thermal", None, *trips)
    add_zone(tmp_path, 5, "soc0-thermal", -256000, *trips)
    add_zone(tmp_path, 8, "tj-thermal", 61250, ("critical", 104500))
    add_cooling(tmp_path, 0, "pwm-fan", 2)
    add_cooling(tmp_path, 1, "cpufreq-cpu0", 0)
    add_cooling(tmp_path, 2, "17000000.gpu", 0)
    return tmp_path


def test_jetson_tells_temperature_and_limit(orin: Path) -> None:
    assert read(orin) == DeviceState(61.25, False, 99.0)


@pytest.mark.parametrize("device", ["cooling_device1", "cooling_device2"])
def test_jetson_throttles_when_a_processor_is_slowed_down(orin: Path, device: str) -> None:
    write(orin / "class/thermal" / device / "cur_state", 3)
    assert read(orin).throttled is True


@pytest.mark.parametrize("kind", ["gpu-fan", "pwm-fan", "wifi-throttle"])
def test_other_cooling_devices_are_no_throttling(orin: Path, kind: str) -> None:
    add_cooling(orin, 9, kind, 5)
    assert read(orin).throttled is False


def test_the_zone_nearest_to_its_limit_counts_not_the_hottest(orin: Path) -> None:
    add_zone(orin, 9, "board", 56000, ("passive", 60000))
    assert read(orin) == DeviceState(56.0, False, 60.0)


def test_a_sensor_known_to_be_constant_does_not_count(orin: Path) -> None:
    add_zone(orin, 9, "PMIC-Die", 100000, ("passive", 100000))
    assert read(orin).temperature_c == 61.25


def test_without_limits_the_hottest_zone_counts(tmp_path: Path) -> None:
    for number, temp in enumerate((40000, 71000, 30000)):
        add_zone(tmp_path, number, "thermal", temp, ("critical", 90000))
    assert read(tmp_path) == DeviceState(71.0, None, None)


@pytest.fixture
def x86(tmp_path: Path) -> Path:
    add_zone(tmp_path, 0, "acpitz", 27800, ("critical", 119000))
    add_zone(tmp_path, 1, "x86_pkg_temp", 66000, ("passive", 0), ("passive", -274000))
    add_cooling(tmp_path, 0, "Processor", 0)
    add_cooling(tmp_path, 1, "intel_powerclamp", -1)
    for core in range(2):
        for counter in ("core", "package"):
            write(tmp_path / f"devices/system/cpu/cpu{core}/thermal_throttle/{counter}_throttle_count", 7)
    return tmp_path


def test_x86_has_no_limit_when_its_trip_points_are_not_set(x86: Path) -> None:
    assert read(x86) == DeviceState(66.0, False, None)


def test_x86_throttled_when_a_counter_grew_since_the_reading_before(x86: Path) -> None:
    reader = DeviceReader(x86, interval_s=0.0)
    counter = x86 / "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    assert reader.read().throttled is False
    write(counter, 9)
    assert [reader.read().throttled for _ in range(2)] == [True, False]
    counter.unlink()
    assert reader.read().throttled is False


def test_counters_are_enough_to_tell_throttling(x86: Path) -> None:
    for state in (x86 / "class/thermal").glob("cooling_device*/cur_state"):
        state.unlink()
    assert read(x86).throttled is False


def test_processor_throttle_of_x86(x86: Path) -> None:
    write(x86 / "class/thermal/cooling_device0/cur_state", 1)
    assert read(x86).throttled is True


@pytest.mark.parametrize("root", [".", "missing"])
def test_a_machine_that_tells_nothing(tmp_path: Path, root: str) -> None:
    assert read(tmp_path / root) == NOTHING


def test_garbage_is_nothing(tmp_path: Path) -> None:
    for number, temp in enumerate(("", "hot", "99e3", 999_000_000, -300_000, "9" * 5000)):
        add_zone(tmp_path, number, "zone", temp, ("passive", "soon"), ("hot", ""))
    (tmp_path / "class/thermal/thermal_zone7/temp").parent.mkdir()
    (tmp_path / "class/thermal/thermal_zone8").write_bytes(b"\xff\xfe")
    add_zone(tmp_path, 9, "zone", "").joinpath("temp").write_bytes(b"\xff\x00\x80")
    add_cooling(tmp_path, 0, "cpufreq", "fast")
    assert read(tmp_path) == NOTHING


def test_a_reading_is_kept_for_the_interval(orin: Path) -> None:
    now = [100.0]
    reader = DeviceReader(orin, interval_s=2.0, clock=lambda: now[0])
    before = reader.read()
    write(orin / "class/thermal/thermal_zone0/temp", 90000)
    now[0] = 101.9
    assert reader.read() is before
    now[0] = 102.0
    assert reader.read().temperature_c == 90.0
    write(orin / "class/thermal/thermal_zone0/temp", 80000)
    now[0] = 1.0  # set back: keeping the reading until then could take for ever
    assert reader.read().temperature_c == 80.0


def test_this_machine_can_be_read() -> None:
    state = DeviceReader().read()
    assert state.temperature_c is None or -40 <= state.temperature_c <= 150
