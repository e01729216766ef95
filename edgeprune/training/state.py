"""What a training needs to go on after it was killed: one file beside the output, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import InputError
from edgeprune.files import explain

FORMAT = 1
EVERY_SECONDS = 120.0


@dataclass(frozen=True)
class StateFile:
    """Where the state of a training lies and which request it belongs to.

    Attributes:
        folder: `<out>.resume`.
        request: everything the result depends on, by name.
        every_steps: save after so many steps; 0 for none.
        every_seconds: save when so much time has passed; 0 for none. Every epoch's end is saved in any case.
        always: entries that go into every state.
        writes: this process is the one that writes.
    """

    folder: Path
    request: dict[str, Any] = field(default_factory=dict)
    every_steps: int = 0
    every_seconds: float = EVERY_SECONDS
    always: dict[str, Any] = field(default_factory=dict)
    writes: bool = True

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "state.pt"

    def exists(self) -> bool:
        """Return whether there is a state."""
        return self.path.exists()

    def refuse_existing(self) -> None:
        """Raise InputError `state-exists` when another training was interrupted here."""
        if self.exists():
            raise InputError(
                f"'{self.folder}' holds the state of a training that did not end",
                code="state-exists",
                expected="no state, or to be told what to do with it",
                hint="add --resume to go on with it, or --overwrite to begin anew",
            )

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None when there is none.

        Raises:
            InputError: `state-unreadable`; `state-mismatch` when it belongs to another request.
        """
        if not self.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            stored, version = state["request"], state["format"]
        except Exception as error:  # torch raises many kinds on damaged files
            raise self._unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        if version != FORMAT:
            raise self._unreadable(f"its format is {version}, this version reads {FORMAT}")
        names = [name for name in {**stored, **self.request} if stored.get(name) != self.request.get(name)]
        if names:
            found = "; ".join(f"{n}: {stored.get(n)} there, {self.request.get(n)} here" for n in names[:3])
            raise InputError(
                f"the state in '{self.folder}' belongs to another request ({found})",
                code="state-mismatch",
                expected="the options the training was started with",
                hint="repeat the first command with --resume, or add --overwrite without --resume to begin anew",
                details={"different": names},
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; the one before stays until this one is complete on the disk.

        Raises:
            InputError: `output-not-writable`.
            EnvironmentLackError: `disk-full`.
        """
        if not self.writes:
            return
        part = self.folder / ".state.pt.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save({"format": FORMAT, "request": self.request, **self.always, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise explain(self.folder, error) from error
        finally:
            part.unlink(missing_ok=True)
            if self.folder.is_dir() and not self.exists():
                self.folder.rmdir()

    def remove(self) -> None:
        """Delete the state."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _unreadable(self, why: str) -> InputError:
        return InputError(
            f"cannot read the state in '{self.folder}': {why}",
            code="state-unreadable",
            expected="a state this version of edgeprune wrote",
            hint="begin anew with --overwrite, without --resume",
        )


def folder_of(out: Path) -> Path:
    """Return where the state of a training with this output lies."""
    return out.with_name(out.name + ".resume")
