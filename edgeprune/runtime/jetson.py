"""What a Jetson says of itself in files: its release, power mode, and whether its clocks are held. Calls no program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Jetson Linux -> JetPack, and the TensorRT that comes with it.
_JETPACKS = {
    (35, 2): ("5.1", "8.5"),
    (35, 3): ("5.1.1", "8.5"),
    (35, 4): ("5.1.2", "8.5"),
    (36, 2): ("6.0 DP", "8.6"),
    (36, 3): ("6.0", "8.6"),
    (36, 4): ("6.1 or 6.2", "10.3"),
    (38, 2): ("7.0", "10.13"),
    (38, 4): ("7.1", "10.13"),
    (39, 2): ("7.2", "10.16"),
}
_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: (\d+)((?:\.\d+)*)")
_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
_FASTEST = "MAXN"  # how the names of modes without limits begin


@dataclass(frozen=True)
class PowerMode:
    """A mode of nvpmodel."""

    number: int
    name: str


@dataclass(frozen=True)
class Jetson:
    """A Jetson as its files describe it; None where they do not say.

    Attributes:
        linux: release of Jetson Linux, "36.4.3".
        jetpack: its name for people.
        tensorrt: version that comes with it.
        mode: the power mode now.
        modes: all there are.
        held: processor and GPU run at one clock each, as after jetson_clocks.
    """

    linux: str
    jetpack: str | None
    tensorrt: str | None
    mode: PowerMode | None
    modes: tuple[PowerMode, ...]
    held: bool | None

    @property
    def fastest(self) -> PowerMode | None:
        """The mode without limits, None when the files name none."""
        return next((mode for mode in self.modes if mode.name.upper().startswith(_FASTEST)), None)


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """Return the Jetson this is, None when it is none or a container that does not show.

    Args:
        root: where the file system begins.
    """
    found = _RELEASE.search(_read(root / "etc/nv_tegra_release"))
    if found is None:
        return None
    jetpack, tensorrt = _JETPACKS.get((int(found[1]), int(found[2])), (None, None))
    modes = tuple(PowerMode(int(number), name) for number, name in _MODEL.findall(_read(root / "etc/nvpmodel.conf")))
    status = re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status"))
    number = int(status[1]) if status else None
    mode = None if number is None else next((m for m in modes if m.number == number), PowerMode(number, "unnamed"))
    return Jetson(f"{found[1]}.{found[2]}{found[3]}", jetpack, tensorrt, mode, modes, _clocks_held(root / "sys"))


def _clocks_held(sys: Path) -> bool | None:
    """Tell whether every processor and the GPU have one clock to choose from."""
    pairs = [
        (one.with_name("scaling_min_freq"), one)
        for one in sorted((sys / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_max_freq"))
    ]
    pairs += [(one.with_name("min_freq"), one) for one in sorted((sys / "class/devfreq").glob("*gpu*/max_freq"))]
    read = [(low, high) for low, high in ((_read(a), _read(b)) for a, b in pairs) if low and high]
    return all(low == high for low, high in read) if read else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
