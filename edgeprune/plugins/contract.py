"""What the plugin libraries and this package agree on: files, their ABI, and the creators every one of them brings."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from edgeprune.errors import EnvironmentLackError

CREATORS = ("TopKGather", "GatherTokens", "ScatterTokens")
VERSION = "1"
NAMESPACE = "edgeprune"


@dataclass(frozen=True)
class Library:
    """One of the two libraries; TensorRT's classes differ too much between them for a single one.

    Attributes:
        abi: what its `edgeprune_plugin_abi()` returns.
        file: its name.
        majors: versions of TensorRT that load it.
        headers: versions of TensorRT's headers it is built with, in words.
    """

    abi: int
    file: str
    majors: tuple[int, ...]
    headers: str


LIBRARIES = (
    Library(8, "libedgeprune_trt8.so", (8,), "8.5 or 8.6"),
    Library(10, "libedgeprune_trt10.so", (10, 11), "10.0 to 11.x"),
)
MAJORS = tuple(major for library in LIBRARIES for major in library.majors)


def library_for(version: str) -> Library:
    """Return the library for a version of TensorRT.

    Args:
        version: as TensorRT says it, "10.3.0", or the major alone.

    Raises:
        EnvironmentLackError: `tensorrt-version` when no library is made for it.
    """
    leading = re.match(r"\d+", version)
    for library in LIBRARIES:
        if leading and int(leading[0]) in library.majors:
            return library
    raise EnvironmentLackError(
        f"no plugin library is made for TensorRT {version or '(no version)'}",
        code="tensorrt-version",
        expected="TensorRT 8.5, 8.6, 10.x or 11.x",
        hint="install one of these versions",
        details={"tensorrt": version, "supported": list(MAJORS)},
    )


def wanted_names() -> list[str]:
    """Return the creators as messages name them."""
    return [describe(name, VERSION, NAMESPACE) for name in CREATORS]


def describe(name: str, version: str, namespace: str) -> str:
    """Return "namespace::name version"."""
    return f"{namespace}::{name} {version}"


def build_command() -> str:
    """Return the command that builds the libraries on this machine."""
    return f"edgeprune plugins build --preset {'desktop' if platform.machine() == 'x86_64' else 'orin'}"
