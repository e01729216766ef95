"""Writing result files whole or not at all; no torch here."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from edgeprune.errors import EdgepruneError, EnvironmentLackError, InputError


def check_suffix(out: Path, suffix: str, hint: str = "") -> None:
    """Raise InputError `output-suffix` unless the file name ends as its content wants."""
    if out.suffix != suffix:
        raise InputError(
            f"--output {out} does not end in {suffix}",
            code="output-suffix",
            expected=f"a file name ending in {suffix}",
            hint=f"--output {out.with_suffix(suffix) if out.name else 'model' + suffix}{hint}",
        )


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise before long work what would be raised after it.

    Args:
        paths: the files that will be written, all into one directory.
        overwrite: files of these names may be replaced; directories never are.

    Raises:
        InputError: `output-exists`, `output-not-writable`.
    """
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite):
            raise InputError(
                f"'{path}' exists",
                code="output-exists",
                expected="a name that is free",
                hint="choose another --output" + ("" if path.is_dir() else ", or add --overwrite"),
            )
    out = paths[0].absolute()
    parent = next(p for p in (out.parent, *out.parent.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise _not_writable(paths[0], f"'{parent}' is not a directory one may write to")


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files into one directory; all are complete on the disk before any takes its name.

    Raises:
        InputError: `output-not-writable`.
        EnvironmentLackError: `disk-full`.
    """
    first = next(iter(contents))
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            with parts[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise explain(first, error) from error
    finally:
        for part in parts.values():
            with suppress(OSError):  # what is in the way may be no directory at all
                part.unlink()


def explain(out: Path, error: OSError) -> EdgepruneError:
    """Return the error for a write that failed: `disk-full` or `output-not-writable`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentLackError(
            f"no space left for '{out}'", code="disk-full", hint="free some space or choose another --output"
        )
    return _not_writable(out, error.strerror or str(error))


def _not_writable(out: Path, why: str) -> InputError:
    return InputError(
        f"cannot write '{out}': {why}",
        code="output-not-writable",
        expected="a directory one may write to",
        hint="choose another --output",
    )
