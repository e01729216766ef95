"""The processor by name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def first_processor(cpuinfo: str) -> dict[str, str]:
    """Return the fields of the first processor of a /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def processor_name() -> str:
    """Return the processor as the system names it, "unknown" where it does not."""
    with suppress(OSError):
        return first_processor(Path("/proc/cpuinfo").read_text()).get("model name", "unknown")
    return "unknown"
