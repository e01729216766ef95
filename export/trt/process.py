"""Runs the building process: passes its progress on, shows that it lives, and explains how it died."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

import edgeprune
from edgeprune.errors import BuildError, EdgepruneError, EnvironmentLackError
from edgeprune.export.trt.job import Built, Envelope, Failure, Job, Progress, Result

ROOT = Path(edgeprune.__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "edgeprune.export.trt.worker")
TAIL = 15  # lines of the log in an error
KEPT_LINES = 200
HEARTBEAT_S = 1.0
Report = Callable[[str, float], None]


def run_job(job: Job, what: str, report: Report) -> Built:
    """Build one engine in a process of its own and return what it says of it.

    Args:
        job: what to build.
        what: the engine in words, for progress and errors.
        report: called with (step, share of this engine) at least once a second.

    Raises:
        EnvironmentLackError: `out-of-memory` when the system killed the process; those of `builder.build`.
        BuildError: `worker-crashed`, `worker-failed`; those of `builder.build`.
    """
    Path(job.log).touch()
    with subprocess.Popen(
        COMMAND,
        cwd=Path(job.log).parent,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to this process alone, which then ends that one
    ) as process:
        try:
            return _follow(process, job, what, report)
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    """Return this environment; of a checkout also where it lies, since the process starts elsewhere."""
    if not (ROOT / "pyproject.toml").is_file():
        return dict(os.environ)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _follow(process: subprocess.Popen[str], job: Job, what: str, report: Report) -> Built:
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    readers = (
        threading.Thread(target=_read, args=(process.stdout, lines.put, lambda: lines.put(None)), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, said.append, lambda: None), daemon=True),
    )
    for reader in readers:
        reader.start()
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once, which is explained below
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
    message = _listen(lines, what, report)
    if isinstance(message, Result):
        return message.built
    if isinstance(message, Failure):
        raise _with_log(message.error(), job)
    process.wait()
    readers[1].join()
    raise _explain_death(process.returncode, job, what, said)


def _read(stream: object, put: Callable[[str], object], end: Callable[[], object]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        put(line)
    end()


def _listen(lines: queue.Queue[str | None], what: str, report: Report) -> Result | Failure | None:
    """Return the last message, None when the process ended without one; report meanwhile."""
    started, step, share = time.monotonic(), "", 0.0
    while True:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        name = f"building {what}{f' for {minutes} min' if minutes else ''}"
        report(f"{name}, {f'{step}, ' if step else ''}{seconds} s", share)
        try:
            line = lines.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            continue
        if line is None:
            return None
        with suppress(ValidationError):  # a line of somebody else
            message = Envelope.read(line)
            if not isinstance(message, Progress):
                return message
            step, share = message.step, message.share


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process and everything it has started."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()  # it leaves by itself
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)


def _explain_death(code: int, job: Job, what: str, said: list[str]) -> EdgepruneError:
    """Return the error for a process that ended without a word."""
    if said:
        with Path(job.log).open("a", encoding="utf-8") as log:
            log.writelines(said)
    error: EdgepruneError
    if code == -signal.SIGKILL:
        error = EnvironmentLackError(
            f"the process building {what} was killed, as the system does when memory runs out",
            code="out-of-memory",
            expected="enough memory for TensorRT's builder; on a Jetson it shares it with the GPU",
            hint="add swap, close the desktop (sudo systemctl isolate multi-user.target), give a smaller --workspace "
            "such as 256MiB, or build one batch at a time with --batches",
        )
    elif code < 0:
        error = BuildError(
            f"the process building {what} crashed ({_signal_words(-code)})",
            code="worker-crashed",
            expected="TensorRT, CUDA's driver and the plugin library to fit together",
            hint="run `edgeprune doctor` and `edgeprune plugins check`; try --selection native",
        )
    else:
        error = BuildError(
            f"the process building {what} ended with {code} and no result",
            code="worker-failed",
            expected="a Python that can import edgeprune",
            hint="see the log below",
        )
    error.details = {"returncode": code}
    return _with_log(error, job)


def _signal_words(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _with_log(error: EdgepruneError, job: Job) -> EdgepruneError:
    """Return the error with the last lines of the log, and the log where it outlives the build."""
    lines = Path(job.log).read_text(encoding="utf-8", errors="replace").splitlines()
    error.details = {**error.details, "log": lines[-KEPT_LINES:]}
    if lines:
        tail = "\n".join(f"    {line}" for line in lines[-TAIL:])
        kept = _keep_log(Path(job.log))
        error.message += f"; the last lines of the log{f' ({kept})' if kept else ''}:\n{tail}"
        error.args = (error.message,)
    return error


def _keep_log(log: Path) -> Path | None:
    """Copy the log to the temporary directory and return where, None when that fails."""
    try:
        handle, name = tempfile.mkstemp(prefix="edgeprune-build-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log, name)
    except OSError:
        return None
    return Path(name)
