"""Loads the plugin into TensorRT's registry. Neither a builder nor a runtime is made: both need a GPU.

A library of the wrong kind can end the process inside `load_library`, so each is asked for its ABI before TensorRT
sees it. What TensorRT can do is asked of its objects; its version only says which library belongs to it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins.contract import (
    CREATORS,
    NAMESPACE,
    VERSION,
    Library,
    build_command,
    describe,
    library_for,
    wanted_names,
)
from edgeprune.plugins.locate import VARIABLE, Candidate, chosen, find_candidates

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """An attribute a creator takes; `kind` is TensorRT's name of its type."""

    name: str
    kind: str


@dataclass(frozen=True)
class Creator:
    """A creator as the registry holds it."""

    name: str
    version: str
    namespace: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class LibraryInfo:
    """What a library says of itself; `version` is None when it does not say."""

    abi: int
    version: str | None


@dataclass(frozen=True)
class LoadedPlugins:
    """The plugin in the registry of one TensorRT.

    Attributes:
        tensorrt: its version.
        path: the library, None when the creators were there before anything was loaded.
        place: where it was found, as `Candidate.place`.
        abi: of the library.
        version: of the library, as it says.
        way: "load_library", "self-registration", or "already registered".
        creators: every creator, in the order of `contract.CREATORS`.
        handle: TensorRT's of a library it has loaded; prints as a null capsule.
    """

    tensorrt: str
    path: Path | None
    place: str | None
    abi: int
    version: str | None
    way: str
    creators: tuple[Creator, ...]
    handle: Any = field(default=None, repr=False, compare=False)


_lock = threading.Lock()
_loaded: list[tuple[Any, LoadedPlugins]] = []  # with the module it was loaded into


def import_tensorrt() -> Any:
    """Return the module tensorrt.

    Raises:
        EnvironmentLackError: `tensorrt-missing` when it is not installed, does not load, or is an empty shell.
    """
    try:
        import tensorrt
    except Exception as error:  # also whatever its libraries raise when one is missing or of another version
        absent = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        what = "is not installed" if absent else f"does not load: {error}"
        raise _tensorrt_missing(f"the Python package 'tensorrt' {what}") from error
    if not hasattr(tensorrt, "get_plugin_registry"):
        raise _tensorrt_missing("the Python package 'tensorrt' is a shell without TensorRT in it")
    return tensorrt


def load_plugins(trt: Any = None, logger: Any = None, *, self_register: bool = False) -> LoadedPlugins:
    """Put the plugin into TensorRT's registry and prove it is there; a second call changes nothing.

    Args:
        trt: the module, such as tensorrt_lean; by default tensorrt, imported now.
        logger: a TensorRT logger, told what was loaded; none is needed.
        self_register: open the library and let it register itself, as TensorRT 8.5 wants, instead of `load_library`.

    Raises:
        EnvironmentLackError: `tensorrt-missing`, `tensorrt-version`, `plugin-missing`, `plugin-abi` or
            `plugin-refused`.
    """
    trt = import_tensorrt() if trt is None else trt
    tensorrt = str(getattr(trt, "__version__", ""))
    library = library_for(tensorrt)
    with _lock:
        earlier = next((loaded for module, loaded in _loaded if module is trt), None)
        if _listed(trt):
            loaded = earlier or _adopt(trt, tensorrt, library)
        else:
            loaded = _load(trt, tensorrt, library, self_register)
        if loaded is not earlier:
            _loaded[:] = [pair for pair in _loaded if pair[0] is not trt] + [(trt, loaded)]
            _tell(trt, logger, loaded)
    return loaded


def read_library(path: Path, library: Library, tensorrt: str) -> LibraryInfo:
    """Open a library and return what it says of itself.

    One that registers itself does so here. That is safe: it has to be linked to its TensorRT, and opens no other.

    Args:
        path: the file.
        library: the one it should be.
        tensorrt: version it is for.

    Raises:
        EnvironmentLackError: `plugin-refused` when it cannot be opened, `plugin-abi` when it is of another kind.
    """
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise _failure("plugin-refused", f"'{path}' cannot be opened: {error}", tensorrt, path) from error
    abi = _call(opened, "edgeprune_plugin_abi", ctypes.c_int)
    version = _call(opened, "edgeprune_plugin_version", ctypes.c_char_p)
    if abi != library.abi:
        found = "says no ABI" if abi is None else f"has plugin ABI {abi}"
        wanted = f"ABI {library.abi}: built with headers of TensorRT {library.headers}"
        raise _failure(
            "plugin-abi",
            f"'{path}' {found}, which TensorRT {tensorrt} cannot take; it was not handed over",
            tensorrt,
            path,
            expected=wanted,
            abi=abi,
            abi_wanted=library.abi,
        )
    return LibraryInfo(abi, version.decode(errors="replace") if version else None)


def missing(library: Library, tensorrt: str, candidates: tuple[Candidate, ...]) -> EnvironmentLackError:
    """Return the error `plugin-missing` with every place and why it was passed over."""
    return _failure(
        "plugin-missing",
        f"no plugin library for TensorRT {tensorrt}",
        tensorrt,
        None,
        expected=f"{library.file} in one of: " + "; ".join(map(str, candidates)),
        candidates=[{"place": c.place, "path": str(c.path), "passed_over": c.passed_over} for c in candidates],
    )


def _load(trt: Any, tensorrt: str, library: Library, self_register: bool) -> LoadedPlugins:
    candidate = _choose(library, tensorrt)
    by_itself = self_register or not hasattr(trt.get_plugin_registry(), "load_library")
    info = read_library(candidate.path, library, tensorrt)
    handle: Any = None
    if not by_itself and not _listed(trt):  # opening it may have been enough
        handle = _hand_over(trt, candidate.path, tensorrt)
    try:
        creators = _verify(trt, tensorrt, candidate.path)
    except EnvironmentLackError:
        if handle is not None:
            _take_back(trt, handle)
        raise
    way = "self-registration" if handle is None else "load_library"
    return LoadedPlugins(
        tensorrt, candidate.path, candidate.place, info.abi, info.version, way, creators, handle=handle
    )


def _adopt(trt: Any, tensorrt: str, library: Library) -> LoadedPlugins:
    """Return the creators that somebody else has registered; loading them again would be refused."""
    creators = _verify(trt, tensorrt, None)
    return LoadedPlugins(tensorrt, None, None, library.abi, None, "already registered", creators)


def _choose(library: Library, tensorrt: str) -> Candidate:
    candidates = find_candidates(library)
    candidate = chosen(candidates)
    if candidate is None:
        raise missing(library, tensorrt, candidates)
    return candidate


def _hand_over(trt: Any, path: Path, tensorrt: str) -> Any:
    """Let the registry load a library; TensorRT answers None when it refuses, mostly without a word."""
    try:
        handle = trt.get_plugin_registry().load_library(str(path))
    except Exception as error:  # the binding's exceptions share no public base
        raise _refused(trt, tensorrt, path, f"TensorRT {tensorrt} refused '{path}': {error}") from error
    if handle is None:
        raise _refused(trt, tensorrt, path, f"TensorRT {tensorrt} refused '{path}' without saying why")
    return handle


def _take_back(trt: Any, handle: Any) -> None:
    """Remove a library that did not bring what was wanted."""
    remove = getattr(trt.get_plugin_registry(), "deregister_library", None)
    if remove is not None:
        with suppress(Exception):
            remove(handle)


def _verify(trt: Any, tensorrt: str, path: Path | None) -> tuple[Creator, ...]:
    """Return every creator, asked for by name, version and namespace.

    The registry is asked for anew each time: one taken before a library was loaded is not to be relied on.
    """
    registry = trt.get_plugin_registry()
    get = getattr(registry, "get_creator", None) or registry.get_plugin_creator
    creators = []
    for name in CREATORS:
        creator = get(name, VERSION, NAMESPACE)
        read = None if creator is None else _read_creator(creator)
        if read is None or (read.name, read.version, read.namespace) != (name, VERSION, NAMESPACE):
            source = "the library registered by others" if path is None else f"'{path}'"
            lacking = describe(name, VERSION, NAMESPACE)
            raise _refused(trt, tensorrt, path, f"{source} did not bring {lacking} to TensorRT {tensorrt}")
        creators.append(read)
    return tuple(creators)


def _read_creator(creator: Any) -> Creator:
    fields = tuple(Field(str(one.name), getattr(one.type, "name", str(one.type))) for one in creator.field_names or ())
    return Creator(*_identity(creator), fields)


def _listed(trt: Any) -> bool:
    """Return whether the registry lists every creator; asking for one that is not there would be logged as an error."""
    wanted = {(name, VERSION, NAMESPACE) for name in CREATORS}
    return wanted <= {_identity(creator) for creator in _all_creators(trt)}


def _all_creators(trt: Any) -> Iterator[Any]:
    registry = trt.get_plugin_registry()
    for listing in ("all_creators_recursive", "all_creators", "plugin_creator_list"):
        if hasattr(registry, listing):
            yield from getattr(registry, listing) or ()
            return


def _identity(creator: Any) -> tuple[str, str, str]:
    """Return name, version and namespace."""
    name, version, namespace = (getattr(creator, part, "") for part in ("name", "plugin_version", "plugin_namespace"))
    return str(name), str(version), str(namespace)


def _call(opened: ctypes.CDLL, name: str, kind: Any) -> Any:
    """Return what an exported function without arguments returns, None when there is no such function."""
    try:
        function = getattr(opened, name)
    except AttributeError:
        return None
    function.argtypes, function.restype = [], kind
    return function()


def _tell(trt: Any, logger: Any, loaded: LoadedPlugins) -> None:
    names = ", ".join(creator.name for creator in loaded.creators)
    words = f"edgeprune: {names} from {loaded.path or 'a library loaded before'} by {loaded.way}"
    _log.info("%s", words)
    if logger is not None:
        logger.log(trt.Logger.INFO, words)


def _refused(trt: Any, tensorrt: str, path: Path | None, message: str) -> EnvironmentLackError:
    similar = [_identity(creator) for creator in _all_creators(trt)]
    found = sorted(describe(*one) for one in similar if one[0] in CREATORS or one[2] == NAMESPACE)
    wanted = wanted_names()
    said = f"the creators {', '.join(wanted)}; the registry has {', '.join(found) or 'none of them'}"
    return _failure("plugin-refused", message, tensorrt, path, expected=said, found=found, wanted=wanted)


def _failure(
    code: str, message: str, tensorrt: str, path: Path | None, *, expected: str | None = None, **details: Any
) -> EnvironmentLackError:
    """Return an error that names TensorRT, the file and the command to build."""
    command = build_command()
    instead = f", and unset {VARIABLE}, which decides alone" if os.environ.get(VARIABLE) else ""
    basics = {"tensorrt": tensorrt, "path": None if path is None else str(path), "build": command}
    return EnvironmentLackError(
        message, code=code, expected=expected, hint=f"build it here: {command}{instead}", details={**basics, **details}
    )


def _tensorrt_missing(message: str) -> EnvironmentLackError:
    return EnvironmentLackError(
        message,
        code="tensorrt-missing",
        expected="TensorRT 8.5, 8.6, 10.x or 11.x with its Python package",
        hint=(
            "pip install tensorrt; on a Jetson: apt install python3-libnvinfer, and make virtual environments with "
            "--system-site-packages"
        ),
    )
