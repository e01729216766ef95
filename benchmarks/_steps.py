"""Steps under one time budget: what each needs, how it ended and why, what there was no time for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

RAN, SKIPPED, FAILED, NOT_RUN = "ran", "skipped", "failed", "not run"
HOW = {SKIPPED: "was skipped", FAILED: "failed", NOT_RUN: "was not run"}
LACKS = 3  # exit code of a command whose environment lacks something
GRACE_S = 5.0

Figures = dict[str, Any]


class NotDone(Exception):
    """A command ended well and did not do what the step is for."""


@dataclass(frozen=True)
class Done:
    """A command that has ended; `code` is None when it ran into its limit."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout, empty when there is none."""
        with suppress(ValueError):
            found = json.loads(self.stdout)
            if isinstance(found, dict):
                return found
        return {}

    @property
    def complaint(self) -> str:
        """What went wrong: the message of the document, else the last line of stderr or stdout."""
        error = self.document.get("error") or {}
        lines = [line for line in (self.stderr.strip() or self.stdout.strip()).splitlines() if line.strip()]
        said = str(error["message"]) if "message" in error else lines[-1] if lines else "it said nothing"
        hint = f"; fix: {error['hint']}" if error.get("hint") else ""
        return f"{said}{hint}"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        what: it answers, for people.
        needs: conditions of the machine.
        after: steps that must have run.
        least_s: it is not begun with less time left.
        limit_s: it is stopped then.
        read: figures of its result; may raise `NotDone`.
    """

    name: str
    what: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    least_s: float = 5.0
    limit_s: float = 60.0
    read: Callable[[Done], Figures] = lambda done: {}


@dataclass(frozen=True)
class Outcome:
    """How a step ended; `reason` says why it did not run to its end."""

    name: str
    what: str
    status: str
    reason: str | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    figures: Figures = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


def run_steps(
    steps: Iterable[Step],
    *,
    lacking: Mapping[str, str],
    budget_s: float,
    execute: Callable[[tuple[str, ...], float], Done],
    clock: Callable[[], float],
    report: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run steps in their order, which is that of their value, and return how each ended.

    Args:
        steps: what to run.
        lacking: condition -> why the machine does not fulfil it; one that is not named is fulfilled.
        budget_s: seconds for all of them.
        execute: runs a command within seconds.
        clock: seconds.
        report: told the outcomes after every step.
    """
    start = clock()
    outcomes: list[Outcome] = []
    for step in steps:
        begun = clock()
        left = budget_s - (begun - start)
        ended = {outcome.name: outcome for outcome in outcomes}
        kept_back = _why_not(step, lacking, ended, left)
        if kept_back is not None:
            outcomes.append(kept_back)
        else:
            done = execute(step.command, min(step.limit_s, left))
            outcomes.append(_judge(step, done, clock() - begun))
        report(outcomes)
    return outcomes


def _why_not(step: Step, lacking: Mapping[str, str], ended: Mapping[str, Outcome], left: float) -> Outcome | None:
    """Return the outcome of a step that cannot begin."""
    absent = [lacking[need] for need in step.needs if need in lacking]
    if absent:
        return Outcome(step.name, step.what, SKIPPED, absent[0])
    for name in step.after:
        earlier = ended.get(name)
        if earlier is None:
            return Outcome(step.name, step.what, SKIPPED, f"needs '{name}', which is not part of this run")
        if earlier.status != RAN:
            status = NOT_RUN if earlier.status == NOT_RUN else SKIPPED
            root = str(earlier.reason)
            reason = root if root.startswith("needs '") else f"needs '{name}', which {HOW[earlier.status]}: {root}"
            return Outcome(step.name, step.what, status, reason)
    if left < step.least_s:
        return Outcome(step.name, step.what, NOT_RUN, f"needs {step.least_s:.0f} s, {max(left, 0):.0f} s are left")
    return None


def _judge(step: Step, done: Done, seconds: float) -> Outcome:
    if done.code is None:
        return Outcome(step.name, step.what, FAILED, f"stopped after {seconds:.0f} s", seconds)
    figures: Figures = {}
    unread = None
    try:
        figures = step.read(done)
    except NotDone as error:
        return Outcome(step.name, step.what, SKIPPED, str(error), seconds, done.code)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        unread = f"its result cannot be read: {error!r}"
    if done.code == 0:
        status = RAN if unread is None else FAILED
        return Outcome(step.name, step.what, status, unread, seconds, 0, figures)
    status = SKIPPED if done.code == LACKS else FAILED
    return Outcome(step.name, step.what, status, done.complaint, seconds, done.code, figures)


def execute(command: tuple[str, ...], limit_s: float, *, env: Mapping[str, str], cwd: str) -> Done:
    """Run a command in a process group of its own, which ends with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process, signal.SIGTERM)
        try:
            stdout, stderr = process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGKILL)
            stdout, stderr = process.communicate()
        return Done(None, stdout, stderr)
    except BaseException:
        _end(process, signal.SIGKILL)
        raise
    return Done(process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
