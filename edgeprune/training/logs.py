"""Logs of a training: a CSV file or TensorBoard events. On resume no step is there twice."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from edgeprune.errors import missing_package

KINDS = ("csv", "tensorboard", "none")
FIELDS = ("scope", "epoch", "step", "images", "loss", "accuracy", "kept", "gmacs", "lr", "seconds", "parts")


class TrainingLog(Protocol):
    """Where rows go. A row has the fields `FIELDS`; `parts` holds the parts of the loss by name."""

    def begin(self, step: int) -> None:
        """Drop what was logged after `step`: the training goes on from there."""
        ...

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class NoLog:
    """Keeps nothing."""

    def begin(self, step: int) -> None:
        """Do nothing."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CsvLog:
    """One line per row; the file appears with the first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keep the rows up to `step`."""
        rows = []
        if step and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if _number(row.get("step")) <= step]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(_lines([FIELDS, *([row[name] for name in FIELDS] for row in rows)]), encoding="utf-8")
        part.replace(self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        parts = " ".join(f"{name}={value:.6g}" for name, value in row["parts"].items())
        values = [parts if name == "parts" else _text(row.get(name)) for name in FIELDS]
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([FIELDS, values] if new else [values]))

    def close(self) -> None:
        """Do nothing; every line is written at once."""


class TensorBoardLog:
    """Scalars by step, `step/...` and `epoch/...`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_package("tensorboard", "tensorboard", "--log tensorboard") from error
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Let TensorBoard drop what comes after `step`."""
        self._writer = self._make(str(self._folder), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row's numbers."""
        numbers = {name: row.get(name) for name in ("loss", "accuracy", "kept", "gmacs", "lr")}
        for name, value in {**numbers, **{f"parts/{part}": v for part, v in row["parts"].items()}}.items():
            if value is not None:
                self._writer.add_scalar(f"{row['scope']}/{name}", value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def open_log(kind: str, out: Path) -> TrainingLog:
    """Return the log of a training that writes `out`: `<stem>.log.csv` or the folder `<stem>.tensorboard`.

    Raises:
        EnvironmentLackError: `package-missing`.
    """
    if kind == "none":
        return NoLog()
    path = log_path(kind, out)
    return TensorBoardLog(path) if kind == "tensorboard" else CsvLog(path)


def log_path(kind: str, out: Path) -> Path:
    """Return where the log lies."""
    return out.with_suffix(".log.csv" if kind == "csv" else ".tensorboard")


def _lines(rows: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(text: str | None) -> float:
    """Return a step, or more than any for a line that was cut off."""
    return float(text) if text and text.isdigit() else float("inf")
