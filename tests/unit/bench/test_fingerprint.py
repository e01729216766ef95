from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeprune.bench import fingerprint as env
from edgeprune.runtime.cuda import Device

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
cpu MHz\t\t: 1999.9
flags\t\t: fpu avx2 fma avx512_vnni hypervisor

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.fixture
def fake_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    files: dict[str, str] = {}
    monkeypatch.setattr(env, "_read", lambda path: files.get(path, ""))
    return files


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_fingerprint_names_no_host_user_or_path() -> None:
    texts = strings(env.take_fingerprint().to_dict())
    # a machine may be called like something that is rightly there, such as "linux"
    names = {n for n in (platform.node(), getpass.getuser()) if len(n) > 3 and n.lower() not in ("linux", "python")}
    for text in texts:
        assert "/" not in text
        assert os.sep not in text
        assert str(Path.home()) not in text or str(Path.home()) == "/"
        assert not any(name in text for name in names)


def test_fingerprint_is_json_ready() -> None:
    fields = env.take_fingerprint().to_dict()
    assert json.loads(json.dumps(fields)) == fields


def test_fingerprint_reads_the_first_cpu(fake_files: dict[str, str]) -> None:
    fake_files["/proc/cpuinfo"] = CPUINFO
    taken = env.take_fingerprint()
    assert taken.cpu_model == "Some CPU @ 2.00GHz"
    assert taken.cpu_flags == ("avx2", "fma", "avx512_vnni")
    assert taken.virtual is True
    assert taken.mhz == 1999.9


def test_fingerprint_reads_memory_and_governor(fake_files: dict[str, str]) -> None:
    fake_files["/proc/meminfo"] = "MemTotal:       2048 kB\nMemFree: 1 kB\n"
    fake_files["/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"] = "performance\n"
    taken = env.take_fingerprint()
    assert (taken.memory_mib, taken.governor) == (2, "performance")


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0,4\n", 2), ("", None)])
def test_fingerprint_counts_the_threads_of_a_core(fake_files: dict[str, str], text: str, count: int | None) -> None:
    fake_files["/sys/devices/system/cpu/cpu0/topology/thread_siblings_list"] = text
    assert env.take_fingerprint().threads_per_core == count


def test_fingerprint_is_taken_when_the_system_tells_nothing(fake_files: dict[str, str]) -> None:
    taken = env.take_fingerprint()
    assert (taken.cpu_flags, taken.memory_mib, taken.virtual, taken.mhz) == ((), None, None, None)
    assert env.read_cpu_times() is None


def test_fingerprint_names_torch_only_when_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.metadata, "version", lambda name: "1.2")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert "torch" not in env.take_fingerprint().packages
    monkeypatch.setitem(sys.modules, "torch", env)
    assert env.take_fingerprint().packages["torch"] == "1.2"


def test_read_mhz_reads_the_scaled_clock(fake_files: dict[str, str]) -> None:
    core = env.usable_cores()[0]
    fake_files[f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"] = "1800000\n"
    assert env.read_mhz() == 1800.0


def test_read_cpu_times_leaves_idle_out(fake_files: dict[str, str]) -> None:
    fake_files["/proc/stat"] = "cpu  100 200 300 9999 8888 40 50 60 0 0\ncpu0 1 2 3\n"
    times = env.read_cpu_times()
    assert times is not None
    ticks = os.sysconf("SC_CLK_TCK")
    assert (times.busy, times.steal) == (pytest.approx(690 / ticks), pytest.approx(60 / ticks))


def test_other_cores_leave_own_work_out() -> None:
    before, after = env.CpuTimes(10.0, 0.0, 1.0, 100.0), env.CpuTimes(25.0, 0.4, 11.0, 110.0)
    assert after.other_cores(before) == pytest.approx(0.5)
    assert after.steal_share(before, 2) == pytest.approx(0.02)


def test_read_pss_reads_the_share_of_this_process(fake_files: dict[str, str]) -> None:
    assert env.read_pss_mib() is None
    fake_files["/proc/self/smaps_rollup"] = "Rss:    9000 kB\nPss:    3072 kB\nPss_Anon: 1024 kB\n"
    assert env.read_pss_mib() == 3.0


def test_a_package_without_metadata_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.0"))
    monkeypatch.setattr("edgeprune.bench.fingerprint.metadata.version", missing)
    assert env.take_fingerprint().packages["tensorrt"] == "8.6.0"


def missing(package: str) -> str:
    raise metadata.PackageNotFoundError(package)


def test_the_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.bench.fingerprint.find_device", lambda: Device(0, "Orin", (8, 7), 1 << 33, None))
    gpu = {"name": "Orin", "compute_capability": "8.7", "memory_mib": 8192, "driver": None}
    assert env.describe_gpu() == {"gpu": gpu}


def test_a_jetson_names_release_power_mode_and_heat(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
        "var/lib/nvpmodel/status": "pmode:0002",
        "sys/class/devfreq/17000000.gpu/min_freq": "624750000",
        "sys/class/devfreq/17000000.gpu/max_freq": "624750000",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "52031",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert env.describe_board(tmp_path) == {
        "temperature_c": 52.031,
        "throttled": None,
        "jetson": {"l4t": "36.4.3", "jetpack": "6.1 or 6.2", "nvpmodel": "2 MAXN_SUPER", "jetson_clocks": True},
    }


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    assert env.describe_board(tmp_path) == {"temperature_c": None, "throttled": None}
