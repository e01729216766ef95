"""`edgeprune build`: what it shows, and every way it refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BuildError, EnvironmentLackError
from edgeprune.export.trt.job import Built, Job
from edgeprune.runtime.bundle import hash_file
from edgeprune.runtime.engines import EngineIndex, EngineInfo, ProofInfo
from tests.cli.conftest import Cli
from tests.helpers import fake_trt
from tests.helpers.tensorrt import empty_machine
from tests.helpers.trt_bundles import write_for_tensorrt


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_machine(tmp_path / "home", monkeypatch)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> fake_trt.FakeTensorRT:
    """Install a TensorRT, an engine builder that writes the name of the graph, and times by the size of the batch."""
    made = fake_trt.install(monkeypatch, "11.4.0")
    monkeypatch.setattr("edgeprune.export.trt.api.run_job", build_nothing)
    monkeypatch.setattr("edgeprune.export.trt.api.time_profiles", by_batch)
    return made


def build_nothing(job: Job, what: str, report: Any) -> Built:
    report(f"building {what}, 0 s", 0.0)
    engine = Path(job.engine)
    engine.write_text(engine.stem)
    Path(job.layers).write_text("{}")
    Path(job.log).touch()
    proof = ProofInfo(
        layers=9, precisions={"float16": 9}, attention_blocks=12, fused_attention=11, findings=["1 of 12 is not fused"]
    )
    sha256 = hash_file(engine).sha256
    return Built(sha256=sha256, bytes=3 << 20, scratch_bytes=1, build_s=61.25, proof=proof, warnings=["beware"])


def by_batch(bundle: Any, folder: Path, index: EngineIndex, before: EngineInfo | None) -> dict[tuple[str, int], float]:
    return {
        (info.file, n): 1.5 * profile.batch + (0 if info.plugin else 1)
        for info in index.engines
        for n, profile in enumerate(info.profiles)
    }


def test_table_shows_every_profile(cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 2))
    result = cli("build", bundle.path)
    assert result.code == 0, result.err
    head, *rows = (line.split() for line in result.out.splitlines())
    assert head == ["graph", "batch", "source", "engine", "build", "median", "attention", "fused"]
    assert rows == [
        ["model", "1", "model", "3.0", "MiB", "61.2", "s", "2.5", "ms", "11/12"],
        ["model", "2", "4", "ms"],
        ["dense", "1", "dense", "3.0", "MiB", "61.2", "s", "2.5", "ms", "11/12"],
        ["dense", "2", "4", "ms"],
    ]
    assert "warning: model: beware" in result.err
    assert "warning: model.engine: 1 of 12 is not fused" in result.err
    assert f"next: edgeprune verify {bundle.path}" in result.err
    assert "for NVIDIA Pretend GPU and TensorRT 11.4.0" in result.err


def test_second_run_is_from_the_cache(cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    cli("build", bundle.path)
    assert "from cache" in cli("build", bundle.path).out
    assert "from cache" not in cli("build", bundle.path, "--rebuild").out
    assert "from cache" not in cli("build", bundle.path, "--no-cache").out


def test_choice_is_told(cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    result = cli("build", bundle.path)
    assert "selection of model: plugin (native 2.5 ms, plugin 1.5 ms)" in result.err


def test_json_holds_the_index(cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    document = cli("build", bundle.path, "--json").json
    assert (document["command"], document["status"]) == ("build", "ok")
    folder = Path(document["results"]["folder"])
    assert folder == bundle.path / "engines" / "nvidia-pretend-gpu-trt11.4.0"
    stored = EngineIndex.model_validate_json((folder / "index.json").read_bytes())
    assert EngineIndex.model_validate(document["results"]["index"]) == stored
    assert "model: beware" in document["warnings"]


def test_options_arrive(cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def note(job: Job, what: str, report: Any) -> Built:
        jobs.append(job)
        return build_nothing(job, what, report)

    monkeypatch.setattr("edgeprune.export.trt.api.run_job", note)
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 4))
    options = ("--batches", "4,1", "--workspace", "256MiB", "--timing-cache", tmp_path / "t", "--optimization-level", 2)
    result = cli("build", bundle.path, *options, "--tactic-sources", "builtin", "--graphs", "dense")
    assert result.code == 0, result.err
    (job,) = jobs
    assert Path(job.graph).name == "dense.onnx"
    assert [profile.shapes["images"][0] for profile in job.profiles] == [1, 4]
    assert (job.workspace, job.optimization_level, job.tactics) == (256 << 20, 2, "builtin")
    assert job.timing_cache == str(tmp_path / "t")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30),
        ("512MiB", 512 << 20),
        ("64KiB", 64 << 10),
        ("1.5GB", 1_500_000_000),
        ("2 mb", 2_000_000),
        ("8KB", 8000),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    from edgeprune.cli.parse import ByteSize

    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workspace", "1024"), "is not a size"),
        (("--workspace", "0GiB"), "is not a size"),
        (("--batches", "1,x"), "is not a list of batches"),
        (("--batches", "0"), "is not a list of batches"),
        (("--optimization-level", "6"), "--optimization-level"),
        (("--engines", "both"), "--engines"),
        (("--selection", "fast"), "--selection"),
        (("--tactic-sources", "all"), "--tactic-sources"),
    ],
)
def test_wrong_options_are_usage_errors(cli: Cli, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    result = cli("build", tmp_path, *options)
    assert result.code == 2
    assert words in result.err


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--batches", "8"), "batches"),
        (("--selection", "plugin"), "selection"),
        (("--engines", "profiles"), "engines"),
        (("--graphs", "stem"), "graph-missing"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_options_the_bundle_cannot_serve(
    cli: Cli, tmp_path: Path, options: tuple[str, ...], code: str, dry: tuple[str, ...]
) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    document = cli("build", bundle.path, *options, *dry, "--json").json
    assert (document["exit_code"], document["error"]["code"]) == (2, code)


def test_dry_run_needs_no_gpu_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 2), plugin=True)
    before = sorted(bundle.path.rglob("*"))
    result = cli("build", bundle.path, "--dry-run")
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines()]
    assert rows[1:] == [
        ["model", "whole", "model", "native", "1,2", "-", "2"],
        ["model", "whole", "model_plugin", "plugin", "1,2", "-", "2"],
        ["dense", "whole", "dense", "native", "1,2", "-", "2"],
    ]
    assert "the faster are kept: model" in result.err
    assert sorted(bundle.path.rglob("*")) == before
    found = cli("build", bundle.path, "--dry-run", "--json").json["results"]
    assert found["dry_run"] is True
    assert [row["source"] for row in found["engines"]] == ["model", "model_plugin", "dense"]


def test_no_bundle_is_told(cli: Cli, tmp_path: Path) -> None:
    result = cli("build", tmp_path / "nothing")
    assert result.code == 2
    assert "error [bundle-not-found]" in result.err


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_wrong_target_is_told_before_the_missing_gpu(cli: Cli, tmp_path: Path, dry: tuple[str, ...]) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", target="ort-cpu")
    result = cli("build", bundle.path, *dry)
    assert result.code == 2
    assert "error [target]" in result.err
    assert "'ort-cpu'" in result.err
    assert "--target trt-fp16" in result.err


def test_no_gpu_exits_with_three_and_says_where_to_build(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_trt.install(monkeypatch, "8.6.0", count=None)
    bundle = write_for_tensorrt(tmp_path / "bundle")
    result = cli("build", bundle.path)
    assert result.code == 3
    assert "error [gpu-missing]" in result.err
    assert f"copy the bundle to the device that will run it, and there: edgeprune build {bundle.path}" in result.err


def test_no_tensorrt_exits_with_three(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, "8.6.0")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = cli("build", write_for_tensorrt(tmp_path / "bundle").path)
    assert result.code == 3
    assert "error [tensorrt-missing]" in result.err
    assert "pip install tensorrt" in result.err


def test_old_tensorrt_exits_with_three_and_the_reasons(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_trt.install(monkeypatch, "8.6.0")
    bundle = write_for_tensorrt(tmp_path / "bundle", tensorrt={"8.6": ["it knows no bfloat16"], "10.0": []})
    document = cli("build", bundle.path, "--json").json
    assert (document["exit_code"], document["error"]["code"]) == (3, "tensorrt-version")
    assert document["error"]["details"]["reasons"] == ["it knows no bfloat16"]


def test_missing_plugin_exits_with_three_when_it_was_asked_for(
    cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path
) -> None:
    trt.registry.held = []
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    result = cli("build", bundle.path, "--selection", "plugin")
    assert result.code == 3
    assert "error [plugin-missing]" in result.err
    assert "edgeprune plugins build" in result.err
    result = cli("build", bundle.path)
    assert result.code == 0
    assert "warning: only the native form is built" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BuildError("cannot parse model.onnx: node 'a'", code="parse", hint="h"), 4),
        (BuildError("no kernel", code="engine-build", hint="h"), 4),
        (BuildError("crashed (SIGSEGV)", code="worker-crashed", hint="h"), 4),
        (EnvironmentLackError("was killed", code="out-of-memory", hint="h"), 3),
    ],
)
def test_failed_builds_have_their_exit_codes(
    cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, code: int
) -> None:
    def fail(job: Job, what: str, report: Any) -> Built:
        raise error

    monkeypatch.setattr("edgeprune.export.trt.api.run_job", fail)
    bundle = write_for_tensorrt(tmp_path / "bundle")
    result = cli("build", bundle.path)
    assert result.code == code
    assert f"error [{error.code}]: {error.message}" in result.err
    assert list((bundle.path / "engines").iterdir()) == []


def test_full_disk_exits_with_three(
    cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Job, what: str, report: Any) -> Built:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgeprune.export.trt.api.run_job", full)
    bundle = write_for_tensorrt(tmp_path / "bundle")
    result = cli("build", bundle.path)
    assert result.code == 3
    assert "error [disk-full]" in result.err
    assert "nothing was left behind" in result.err
    assert list((bundle.path / "engines").iterdir()) == []


def test_interruption_leaves_nothing(
    cli: Cli, trt: fake_trt.FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: Job, what: str, report: Any) -> Built:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeprune.export.trt.api.run_job", interrupt)
    bundle = write_for_tensorrt(tmp_path / "bundle")
    result = cli("build", bundle.path)
    assert result.code == 130
    assert "interrupted, nothing was written" in result.err
    assert list((bundle.path / "engines").iterdir()) == []


# real processes


@dataclass
class Running:
    """`edgeprune build` in a process of its own, whose building process sleeps."""

    command: subprocess.Popen[str]
    worker: int
    bundle: Path

    def end(self) -> tuple[int, str]:
        _, err = self.command.communicate(timeout=60)
        return self.command.returncode, err


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    bundle, pid = write_for_tensorrt(tmp_path / "bundle").path, tmp_path / "pid"
    environment = fake_trt.other_process(tmp_path / "site")
    body = f"import os, pathlib, time\\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\\ntime.sleep(600)\\n"
    function = "def build(job, log, report):\n" + "".join(f"    {line}\n" for line in body.split("\\n") if line)
    with (tmp_path / "site" / "sitecustomize.py").open("a") as site:
        site.write(f"import types\nmade = types.ModuleType('builder')\nexec({function!r}, made.__dict__)\n")
        site.write("sys.modules['edgeprune.export.trt.builder'] = made\n")
    command = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", "build", str(bundle), "--no-cache"],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (pid.exists() and pid.read_text()) or command.poll() is not None)
    assert command.poll() is None, command.communicate()
    yield Running(command, int(pid.read_text()), bundle)
    command.kill()
    command.communicate()


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("nothing happened for a minute")


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_the_command_stops_the_building_process(running: Running, number: int, code: int) -> None:
    running.command.send_signal(number)
    assert running.end()[0] == code
    assert is_gone(running.worker)
    assert list((running.bundle / "engines").iterdir()) == []


def test_building_process_leaves_when_the_command_is_killed(running: Running) -> None:
    running.command.kill()
    wait_for(lambda: is_gone(running.worker))


def test_killed_building_process_exits_with_three_and_advice(running: Running) -> None:
    os.kill(running.worker, signal.SIGKILL)
    code, err = running.end()
    assert code == 3
    assert "error [out-of-memory]: the process building 1 of 2: model was killed" in err
    assert "add swap" in err
    assert list((running.bundle / "engines").iterdir()) == []
