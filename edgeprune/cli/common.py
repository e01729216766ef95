"""What every verb shares: the options of output, and the way from a function to a click command."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click

from edgeprune.cli.ui import Ui
from edgeprune.errors import InputError

BUNDLE = click.Path(path_type=Path)
GRAPHS = click.Choice(["model", "dense", "random"])

_SHARED = (
    click.Option(["--json"], is_flag=True, help="One JSON document on stdout, nothing else."),
    click.Option(["-q", "--quiet"], is_flag=True, help="Only warnings, errors and the command's data."),
    click.Option(["-v", "--verbose"], count=True, help="More detail; -vv adds tracebacks."),
    click.Option(["--no-progress"], is_flag=True, help="No progress bar."),
)


def verb(name: str, help: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a verb: it gets the Ui and its own options, and returns the results for --json.

    Args:
        name: the verb.
        help: text of --help.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.pass_obj
        @wraps(function)
        def invoke(ui: Ui, json: bool, quiet: bool, verbose: int, no_progress: bool, **options: Any) -> None:
            _speak(ui, quiet, verbose, no_progress)
            ui.results = function(ui, **options)

        command = click.command(name, help=help)(invoke)
        command.params.extend(_SHARED)
        return command

    return decorate


class VerbWithParts(click.Group):
    """A verb that is several commands, `edgeprune plugins build`; the shared options may stand in front of each."""

    def __init__(self, name: str, help: str, parts: Sequence[click.Command]) -> None:
        def invoke(ctx: click.Context, json: bool, quiet: bool, verbose: int, no_progress: bool) -> None:
            _speak(ctx.obj, quiet, verbose, no_progress)
            if ctx.invoked_subcommand is None:
                ctx.obj.data(ctx.get_help())

        super().__init__(name, help=help, callback=click.pass_context(invoke), invoke_without_command=True)
        self.params.extend(_SHARED)
        for part in parts:
            self.add_command(part)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the parts in the order of use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the part; an unknown one is an error that names those there are."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1) or list(self.commands)[:1]
            raise InputError(
                f"unknown command '{self.name} {args[0]}'",
                code="usage",
                expected=", ".join(self.commands),
                hint=f"edgeprune {self.name} {close[0]}",
            )
        ctx.obj.command = f"{self.name} {args[0]}"
        return super().resolve_command(ctx, args)


def _speak(ui: Ui, quiet: bool, verbose: int, no_progress: bool) -> None:
    """Set how much is said; what stood in front of a part counts as well."""
    ui.quiet, ui.verbose, ui.progress = ui.quiet or quiet, max(ui.verbose, verbose), ui.progress and not no_progress
    level = {0: logging.WARNING, 1: logging.INFO}.get(ui.verbose, logging.DEBUG)
    logging.getLogger("edgeprune").setLevel(level)


def write_text(ui: Ui, path: Path, text: str) -> None:
    """Write a result file, whole or not at all.

    Raises:
        InputError: `output-not-writable`.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError, FileExistsError) as error:
        raise InputError(
            f"cannot write '{path}': {error.strerror}",
            code="output-not-writable",
            expected="a file in a directory that can be written to",
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()
    ui.written.append(path)
