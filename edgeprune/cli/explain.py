"""What a user reads for whatever was raised: one error with its exit code."""

from __future__ import annotations

import errno
import signal
import tempfile
import traceback

import click

from edgeprune.cli.machine import OPTIONAL, REQUIRED
from edgeprune.cli.ui import Ui
from edgeprune.errors import (
    EdgepruneError,
    EnvironmentLackError,
    InputError,
    InternalError,
    missing_package,
)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def explain(raised: BaseException, ui: Ui) -> tuple[EdgepruneError, int]:
    """Return the error to show for an exception, and the exit code."""
    if ui.signal or isinstance(raised, (KeyboardInterrupt, click.Abort)):
        number = ui.signal or signal.SIGINT
        return _interruption("interrupted" if number == signal.SIGINT else "terminated", ui), 128 + number
    if isinstance(raised, EdgepruneError):
        return raised, raised.exit_code
    if isinstance(raised, click.UsageError):
        verb = f" {ui.command}" if ui.command else ""
        hint = f"run 'edgeprune{verb} --help'"
        return InputError(raised.format_message(), code="usage", hint=hint), 2
    if isinstance(raised, click.ClickException):
        return InputError(raised.format_message(), code="usage"), 2
    lack = _find_lack(raised, ui)
    if lack is not None:
        return lack, lack.exit_code
    where = "above" if ui.verbose > 1 else _write_log(raised)
    internal = InternalError(
        f"{type(raised).__name__}: {raised}",
        code="internal",
        hint=f"this is a defect of edgeprune: please report it with the traceback ({where})",
    )
    return internal, internal.exit_code


def _find_lack(raised: BaseException, ui: Ui) -> EnvironmentLackError | None:
    """Return the error for a full disk, full memory or an optional package that is not installed."""
    if isinstance(raised, ModuleNotFoundError):
        for package, module, _, extra, _ in (*REQUIRED, *OPTIONAL):
            if extra and (raised.name or "").partition(".")[0] == module:
                return missing_package(package, extra, f"edgeprune {ui.command}")
    if isinstance(raised, OSError) and raised.errno in NO_SPACE:
        where = f" while writing '{raised.filename}'" if raised.filename else ""
        return EnvironmentLackError(
            f"the disk is full{where}", code="disk-full", hint="free some space, then run again"
        )
    if isinstance(raised, MemoryError) or "can't allocate memory" in str(raised):
        return EnvironmentLackError(
            "out of memory", code="out-of-memory", hint="use a smaller model or batch, or a machine with more memory"
        )
    return None


def _interruption(what: str, ui: Ui) -> EdgepruneError:
    done = ", ".join(map(str, ui.written))
    return EdgepruneError(f"{what}, " + (f"already written: {done}" if done else "nothing was written"), code=what)


def _write_log(raised: BaseException) -> str:
    """Write the traceback to a file in the temporary directory and return where, or how to get it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="edgeprune-", suffix=".log", delete=False) as log:
            log.write("".join(traceback.format_exception(raised)))
        return log.name
    except OSError:
        return "run again with -vv"
