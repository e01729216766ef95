"""The command line: finds the verb, runs it, turns whatever happens into one message and an exit code.

Exit codes: 0 done, 1 a check failed, 2 usage or input, 3 the environment lacks something, 4 a build failed, 70 an
internal error, 130 and 143 interrupted.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import click

from edgeprune.cli.envelope import make_envelope
from edgeprune.cli.explain import explain
from edgeprune.cli.signals import raise_on_signals
from edgeprune.cli.ui import Ui
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.version import __version__

# Each verb is `command` in the module of its name; the text stands here so that --help imports none of them.
VERBS = {
    "export": "Compile a checkpoint into a bundle.",
    "adopt": "Take a graph that another tool quantized into a bundle.",
    "build": "Build a bundle's TensorRT engines on this device.",
    "run": "Classify images with a bundle.",
    "verify": "Compare a bundle with PyTorch on fresh inputs.",
    "bench": "Measure pruned against dense, interleaved.",
    "report": "Write results as one HTML file.",
    "compare": "Fail when a bundle got slower or worse, beyond noise.",
    "inspect": "Show what a bundle holds.",
    "evaluate": "Accuracy of a bundle on labelled images.",
    "search": "Find keep rates and stages by measured latency.",
    "finetune": "Train a method's weights.",
    "convert": "Rewrite a checkpoint, checked and described.",
    "demo": "The whole way on the shipped model.",
    "models": "List the models.",
    "methods": "List the pruning methods and their options.",
    "targets": "List the targets and why one is unavailable.",
    "serve-repo": "Write a model repository for Triton.",
    "plugins": "Build, find and check the TensorRT plugin.",
    "doctor": "Check this machine.",
}
BROKEN_PIPE = 141


class VerbGroup(click.Group):
    """Loads a verb when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a verb."""
        if cmd_name not in VERBS:
            return None
        ctx.obj.command = cmd_name
        return import_module(f"edgeprune.cli.{cmd_name.replace('-', '_')}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the verb; an unknown one is an error that names the nearest."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean 'edgeprune {close[0]}'?" if close else "run 'edgeprune --help'"
            raise InputError(f"unknown command '{args[0]}'", code="usage", expected=", ".join(VERBS), hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(
    cls=VerbGroup,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="edgeprune")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Compile token-pruned Vision Transformers for edge devices, and prove what it gained.

    Every command takes --json, -q, -v and --no-progress. Exit codes: 0 done, 1 a check failed, 2 usage or input,
    3 the environment lacks something, 4 a build failed, 70 an internal error.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    ui = Ui(json="--json" in arguments)
    error: EdgepruneError | None = None
    try:
        with raise_on_signals(ui), _log_handler(ui), ui.collect_warnings():
            _invoke(arguments, ui)
        code = 0
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except BaseException as raised:
        if isinstance(raised, BrokenPipeError):
            return _leave_broken_pipe()
        error, code = explain(raised, ui)
        if ui.verbose > 1:
            ui.note("".join(traceback.format_exception(raised)))
        ui.error(error)
    try:
        if ui.json:
            sys.stdout.write(make_envelope(ui, code, error))
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_broken_pipe()
    return code


def _invoke(arguments: Sequence[str], ui: Ui) -> None:
    with cli.make_context("edgeprune", list(arguments), obj=ui) as context:
        cli.invoke(context)


@contextmanager
def _log_handler(ui: Ui) -> Iterator[None]:
    """Show the package's log on stderr; the level follows -v."""
    logger, handler = logging.getLogger("edgeprune"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _leave_broken_pipe() -> int:
    """Silence the interpreter's last flush: whoever read stdout has gone."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a descriptor, not a path
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return BROKEN_PIPE
