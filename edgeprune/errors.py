"""Every error a user can meet, and the exit code it ends the command with.

Nothing here imports anything but the standard library. An error says what was wrong, what was expected and what to
do next; `edgeprune.cli` prints it without a traceback and puts the same fields in the JSON output.

Exit codes: 0 done, 1 a check failed, 2 usage or input, 3 the environment lacks something, 4 a build failed,
70 an internal error.
"""

from __future__ import annotations

from typing import Any


class EdgepruneWarning(UserWarning):
    """Something a user should know that does not stop the command."""


class EdgepruneError(Exception):
    """Base of all errors a user can cause or meet.

    Args:
        message: what was wrong, with the offending value and where it came from.
        code: short kebab-case name, stable across releases, for scripts.
        expected: the rule that was broken, with its limits.
        hint: one thing to do next: a command or an edit.
        details: anything a script may want, JSON-serialisable.
    """

    exit_code = 70

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        expected: str | None = None,
        hint: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.expected = expected
        self.hint = hint
        self.details = details or {}

    def __str__(self) -> str:
        lines = [self.message]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.hint:
            lines.append(f"  fix: {self.hint}")
        return "\n".join(lines)


class CheckFailed(EdgepruneError):
    """The command ran, and a check it was asked to make failed (parity, accuracy floor, latency gate)."""

    exit_code = 1


class InputError(EdgepruneError):
    """An option, configuration value or input file is wrong."""

    exit_code = 2


class EnvironmentLackError(EdgepruneError):
    """The machine lacks something: a package, a device, disk space, a network."""

    exit_code = 3


class BuildError(EdgepruneError):
    """Lowering or building failed on input that was accepted."""

    exit_code = 4


class InternalError(EdgepruneError):
    """A defect of edgeprune itself."""

    exit_code = 70


def missing_package(package: str, extra: str, purpose: str) -> EnvironmentLackError:
    """Return the error for a package that is not installed, naming the extra that brings it."""
    return EnvironmentLackError(
        f"{purpose} needs the package '{package}', which is not installed",
        code="package-missing",
        hint=f"pip install 'edgeprune[{extra}]'",
        details={"package": package, "extra": extra},
    )
