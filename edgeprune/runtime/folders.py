"""Folders on disk that are written whole or not at all: bundles and what is made of them. No torch, no onnx."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from edgeprune.errors import EdgepruneError, EnvironmentLackError, InputError

_STALE_SECONDS = 24 * 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOTEMPTY, errno.ENAMETOOLONG)

W = TypeVar("W", bound="FolderWriter")


class FolderWriter:
    """Writes a folder beside its place and moves it there at the end; any other way out leaves nothing.

    Put files into `.path` inside the `with` block, then call `commit`. A run that is killed outright leaves a
    hidden directory, which the first run a day later removes.

    Attributes:
        kind: what the folder is, in a word.
        size: what it needs space for, in words.

    Args:
        out: the directory to make.
        overwrite: replace `out` when it is a folder of this kind of ours or empty.
    """

    kind = "folder"
    size = "the new files"

    def __init__(self, out: Path | str, *, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.overwrite = overwrite
        self.path = self.out  # the temporary directory once entered
        self._created: list[Path] = []  # parents made by us, innermost first
        self._aside: Path | None = None  # what is being replaced
        self._finished = False

    def __enter__(self: W) -> W:
        """Make the temporary directory.

        Raises:
            InputError: `output-exists`, `output-not-a-<kind>`, `output-not-writable`.
            EnvironmentLackError: `disk-full`.
        """
        try:
            self.out = self.out.resolve()  # an overwritten link keeps pointing at it
            self._check_out()
            self._remove_stale()
            self._created = [p for p in self.out.parents if not p.exists()]
            self.path = self._beside("tmp")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            self._remove()
            raise self._explain(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._finished:
            return
        self._remove()
        if isinstance(error, OSError) and self._concerns_us(error):
            raise self._explain(error) from error

    def commit(self, names: Iterable[str]) -> None:
        """Bring the files to the disk and move the folder into place.

        Args:
            names: of the files, relative to the folder.

        Raises:
            InputError: `output-exists` when another run made `out` in the meantime.
        """
        for name in names:
            sync(self.path / name)
        sync(self.path)
        self._move_into_place()
        self._finished = True

    def is_ours(self, path: Path) -> bool:
        """Tell whether a directory holds what this writer writes; an empty one may be replaced anyway."""
        raise NotImplementedError

    def _check_out(self) -> None:
        """Refuse an `out` that is in the way."""
        if not self.out.exists():
            return
        if not self.overwrite:
            raise InputError(
                f"{self.out} exists already",
                code="output-exists",
                expected="a directory that does not exist",
                hint=f"choose another directory, or pass --overwrite to replace a {self.kind}",
            )
        if not self._is_replaceable():
            raise InputError(
                f"{self.out} is not a {self.kind}, so it is not replaced",
                code=f"output-not-a-{self.kind}",
                expected=f"a {self.kind} written by edgeprune, or an empty directory",
                hint="choose another directory",
            )

    def _is_replaceable(self) -> bool:
        """Tell whether `out` is a directory that is empty or one of ours, valid or not."""
        return self.out.is_dir() and (self.is_ours(self.out) or not any(self.out.iterdir()))

    def _move_into_place(self) -> None:
        self._check_out()  # again: exporting takes a while
        if self.out.exists():
            self._aside = self._beside("old")
            try:
                self.out.rename(self._aside)
                self.path.rename(self.out)
            except BaseException:
                if self._aside.exists() and not self.out.exists():
                    self._aside.rename(self.out)
                raise
            shutil.rmtree(self._aside, ignore_errors=True)
        else:
            self.path.rename(self.out)
        sync(self.out.parent)

    def _beside(self, kind: str) -> Path:
        return self.out.parent / f".{self.out.name}.{kind}-{secrets.token_hex(4)}"

    def _remove(self) -> None:
        if self.path != self.out:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._aside is not None and self.out.exists():
            shutil.rmtree(self._aside, ignore_errors=True)
        with suppress(OSError):  # a parent that was never made, or that somebody else uses by now
            for parent in self._created:
                parent.rmdir()

    def _remove_stale(self) -> None:
        """Remove what killed runs left a day ago or before; what was replaced only where a new one stands."""
        kinds = ("tmp", "old") if self.out.exists() else ("tmp",)
        prefixes = tuple(f".{self.out.name}.{kind}-" for kind in kinds)
        with suppress(OSError):  # no parent yet, or another run removed it first: nothing that stops this run
            for entry in self.out.parent.iterdir():
                if entry.name.startswith(prefixes) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(entry, ignore_errors=True)

    def _concerns_us(self, error: OSError) -> bool:
        """Tell a failure to write here from one to read elsewhere; a write to an open file names no file."""
        if error.filename is None:
            return error.errno in _FULL
        ours = Path(os.fsdecode(error.filename)).is_relative_to(self.path) or error.filename2 is not None
        return ours and error.errno in (*_FULL, *_DENIED)

    def _explain(self, error: OSError | RuntimeError) -> EdgepruneError:
        if isinstance(error, OSError) and error.errno in _FULL:
            return EnvironmentLackError(
                f"the disk is full: writing {self.out} failed ({error})",
                code="disk-full",
                expected=f"free space for {self.size}, beside a {self.kind} that is replaced",
                hint="free some space or write to another disk; nothing was left behind",
            )
        return InputError(
            f"cannot write {self.out} ({error})",
            code="output-not-writable",
            expected="a place where this user may create a directory",
            hint="choose another directory",
        )


def sync(path: Path) -> None:
    """Bring a file or directory to the disk, where the system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync
            raise
    finally:
        os.close(handle)
