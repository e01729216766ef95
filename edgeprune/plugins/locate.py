"""Where a plugin library is looked for, in order, and why each place was passed over. No library is opened here."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.plugins.contract import Library
from edgeprune.version import __version__

VARIABLE = "EDGEPRUNE_PLUGIN_PATH"
ROOT = Path(__file__).resolve().parents[2]
BESIDE = Path(__file__).resolve().with_name("lib")
SUBFOLDERS = (".", "lib")
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of ELF


@dataclass(frozen=True)
class Candidate:
    """One place.

    Attributes:
        place: what kind of place it is.
        path: the file that was looked for.
        passed_over: why it is not the one; None for the one that would be loaded.
    """

    place: str
    path: Path
    passed_over: str | None

    def __str__(self) -> str:
        return f"{self.place}: {self.path} ({self.passed_over or 'taken'})"


def find_candidates(library: Library, environ: Mapping[str, str] = os.environ) -> tuple[Candidate, ...]:
    """Return every place in order; at most one is not passed over.

    A path in EDGEPRUNE_PLUGIN_PATH is an order: when nothing fit is there, nothing else is taken.
    """
    found: list[Candidate] = []
    done = None
    for place, path in _places(library, environ):
        reason = done or why_unusable(path)
        found.append(Candidate(place, path, reason))
        if place == VARIABLE:
            done = f"{VARIABLE} is set"
        elif reason is None:
            done = "an earlier place has one"
    return tuple(found)


def chosen(candidates: tuple[Candidate, ...]) -> Candidate | None:
    """Return the candidate that was not passed over."""
    return next((candidate for candidate in candidates if candidate.passed_over is None), None)


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's cache of edgeprune."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # unset, or relative, which the XDG specification says to ignore
        base = Path(environ.get("HOME") or "~").expanduser() / ".cache"
    return base / "edgeprune"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where `edgeprune plugins build` puts the libraries of this version."""
    return cache_root(environ) / "plugins" / __version__


def source_folder() -> Path | None:
    """Return the CMake sources of a checkout, None for an installed package."""
    folder = ROOT / "plugins"
    return folder if (folder / "CMakeLists.txt").is_file() else None


def why_unusable(path: Path) -> str | None:
    """Return why a file cannot be a library for this machine, None when it can."""
    try:
        if not path.exists():
            return "no such file"
        if not path.is_file():
            return "a directory" if path.is_dir() else "not a file"
        machine = _machine_of(path)
    except OSError as error:
        return error.strerror or str(error)
    if machine is None:
        return "not a shared library"
    if machine != MACHINES.get(platform.machine(), machine):
        names = {number: name for name, number in MACHINES.items()}
        return f"built for {names.get(machine, 'another processor')}, this is {platform.machine()}"
    return None


def is_shared_library(path: Path) -> bool:
    """Return whether a file is a library, for whatever processor."""
    return path.is_file() and _machine_of(path) is not None


def _machine_of(path: Path) -> int | None:
    """Return the processor an ELF file is for, None for any other file."""
    with path.open("rb") as file:
        head = file.read(20)
    return int.from_bytes(head[18:20], "little") if len(head) == 20 and head.startswith(b"\x7fELF") else None


def _places(library: Library, environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    named = environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        yield VARIABLE, _in_folder(path, library) if path.is_dir() else path
    yield "package", _in_folder(BESIDE, library)
    yield "user cache", _in_folder(cache_folder(environ), library)
    if source_folder() is not None:
        yield "checkout", _newest(ROOT / "build" / "plugins", library)


def _in_folder(folder: Path, library: Library) -> Path:
    """Return where the library lies in a folder, or would."""
    paths = [folder / sub / library.file for sub in SUBFOLDERS]
    return next((path for path in paths if path.exists()), paths[0])


def _newest(folder: Path, library: Library) -> Path:
    """Return the library built last in a folder or one below it; each preset has its own there."""
    paths = [path for pattern in (library.file, f"*/{library.file}") for path in folder.glob(pattern)]
    return max(paths, key=lambda path: path.stat().st_mtime, default=folder / library.file)
