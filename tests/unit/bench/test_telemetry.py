from __future__ import annotations

import pytest

from edgeprune.bench.telemetry import Channel, Monitor, TelemetryResult, telemetry_reasons, whole_board
from tests.helpers.telemetry import Time, Told

GPU = Channel("gpu", "clock", "MHz", "devfreq")
CORES = [Channel(f"cpu{i}", "clock", "MHz", "cpufreq") for i in range(2)]
HOT = Channel("gpu is limited", "throttle", "", "thermal")


def rail(name: str, source: str = "ina3221") -> Channel:
    return Channel(name, "power", "W", source)


def readings(*sources: Told, count: int = 3, elapsed_s: float | None = None) -> TelemetryResult:
    """Read some sources once a second."""
    time = Time()
    monitor = Monitor(sources, clock=time)
    for _ in range(count):
        monitor.read()
        time.now += 1
    return monitor.result(0.0, count if elapsed_s is None else elapsed_s)


def test_channels_have_range_and_median_of_what_could_be_read() -> None:
    result = readings(Told(GPU, 1300.0, None, 1000.0))
    (gpu,) = result.channels
    assert (gpu.low, gpu.median, gpu.high) == (1000.0, 1150.0, 1300.0)
    assert gpu.values == [1300.0, None, 1000.0]
    assert (result.t_s, result.hz) == ([0.0, 1.0, 2.0], 1.0)


def test_readings_outside_of_the_measured_part_do_not_count() -> None:
    assert readings(Told(GPU, 1.0, 2.0, 3.0), elapsed_s=1.5).channels[0].values == [1.0, 2.0]


def test_a_channel_that_was_never_read_is_left_out() -> None:
    assert readings(Told(GPU, None)).channels == []


def test_throttle_bits_are_named_and_make_a_run_unstable() -> None:
    result = readings(Told(HOT, 0.0, 1.0, 0.0))
    assert result.throttled == ["gpu is limited"]
    assert telemetry_reasons(result, on_device=True) == ["slowed down: gpu is limited"]


def test_a_clock_of_the_gpu_may_move_three_percent() -> None:
    assert telemetry_reasons(readings(Told(GPU, 1000.0, 975.0)), on_device=True) == []
    (reason,) = telemetry_reasons(readings(Told(GPU, 1000.0, 960.0)), on_device=True)
    assert "960 to 1000 MHz" in reason


def test_on_the_processor_the_fastest_core_counts() -> None:
    idle = readings(Told(CORES[0], 2000.0, 800.0), Told(CORES[1], 800.0, 2000.0), Told(GPU, 100.0, 900.0))
    assert telemetry_reasons(idle, on_device=False) == []
    slow = readings(Told(CORES[0], 2000.0, 800.0), Told(CORES[1], 800.0, 800.0))
    assert len(telemetry_reasons(slow, on_device=False)) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["VDD_CPU_GPU_CV", "VDD_IN", "VDD_SOC"], ["VDD_IN"]),
        (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ"], ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]),
        (["VDD_GPU", "VIN_SYS_5V0", "VIN"], ["VIN"]),
        (["first", "second"], ["second"]),
        ([], []),
    ],
)
def test_rails_of_the_whole_board(names: list[str], expected: list[str]) -> None:
    result = readings(*(Told(rail(name), float(i)) for i, name in enumerate(names)))
    assert [channel.name for channel in whole_board(result.of("power"))] == expected


def test_power_of_the_whole_board_is_the_sum_of_its_rails() -> None:
    packages = [Told(rail(f"package-{i}", "rapl"), None, 10.0, 20.0) for i in range(2)]
    assert readings(*packages).watts() == 30.0
    assert readings(Told(GPU, 1.0)).watts() is None


def test_a_part_of_the_time_has_ranges_of_its_own() -> None:
    part = readings(Told(GPU, 1300.0, 1000.0, 900.0), Told(HOT, 1.0, 0.0, 0.0)).between(1.0, 3.0)
    assert (part.channels[0].high, part.throttled) == (1000.0, [])


def test_the_thread_reads_until_the_block_is_left() -> None:
    monitor = Monitor([Told(GPU, 1.0)], hz=1000)
    with monitor:
        while len(monitor.log) < 3:
            pass
    before = len(monitor.log)
    assert len(monitor.log) == before >= 3


def test_nothing_to_read_needs_no_thread() -> None:
    with Monitor([]) as monitor:
        pass
    result = monitor.result(0.0, 1.0, ["rapl: no energy counters"])
    assert (result.hz, result.channels, result.lacking) == (0.0, [], ["rapl: no energy counters"])
