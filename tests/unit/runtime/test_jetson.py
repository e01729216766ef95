"""A Jetson's files, as JetPack 6 writes them, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.runtime.jetson import PowerMode, read_jetson

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC"
MODES = """
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
# mandatory section to configure the default power mode
< PM_CONFIG DEFAULT=1 >
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def board(root: Path, *, status: str = "pmode:0001", low: int = 1020, high: int = 1020) -> Path:
    return write(
        root,
        {
            "etc/nv_tegra_release": RELEASE,
            "etc/nvpmodel.conf": MODES,
            "var/lib/nvpmodel/status": status,
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "1510400\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1510400\n",
            "sys/class/devfreq/17000000.gpu/min_freq": f"{low}000000\n",
            "sys/class/devfreq/17000000.gpu/max_freq": f"{high}000000\n",
        },
    )


def test_a_jetson_is_read(tmp_path: Path) -> None:
    found = read_jetson(board(tmp_path))
    assert found is not None
    assert (found.linux, found.jetpack, found.tensorrt) == ("36.4.3", "6.1 or 6.2", "10.3")
    assert found.mode == PowerMode(1, "25W")
    assert found.fastest == PowerMode(2, "MAXN_SUPER")
    assert found.held is True


def test_clocks_that_move_are_not_held(tmp_path: Path) -> None:
    found = read_jetson(board(tmp_path, low=306))
    assert found is not None and found.held is False


def test_an_unknown_mode_keeps_its_number(tmp_path: Path) -> None:
    found = read_jetson(board(tmp_path, status="pmode:0007"))
    assert found is not None and found.mode == PowerMode(7, "unnamed")


def test_a_container_shows_the_release_alone(tmp_path: Path) -> None:
    found = read_jetson(write(tmp_path, {"etc/nv_tegra_release": RELEASE}))
    assert found is not None
    assert (found.mode, found.modes, found.held, found.fastest) == (None, (), None, None)


def test_an_unknown_release_has_no_jetpack(tmp_path: Path) -> None:
    found = read_jetson(write(tmp_path, {"etc/nv_tegra_release": "# R99 (release), REVISION: 1.0, GCID: 1"}))
    assert found is not None and (found.linux, found.jetpack) == ("99.1.0", None)


@pytest.mark.parametrize("text", [None, "", "no release\n"])
def test_no_jetson(tmp_path: Path, text: str | None) -> None:
    assert read_jetson(tmp_path if text is None else write(tmp_path, {"etc/nv_tegra_release": text})) is None
