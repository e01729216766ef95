"""What a measurement was made on. No host name, no user, no path: a fingerprint can be published."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeprune.runtime.cuda import find_device
from edgeprune.runtime.device_state import DeviceReader
from edgeprune.runtime.jetson import read_jetson
from edgeprune.runtime.processor import first_processor
from edgeprune.version import __version__

CPU_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
LAZY_PACKAGES = ("torch", "openvino", "tensorrt", "pycuda")  # named only when the process uses them
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Fingerprint:
    """The environment of a run.

    Attributes:
        cpu_model: as the operating system names it.
        cpu_flags: instruction sets that decide which kernels run; those of `CPU_FLAGS` the CPU has.
        logical_cores: of the machine.
        usable_cores: this process may run on.
        threads_per_core: logical cores that share one core's arithmetic, as far as the system tells.
        memory_mib: installed memory.
        virtual: the CPU says that it runs under a hypervisor; None when unknown.
        governor: frequency governor of the first core.
        mhz: clock of the first usable core now.
        load_1min: load average when the fingerprint was taken.
        packages: name -> version.
    """

    cpu_model: str
    cpu_flags: tuple[str, ...]
    architecture: str
    logical_cores: int
    usable_cores: int
    threads_per_core: int | None
    memory_mib: int | None
    virtual: bool | None
    governor: str | None
    mhz: float | None
    load_1min: float | None
    os: str
    python: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {**asdict(self), "cpu_flags": list(self.cpu_flags)}


def take_fingerprint() -> Fingerprint:
    """Return the environment of this process."""
    cpuinfo = first_processor(_read("/proc/cpuinfo"))
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return Fingerprint(
        cpu_model=cpuinfo.get("model name") or platform.processor() or "unknown",
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        architecture=platform.machine(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=len(usable_cores()),
        threads_per_core=_threads_per_core(),
        memory_mib=_memory_mib(),
        virtual=("hypervisor" in flags) if flags else None,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        mhz=read_mhz() or _number(cpuinfo.get("cpu MHz")),
        load_1min=read_load(),
        os=f"{platform.system()} {platform.release().split('-')[0]}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages=_packages(),
    )


def describe_gpu() -> dict[str, Any]:
    """Return the GPU as one more entry of a fingerprint.

    Raises:
        EnvironmentLackError: `gpu-missing`.
    """
    device = find_device()
    capability = ".".join(map(str, device.compute_capability))
    memory = device.total_bytes >> 20
    return {
        "gpu": {"name": device.name, "compute_capability": capability, "memory_mib": memory, "driver": device.driver}
    }


def describe_board(root: Path = Path("/")) -> dict[str, Any]:
    """Return further entries of a fingerprint: how hot the machine is, and of a Jetson its release and power mode.

    Args:
        root: where the file system begins.
    """
    state = DeviceReader(root / "sys").read()
    found: dict[str, Any] = {"temperature_c": state.temperature_c, "throttled": state.throttled}
    jetson = read_jetson(root)
    if jetson is not None:
        found["jetson"] = {
            "l4t": jetson.linux,
            "jetpack": jetson.jetpack,
            "nvpmodel": None if jetson.mode is None else f"{jetson.mode.number} {jetson.mode.name}",
            "jetson_clocks": jetson.held,
        }
    return found


def usable_cores() -> list[int]:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def read_load() -> float | None:
    """Return the one-minute load average, None where there is none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def read_mhz() -> float | None:
    """Return the scaled clock of the first usable core in MHz, None when the machine does not tell."""
    khz = _number(_read(f"/sys/devices/system/cpu/cpu{usable_cores()[0]}/cpufreq/scaling_cur_freq"))
    return None if khz is None else khz / 1000


def read_pss_mib() -> float | None:
    """Return the resident memory of this process in MiB, shared pages by their share; None where unreadable."""
    for line in _read("/proc/self/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return None


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since the machine started, summed over its cores.

    Attributes:
        busy: user and system time of all processes.
        steal: time a hypervisor gave to others.
        own: processor time of this process.
        wall: any clock in seconds.
    """

    busy: float
    steal: float
    own: float
    wall: float

    def other_cores(self, before: CpuTimes) -> float:
        """Return how many cores other processes kept busy since `before`."""
        return max(0.0, (self.busy - before.busy - self.own + before.own) / max(self.wall - before.wall, 1e-9))

    def steal_share(self, before: CpuTimes, cores: int) -> float:
        """Return the share of the machine's time the host gave away since `before`."""
        return (self.steal - before.steal) / max((self.wall - before.wall) * cores, 1e-9)


def read_cpu_times() -> CpuTimes | None:
    """Return the machine's time accounts, None where there are none."""
    fields = _read("/proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) / os.sysconf("SC_CLK_TCK") for x in fields[1:9])
    return CpuTimes(user + nice + system + irq + softirq, steal, time.process_time(), time.perf_counter())


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _threads_per_core() -> int | None:
    """Count a list like "0,4" or "0-1"."""
    text = _read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").strip()
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return sum(ends[-1] - ends[0] + 1 for ends in ranges) or None


def _memory_mib() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return None


def _packages() -> dict[str, str]:
    names = [*PACKAGES, *(name for name in LAZY_PACKAGES if name in sys.modules)]
    return {"edgeprune": __version__, **{name: found for name in names if (found := _version(name))}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a folder on the path will do as well
        return getattr(sys.modules.get(package), "__version__", None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
