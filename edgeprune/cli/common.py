"""What every verb shares: the options of output, and the way from a function to a click command."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
            ui.quiet, ui.verbose, ui.progress = quiet, verbose, not no_progress
            level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
            logging.getLogger("edgeprune").setLevel(level)
            ui.results = function(ui, **options)

        command = click.command(name, help=help)(invoke)
        command.params.extend(_SHARED)
        return command

    return decorate


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
