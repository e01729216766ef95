"""The folder of engines inside a bundle: written beside its place and moved there whole."""

from __future__ import annotations

import errno
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType

from edgeprune.errors import EdgepruneError, EnvironmentLackError, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_STALE_SECONDS = 24 * 3600.0


class EngineFolder:
    """A folder to write engines into; inside the `with` block it is `.path`, after `finish` it is `out`.

    An earlier `out` stays until then, and stays for good when the block is left in another way, which leaves nothing
    else behind.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = self._beside("tmp")
        self._aside: Path | None = None

    def __enter__(self) -> EngineFolder:
        """Make the temporary folder.

        Raises:
            InputError: `output-not-writable`.
            EnvironmentLackError: `disk-full`.
        """
        try:
            self.path.mkdir(parents=True)
            self._remove_stale()
        except OSError as error:
            raise self._explain(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise self._explain(error) from error

    def finish(self) -> None:
        """Move the folder into place."""
        try:
            if self.out.exists():
                self._aside = self._beside("old")
                self.out.rename(self._aside)
            try:
                self.path.rename(self.out)
            except BaseException:
                if self._aside is not None:
                    self._aside.rename(self.out)
                raise
        except OSError as error:
            raise self._explain(error) from error
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _beside(self, kind: str) -> Path:
        return self.out.parent / f".{self.out.name}.{kind}-{secrets.token_hex(4)}"

    def _remove_stale(self) -> None:
        """Remove what killed runs left a day ago or before."""
        for entry in self.out.parent.glob(f".{self.out.name}.*-*"):
            if entry != self.path and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)

    def _explain(self, error: OSError) -> EdgepruneError:
        if error.errno in _FULL:
            return EnvironmentLackError(
                f"the disk is full: writing engines to '{self.out}' failed ({error.strerror})",
                code="disk-full",
                expected="free space for new engines beside earlier ones",
                hint="free some space, for example in ~/.cache/edgeprune/engines; nothing was left behind",
            )
        return InputError(
            f"cannot write '{self.out}': {error.strerror}",
            code="output-not-writable",
            expected="a bundle in a place where this user may write",
            hint="copy the bundle to such a place",
        )
