"""What a command says: data to stdout, everything for people to stderr, one JSON envelope with --json.

The only module that touches rich. A verb gets a `Ui`, returns its results and never prints itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeprune.errors import EdgepruneError, EdgepruneWarning

WIDE = 200  # columns of a table that goes to a file or a pipe: nothing is cut

Report = Callable[[str, float], None]


@dataclass
class Ui:
    """State and voice of one command.

    Attributes:
        json: print the envelope and nothing else on stdout.
        quiet: no notes and no progress; warnings and errors stay.
        verbose: 1 adds steps, 2 tracebacks.
        progress: show progress of long work.
        command: the verb that runs.
        results: what the verb found, for the envelope; set early when a check may fail afterwards.
        warnings: every EdgepruneWarning of the command, once.
        signal: the one that asked the command to stop, 0 for none.
        written: what is finished on disk, named when the command is interrupted.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    progress: bool = True
    command: str | None = None
    results: Any = None
    warnings: list[str] = field(default_factory=list)
    signal: int = 0
    written: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out, self.err = _console(sys.stdout), _console(sys.stderr)

    def data(self, content: str | Table) -> None:
        """Print the command's data to stdout; nothing with --json."""
        if not self.json:
            self.out.print(content, markup=False, highlight=False, soft_wrap=isinstance(content, str))

    def note(self, content: str | Table = "") -> None:
        """Print something for people to stderr, unless --quiet."""
        if not self.quiet:
            self.err.print(content, markup=False, highlight=False, soft_wrap=isinstance(content, str))

    def warn(self, message: str) -> None:
        """Collect a warning and show it once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self._say("edgeprune: warning: ", "yellow", message)

    def error(self, error: EdgepruneError) -> None:
        """Show an error: what was wrong, what was expected, what to do."""
        self._say(f"edgeprune: error [{error.code}]: ", "bold red", str(error))

    def _say(self, head: str, style: str, message: str) -> None:
        self.err.print(Text(head, style=style) + Text(message), soft_wrap=True)

    @contextmanager
    def steps(self) -> Iterator[Report]:
        """Yield a callback (step, share done in [0, 1]): a bar on a terminal, one line per step elsewhere."""
        if self.quiet or not self.progress:
            yield lambda step, share: None
        elif self.err.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self.err, transient=True) as bar:
                task = bar.add_task("starting", total=1.0)
                yield lambda step, share: bar.update(task, description=step, completed=share)
        else:
            last = ""

            def line(step: str, share: float) -> None:
                nonlocal last
                name = step.partition(",")[0]  # what follows a comma changes all the time, such as a loss
                if name != last and share < 1:
                    last = name
                    self.note(f"  {step} ...")

            yield line

    @contextmanager
    def collect_warnings(self) -> Iterator[None]:
        """Collect EdgepruneWarning; other warnings are shown with -v only."""
        with warnings.catch_warnings():
            warnings.simplefilter("default" if self.verbose else "ignore")
            warnings.simplefilter("always", EdgepruneWarning)
            show = warnings.showwarning

            def collect(
                message: Warning | str,
                category: type[Warning],
                filename: str,
                lineno: int,
                file: TextIO | None = None,
                line: str | None = None,
            ) -> None:
                if issubclass(category, EdgepruneWarning):
                    self.warn(str(message))
                else:
                    show(message, category, filename, lineno, file, line)

            warnings.showwarning = collect
            yield


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column whose name starts with '>' is aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def pairs(rows: Sequence[tuple[str, Any]]) -> Table:
    """Return a table of names and values; rows whose value is None are left out."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            made.add_row(name, Text(str(value)))
    return made


class _PlainConsole(Console):
    """A console that leaves a broken pipe to the caller instead of ending the program."""

    def on_broken_pipe(self) -> None:
        """Raise it again."""
        raise BrokenPipeError


def _console(stream: TextIO) -> Console:
    return _PlainConsole(file=stream, width=None if stream.isatty() else WIDE)
