"""Timings of kernels that TensorRT has measured, one file per device and version, shared by all builds.

A file that TensorRT does not take is ignored; what is saved is joined with what others saved meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeprune.plugins.locate import cache_root


def default_path(device: str, tensorrt: str) -> Path:
    """Return the file for a device and a version in the user's cache."""
    name = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return cache_root() / "timing" / f"{name}-trt{tensorrt}.cache"


def attach(config: Any, path: Path | None) -> list[str]:
    """Give a builder configuration the timings of a file; return warnings.

    Args:
        config: TensorRT's IBuilderConfig.
        path: the file, which need not exist; None starts with nothing.
    """
    content, warnings = b"", []
    if path is not None:
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            warnings.append(f"the timing cache '{path}' cannot be read: {error.strerror}")
    if content and _take(config, content):
        return warnings
    if content:
        warnings.append(f"the timing cache '{path}' is not one of this TensorRT and device; it is replaced")
    _take(config, b"")
    return warnings


def save(config: Any, path: Path) -> list[str]:
    """Add the timings of a build to a file, which is replaced whole; return warnings."""
    own = config.get_timing_cache()
    if own is None:
        return []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if path.exists() and (others := _read(config, path.read_bytes())) is not None:
                own.combine(others, ignore_mismatch=False)
            _replace(path, bytes(memoryview(own.serialize())))
    except OSError as error:
        return [f"the timing cache '{path}' cannot be written: {error.strerror}"]
    return []


def _take(config: Any, content: bytes) -> bool:
    cache = _read(config, content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))


def _read(config: Any, content: bytes) -> Any:
    """Return a cache, None for bytes that are none; how TensorRT says so differs between versions."""
    try:
        return config.create_timing_cache(content)
    except Exception:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other builds from replacing the file at the same time."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
