from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeprune.bench.telemetry_tegrastats import TegraLine, Tegrastats, TegrastatsSource, parse_tegrastats
from tests.helpers.telemetry import CAPTURES, capture


@pytest.mark.parametrize(
    ("name", "rails", "gpu_mhz", "gpu_load", "cores", "hottest"),
    [
        ("jp5-agx-orin", {"VDD_GPU_SOC": 3.2, "VDD_CPU_CV": 1.6, "VIN_SYS_5V0": 5.0}, 0.0, 0.0, 2201.0, "CPU"),
        ("jp6-orin-nano", {"VDD_IN": 9.12, "VDD_CPU_GPU_CV": 3.38, "VDD_SOC": 1.74}, 624.0, 97.0, 1510.0, "gpu"),
        ("jp7-agx-orin", {"VDD_GPU_SOC": 5.139, "VDD_CPU_CV": 3.268, "VIN_SYS_5V0": 5.5}, 1275.0, 12.0, 2201.0, "cpu"),
        ("jp7-thor", {"VDD_GPU": -0.392, "VIN": 23.4}, 1000.0, None, 2601.0, "tj"),
        ("jp4-nano", {"POM_5V_IN": 3.812, "POM_5V_GPU": 1.2, "POM_5V_CPU": 0.4}, 921.0, 45.0, 1428.0, "AO"),
    ],
)
def test_lines_of_every_release(
    name: str, rails: dict[str, float], gpu_mhz: float, gpu_load: float | None, cores: float, hottest: str
) -> None:
    line = parse_tegrastats(capture(name)[0])
    assert rails.items() <= line.rails_w.items()
    assert not {"RAM", "SWAP", "IRAM", "NC"} & set(line.rails_w)
    assert (line.gpu_mhz, line.gpu_load, max(line.core_mhz)) == (gpu_mhz, gpu_load, cores)
    assert max(line.temperatures_c, key=line.temperatures_c.__getitem__) == hottest


def test_sensors_that_are_off_or_constant_are_left_out() -> None:
    assert "CV0" not in parse_tegrastats(capture("jp5-agx-orin")[0]).temperatures_c
    assert "PMIC" not in parse_tegrastats(capture("jp4-nano")[0]).temperatures_c


def test_a_line_of_something_else_says_nothing() -> None:
    assert parse_tegrastats("tegrastats: command not found") == TegraLine()


def test_source_tells_the_newest_line() -> None:
    lines = capture("jp5-agx-orin")
    source = TegrastatsSource(lines)
    values = dict(zip([(c.name, c.kind) for c in source.channels], source.read(), strict=True))
    while values["gpu", "load"] != 99.0:  # the thread has the last line soon
        values = dict(zip([(c.name, c.kind) for c in source.channels], source.read(), strict=True))
    assert values["VDD_GPU_SOC", "power"] == 18.2
    assert values["gpu", "clock"] == 1300.0


def test_a_tegrastats_of_our_own_is_read_and_ended(tmp_path: Path) -> None:
    script = tmp_path / "tegrastats"
    script.write_text(f"#!/bin/sh\ncat '{CAPTURES / 'tegrastats-jp6-orin-nano.txt'}'\nexec sleep 60\n")
    script.chmod(0o755)
    with Tegrastats(str(script)) as running:
        assert running.source is not None
        process = running._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_without_tegrastats_there_is_no_source() -> None:
    with Tegrastats("no-such-tegrastats") as running:
        assert running.source is None
