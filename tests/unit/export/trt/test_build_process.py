"""The building process: what it says, and how its deaths are explained. Another builder is put into its place."""

from __future__ import annotations

import os
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.errors import BuildError, EdgepruneError, EnvironmentLackError, InternalError
from edgeprune.export.trt import process
from edgeprune.export.trt.job import Envelope, Failure, Job, JobProfile, Progress
from edgeprune.export.trt.process import COMMAND, run_job

BUILT = """
from edgeprune.export.trt.job import Built
from edgeprune.runtime.engines import ProofInfo
proof = ProofInfo(layers=1, precisions={}, attention_blocks=0, fused_attention=0)
built = Built(sha256="0" * 64, bytes=1, scratch_bytes=2, build_s=3.0, proof=proof, warnings=["beware"])
"""
Builder = Callable[[str], None]


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Return a function that gives the process another body of `build(job, log, report)`."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def install(body: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        function = "def build(job, log, report):\n" + textwrap.indent(textwrap.dedent(body), "    ")
        code = f"import os, sys, time, types\nmade = types.ModuleType('builder')\nexec({function!r}, made.__dict__)\n"
        code += "sys.modules['edgeprune.export.trt.builder'] = made\n"
        (folder / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return install


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "work"
    folder.mkdir()
    paths = {name: str(folder / name) for name in ("graph", "engine", "layers", "log")}
    return Job(**paths, profiles=[JobProfile(shapes={"images": [1, 3, 8, 8]})], precision="fp16", workspace=1)


def silent(step: str, share: float) -> None:
    """Report nothing."""


def fails(job: Job, kind: type[EdgepruneError], code: str) -> EdgepruneError:
    with pytest.raises(kind) as caught:
        run_job(job, "model", silent)
    error = caught.value
    assert type(error) is kind
    assert error.code == code
    assert error.hint
    assert str(error).startswith(error.message)
    return error


def test_result_comes_back(builder: Builder, job: Job) -> None:
    builder(BUILT + "return built")
    built = run_job(job, "model", silent)
    assert (built.scratch_bytes, built.build_s, built.warnings) == (2, 3.0, ["beware"])


def test_job_arrives_whole(builder: Builder, job: Job) -> None:
    builder(BUILT + "return built.model_copy(update={'warnings': [job.model_dump_json()]})")
    assert Job.model_validate_json(run_job(job, "model", silent).warnings[0]) == job


def test_nothing_of_the_exporter_is_in_the_process(builder: Builder, job: Job) -> None:
    heavy = "[name for name in ('torch', 'onnx', 'onnxruntime', 'tensorrt') if name in sys.modules]"
    builder(f"import sys\n{BUILT}return built.model_copy(update={{'warnings': {heavy}}})")
    assert run_job(job, "model", silent).warnings == []


def test_progress_is_passed_on_and_never_falls(builder: Builder, job: Job) -> None:
    builder(f"report('phase one', 0.5)\nreport('phase two', 0.2)\n{BUILT}return built")
    told: list[tuple[str, float]] = []
    run_job(job, "1 of 2: model", lambda step, share: told.append((step, share)))
    assert told[0] == ("building 1 of 2: model, 0 s", 0.0)
    assert ("building 1 of 2: model, phase one, 0 s", 0.5) in told
    assert told[-1] == ("building 1 of 2: model, phase two, 0 s", 0.5)


def test_heart_beats_when_nothing_is_said(builder: Builder, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HEARTBEAT_S", 0.05)
    builder(f"time.sleep(0.5)\n{BUILT}return built".replace("time.sleep", "__import__('time').sleep"))
    told: list[str] = []
    run_job(job, "model", lambda step, share: told.append(step))
    assert len(told) > 4
    assert set(told) <= {"building model, 0 s", "building model, 1 s", "building model, 2 s"}


def test_minutes_are_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import queue

    clock = iter([0.0, 59.0, 61.0, 125.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(process, "HEARTBEAT_S", 0.001)
    told: list[str] = []

    def report(step: str, share: float) -> None:
        told.append(step)
        if len(told) == 3:
            lines.put(None)

    lines: queue.Queue[str | None] = queue.Queue()
    assert process._listen(lines, "model", report) is None
    assert told == ["building model, 59 s", "building model for 1 min, 1 s", "building model for 2 min, 5 s"]


def test_output_of_libraries_goes_to_the_log(builder: Builder, job: Job) -> None:
    builder(
        f"import os\nprint('noise', flush=True)\nos.write(1, b'more\\n')\nos.write(2, b'worse\\n')\n{BUILT}return built"
    )
    run_job(job, "model", silent)
    assert Path(job.log).read_text().split() == ["noise", "more", "worse"]


def test_error_arrives_as_itself_with_the_log(builder: Builder, job: Job, tmp_path: Path) -> None:
    builder(
        """
        from edgeprune.errors import BuildError
        log.write("\\n".join(f"line {i}" for i in range(30)) + "\\n")
        log.flush()
        raise BuildError("no kernel", code="engine-build", expected="one", hint="another", details={"graph": "model"})
        """
    )
    error = fails(job, BuildError, "engine-build")
    assert (error.expected, error.hint, error.details["graph"]) == ("one", "another", "model")
    first, *lines = error.message.splitlines()
    assert first.startswith("no kernel; the last lines of the log (")
    assert [line.strip() for line in lines] == [f"line {i}" for i in range(15, 30)]
    (kept,) = tmp_path.glob("edgeprune-build-*.log")
    assert str(kept) in first
    assert len(kept.read_text().splitlines()) == 30


def test_defect_leaves_its_traceback_in_the_log(builder: Builder, job: Job) -> None:
    builder("raise KeyError('what')")
    error = fails(job, InternalError, "internal")
    assert "KeyError: 'what'" in error.message
    assert "Traceback" in "\n".join(error.details["log"])


def test_killed_process_is_explained_as_want_of_memory(builder: Builder, job: Job) -> None:
    builder("import os\nos.kill(os.getpid(), 9)")
    error = fails(job, EnvironmentLackError, "out-of-memory")
    assert error.message == "the process building model was killed, as the system does when memory runs out"
    assert all(word in str(error.hint) for word in ("swap", "desktop", "--workspace", "--batches"))
    assert error.details["returncode"] == -9


def test_crash_is_told_with_where_it_was(builder: Builder, job: Job) -> None:
    builder("import ctypes\nlog.write('before\\n')\nlog.flush()\nctypes.string_at(0)")
    error = fails(job, BuildError, "worker-crashed")
    assert "crashed (SIGSEGV)" in error.message
    assert error.details["log"][0] == "before"
    assert "Fatal Python error: Segmentation fault" in error.details["log"]


def test_process_without_a_result_is_told(builder: Builder, job: Job) -> None:
    builder("import os\nos._exit(7)")
    assert "ended with 7 and no result" in fails(job, BuildError, "worker-failed").message


def test_process_that_cannot_start_says_why(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "pydantic.py").write_text("raise ImportError('no pydantic here')")
    monkeypatch.setattr(process, "_environment", lambda: {**os.environ, "PYTHONPATH": f"{tmp_path}:{process.ROOT}"})
    assert "no pydantic here" in fails(job, BuildError, "worker-failed").message


def test_result_counts_even_when_the_process_dies_afterwards(builder: Builder, job: Job) -> None:
    builder(f"import atexit, os\natexit.register(os.abort)\n{BUILT}return built")
    assert run_job(job, "model", silent).bytes == 1


def test_interruption_ends_the_process(builder: Builder, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    builder("import os, time\nlog.write(f'{os.getpid()}\\n')\nlog.flush()\nreport('started', 0)\ntime.sleep(600)")

    def interrupt(step: str, share: float) -> None:
        if "started" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, "model", interrupt)
    assert not alive(int(Path(job.log).read_text()))


def test_process_leaves_when_its_parent_is_gone(builder: Builder, job: Job) -> None:
    builder("import time\nreport('started', 0)\ntime.sleep(600)")
    child = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=process._environment(),
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(job.model_dump_json() + "\n")
    child.stdin.flush()
    assert isinstance(Envelope.read(child.stdout.readline()), Progress)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=20) == 1
    child.stdout.close()


def test_installed_package_changes_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert process._environment()["PYTHONPATH"] == f"{process.ROOT}:/elsewhere"
    monkeypatch.setattr(process, "ROOT", tmp_path)
    assert process._environment()["PYTHONPATH"] == "/elsewhere"


def test_failure_message_keeps_every_field() -> None:
    error = EnvironmentLackError("m", code="c", expected="e", hint="h", details={"a": [1]})
    message = Envelope.read(Failure.of(error).model_dump_json())
    assert isinstance(message, Failure)
    again = message.error()
    assert type(again) is EnvironmentLackError
    assert (again.message, again.code, again.expected, again.hint, again.details) == ("m", "c", "e", "h", {"a": [1]})


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
