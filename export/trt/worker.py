"""The building process, `python -m edgeprune.export.trt.worker`: a Job on stdin, messages on stdout.

Nothing of the exporter is in memory here, and when the system kills for want of memory it kills this process. Whatever
libraries print goes into the log. The process leaves when its parent does.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from edgeprune.errors import EdgepruneError, InternalError
from edgeprune.export.trt.job import Failure, Job, Progress, Result

KILL_ME_FIRST = "800"  # of 1000, to the kernel's out-of-memory killer


class Speaker:
    """Writes messages, whole lines, from any thread; the share never falls."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._share = stream, threading.Lock(), 0.0

    def progress(self, step: str, share: float) -> None:
        """Say how far the build is."""
        with self._lock:
            self._share = max(self._share, min(share, 1.0))
            self._write(Progress(step=step, share=self._share))

    def last(self, message: Result | Failure) -> None:
        """Say how it ended."""
        with self._lock:
            self._write(message)

    def _write(self, message: Progress | Result | Failure) -> None:
        self._stream.write(message.model_dump_json() + "\n")
        self._stream.flush()


def main() -> int:
    """Build one engine and return the exit code."""
    speaker = Speaker(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    job = Job.model_validate_json(sys.stdin.readline())
    log = Path(job.log).open("a", encoding="utf-8", errors="replace")  # noqa: SIM115 - open to the end of the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(KILL_ME_FIRST, encoding="ascii")
    try:
        from edgeprune.export.trt.builder import build

        built = build(job, log, speaker.progress)
    except EdgepruneError as error:
        speaker.last(Failure.of(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc(file=log)
        log.flush()
        defect = InternalError(
            f"building {Path(job.graph).name} failed: {type(error).__name__}: {error}",
            code="internal",
            hint="this is a defect of edgeprune: please report it with the log",
        )
        speaker.last(Failure.of(defect))
        return defect.exit_code
    speaker.last(Result(built=built))
    return 0


def _leave_with_parent() -> None:
    """Wait until stdin ends, as it does when the parent is gone, and leave at once, whatever else is under way."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
