"""The check for GPU hosts: its order, its budget, what it does without the things it wants."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"

# Answers like edgeprune's, by verb; what it was asked goes into a log beside it.
FAKE = """
import json, pathlib, sys
here = pathlib.Path(__file__)
with here.with_name("log").open("a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
verb, words = sys.argv[1], sys.argv[2:]
refusals = json.loads(here.with_name("refusals").read_text())
for words_of, (code, message) in refusals.items():
    if all(word in sys.argv for word in words_of.split()):
        print(json.dumps({"error": {"code": "x", "message": message, "hint": "do this"}}))
        sys.exit(code)
proof = {"fused_attention": 12, "attention_blocks": 12, "findings": ["a finding"]}
index = {"engines": [{"file": "a", "build_s": 2.5, "proof": proof}, {"file": "b", "build_s": 1, "proof": None}]}
ratio = {"estimate": 1.4, "low": 1.3, "high": 1.5}
batch = int(words[words.index("--batch") + 1]) if verb == "bench" else 0
results = {
    "doctor": [{"check": "gpu", "level": "ok"}, {"check": "disk", "level": "warn"}],
    "build": {"index": index},
    "verify": {"parity": {"max_rel_error": 0.01, "top1_agreement": 1.0, "kept_overlap": None}},
    "bench": {
        "batch": batch, "speedup": ratio, "macs": {"ratio": 1.5}, "unstable": [], "switch_us": None,
        "runners": [{"name": "dense", "median_wall_ms": 1.4}, {"name": "pruned", "median_wall_ms": 1.0}],
    },
}
print(json.dumps({"results": results.get(verb, {})}))
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_steps")


class Clock:
    """Seconds that pass when a fake command says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(parts: ModuleType, steps: list[Any], takes: dict[str, Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """Run steps whose commands take some seconds, or end as `Done`; return outcomes and (command, limit) asked."""
    clock, asked = Clock(), []

    def execute(command: tuple[str, ...], limit_s: float) -> Any:
        asked.append((command[0], limit_s))
        end = takes.get(command[0], 1.0)
        if isinstance(end, parts.Done):
            return end
        clock.now += min(end, limit_s)
        return parts.Done(0 if end <= limit_s else None, "", "")

    settings = {"lacking": {}, "budget_s": 100.0, **options}
    return parts.run_steps(steps, execute=execute, clock=clock, **settings), asked


def test_steps_run_in_their_order_each_within_its_limit(parts: ModuleType) -> None:
    steps = [parts.Step(name, "", (name,), limit_s=50) for name in ("a", "b", "c")]
    outcomes, asked = run(parts, steps, {"a": 30.0, "b": 40.0, "c": 20.0})
    assert asked == [("a", 50), ("b", 50), ("c", 30.0)]
    assert [(o.status, o.seconds) for o in outcomes] == [("ran", 30.0), ("ran", 40.0), ("ran", 20.0)]


def test_what_there_is_no_time_for_is_listed_and_something_shorter_still_runs(parts: ModuleType) -> None:
    steps = [
        parts.Step("long", "", ("long",), limit_s=95),
        parts.Step("build", "", ("build",), least_s=20),
        parts.Step("bench", "", ("bench",), after=("build",)),
        parts.Step("short", "", ("short",), least_s=3),
    ]
    outcomes, asked = run(parts, steps, {"long": 90.0})
    assert [name for name, _ in asked] == ["long", "short"]
    assert [o.status for o in outcomes] == ["ran", "not run", "not run", "ran"]
    assert outcomes[1].reason == "needs 20 s, 10 s are left"
    assert outcomes[2].reason == "needs 'build', which was not run: needs 20 s, 10 s are left"


def test_a_command_that_takes_too_long_fails_and_what_needs_it_is_skipped(parts: ModuleType) -> None:
    steps = [parts.Step("a", "", ("a",), limit_s=10), parts.Step("b", "", ("b",), after=("a",))]
    outcomes, asked = run(parts, steps, {"a": 99.0})
    assert [(o.status, o.reason) for o in outcomes] == [
        ("failed", "stopped after 10 s"),
        ("skipped", "needs 'a', which failed: stopped after 10 s"),
    ]
    assert [name for name, _ in asked] == ["a"]


def test_a_condition_that_is_lacking_gives_its_reason(parts: ModuleType) -> None:
    steps = [parts.Step("a", "", ("a",), needs=("device", "nvcc")), parts.Step("b", "", ("b",), after=("missing",))]
    outcomes, asked = run(parts, steps, {}, lacking={"nvcc": "no nvcc"})
    assert asked == []
    assert [o.reason for o in outcomes] == ["no nvcc", "needs 'missing', which is not part of this run"]


@pytest.mark.parametrize(("code", "status"), [(0, "ran"), (1, "failed"), (2, "failed"), (3, "skipped"), (70, "failed")])
def test_exit_codes_decide(parts: ModuleType, code: int, status: str) -> None:
    error = json.dumps({"error": {"message": "no engine", "hint": "edgeprune build"}})
    (outcome,), _ = run(parts, [parts.Step("a", "", ("a",))], {"a": parts.Done(code, error, "")})
    assert (outcome.status, outcome.exit_code) == (status, code)
    assert outcome.reason == (None if code == 0 else "no engine; fix: edgeprune build")


@pytest.mark.parametrize(
    ("stdout", "stderr", "said"), [("x", "a\nb\n", "b"), ("x\ny", "", "y"), ("", "", "it said nothing")]
)
def test_a_command_without_json_is_quoted(parts: ModuleType, stdout: str, stderr: str, said: str) -> None:
    assert parts.Done(1, stdout, stderr).complaint == said


def test_a_result_that_cannot_be_read_is_a_failure(parts: ModuleType) -> None:
    step = parts.Step("a", "", ("a",), read=lambda done: {"x": done.document["results"]})
    (outcome,), _ = run(parts, [step], {"a": parts.Done(0, "{}", "")})
    assert (outcome.status, outcome.reason) == ("failed", "its result cannot be read: KeyError('results')")


def test_a_real_command_answers(parts: ModuleType) -> None:
    code = "import sys; print('{\"a\": 1}'); sys.exit(3)"
    done = parts.execute((sys.executable, "-c", code), 30, env=dict(os.environ), cwd=str(ROOT))
    assert (done.code, done.document) == (3, {"a": 1})


def test_a_real_command_is_stopped_with_its_children(parts: ModuleType, tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'survived')!r}, 'w')"
    code = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    start = time.monotonic()
    done = parts.execute((sys.executable, "-c", code), 1.0, env=dict(os.environ), cwd=str(ROOT))
    assert (done.code, done.stdout.strip()) == (None, "begun")
    assert time.monotonic() - start < 20
    time.sleep(3.5)
    assert not (tmp_path / "survived").exists()


@pytest.fixture
def setting(check: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Return a maker of settings whose edgeprune is a fake; `refusals`: words of a command -> (exit code, message)."""

    def make(refusals: dict[str, tuple[int, str]] | None = None, **fields: Any) -> Any:
        (tmp_path / "fake.py").write_text(FAKE)
        (tmp_path / "refusals").write_text(json.dumps(refusals or {}))
        basics = {
            "bundles": tmp_path / "bundles",
            "exported": False,
            "results": tmp_path,
            "device": "gpu",
            "architecture": "90",
            "edgeprune": (sys.executable, str(tmp_path / "fake.py")),
            "python": sys.executable,
            "model": "vit_digits",
            "tactics": "builtin",
            "seconds": 1.0,
        }
        return check.Setting(**{**basics, **fields})

    return make


def asked(setting: Any) -> list[list[str]]:
    return [json.loads(line) for line in (setting.results / "log").read_text().splitlines()]


def run_fake(check: ModuleType, setting: Any, lacking: dict[str, str]) -> dict[str, Any]:
    """Run all steps but those that would really use a GPU."""
    real = {"nvcc": "not here", "pytest": "not here"}

    def execute(command: tuple[str, ...], limit_s: float) -> Any:
        return check.execute(command, limit_s, env=dict(os.environ), cwd=str(ROOT))

    outcomes = check.run_steps(
        check.make_steps(setting), lacking=real | lacking, budget_s=300.0, execute=execute, clock=time.monotonic
    )
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize("exported", [False, True])
def test_every_step_is_named_once_and_needs_only_earlier_ones(check: ModuleType, setting: Any, exported: bool) -> None:
    steps = check.make_steps(setting(exported=exported))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for i, step in enumerate(steps):
        assert set(step.after) <= set(names[:i]), step.name
        assert step.least_s <= step.limit_s
    assert {name for name in names if name.startswith("export")} == (
        {f"export {name}" for name in check.BUNDLES} if exported else set()
    )
    for selection in ("native", "plugin"):
        assert {f"bench static {selection} batch {batch}" for batch in check.BATCHES} <= set(names)


def test_a_host_with_everything_runs_everything(check: ModuleType, setting: Any) -> None:
    here = setting()
    found = run_fake(check, here, {})
    skipped = {name for name, outcome in found.items() if outcome.status != "ran"}
    assert skipped == {"plugin build", "kernels bench", "kernels tests", "tests on the device"}  # need nvcc, pytest
    assert found["doctor"].figures == {"not right": ["disk"]}
    assert found["build static native batch 1"].figures == {
        **{"engines": 2, "build_s": 3.5, "fused": {"a": "12/12"}},
        **{"findings": ["a finding"], "choices": []},
    }
    bench = found["bench static native batch 8"].figures
    assert bench["efficiency"] == pytest.approx(1.4 / 1.5)
    assert (bench["dense_ms"], bench["speedup"], bench["goal reached"]) == (1.4, 1.4, True)
    assert found["verify static native batch 1"].figures == {"max_rel_error": 0.01, "top1_agreement": 1.0}
    builds = [words for words in asked(here) if words[0] == "build"]
    static = str(here.bundles / "static")
    assert builds[0] == [
        *("build", static, "--selection", "native", "--batches", "1", "--graphs", "model,dense"),
        *("--tactic-sources", "builtin", "--json"),
    ]
    benches = [words for words in asked(here) if words[0] == "bench"]
    assert {words[words.index("--against") + 1] for words in benches} == {"dense"}
    outputs = [words[words.index("-o") + 1] for words in benches]
    assert len(set(outputs)) == len(outputs) == 12
    assert check.exit_code(list(found.values()), {}) == 0


def test_without_tensorrt_the_provider_is_still_measured(check: ModuleType, setting: Any) -> None:
    here = setting()
    found = run_fake(check, here, {"tensorrt": "no tensorrt", "pycuda": "no pycuda"})
    ran = [name for name, outcome in found.items() if outcome.status == "ran"]
    assert ran == ["doctor", "verify cuda", *(f"bench cuda batch {batch}" for batch in (1, 8, 32))]
    assert found["build static native batch 1"].reason == "no tensorrt"
    assert "build" not in {words[0] for words in asked(here)}


def test_without_the_plugin_everything_else_runs(check: ModuleType, setting: Any) -> None:
    found = run_fake(check, setting({"plugins check": (3, "no plugin library")}), {})
    reasons = {name: outcome.reason for name, outcome in found.items() if " plugin batch " in name}
    assert set(reasons.values()) == {"needs 'plugin check', which was skipped: no plugin library; fix: do this"}
    assert len(reasons) == 9
    assert found["bench static native batch 32"].status == "ran"


def test_without_torch_nothing_is_verified_and_the_rest_runs(check: ModuleType, setting: Any) -> None:
    here = setting()
    found = run_fake(check, here, {"torch": "no torch", "export": "no torch"})
    assert {words[0] for words in asked(here)} == {"doctor", "build", "inspect", "bench", "plugins"}
    assert found["verify cuda"].reason == "no torch"


def test_a_build_that_fails_takes_only_its_own_steps_along(check: ModuleType, setting: Any) -> None:
    here = setting({"build --batches 8": (4, "builder gave up"), "verify static": (1, "differs")})
    found = run_fake(check, here, {})
    assert (found["build static native batch 8"].status, found["build static native batch 8"].exit_code) == (
        "failed",
        4,
    )
    assert found["bench static native batch 8"].reason.startswith("needs 'build static native batch 8', which failed: ")
    assert found["bench static native batch 32"].status == "ran"
    assert check.exit_code(list(found.values()), {}) == 1


def test_a_verb_that_lacks_something_is_skipped(check: ModuleType, setting: Any) -> None:
    found = run_fake(check, setting({"bench --batch": (3, "no engine for this device")}), {})
    outcome = found["bench static native batch 1"]
    assert (outcome.status, outcome.reason) == ("skipped", "no engine for this device; fix: do this")


def test_an_emulated_comparison_says_nothing_of_the_engine(check: ModuleType, parts: ModuleType) -> None:
    results = {"parity": {"max_rel_error": 0.0}, "emulated": "there is no GPU"}
    step = parts.Step("verify", "", ("verify",), read=check.read_verify)
    (outcome,), _ = run(parts, [step], {"verify": parts.Done(0, json.dumps({"results": results}), "")})
    assert (outcome.status, outcome.reason) == ("skipped", "emulated on the processor: there is no GPU")


def test_bundles_that_were_not_prepared_are_named(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "manifest.json").write_text("{}")
    assert set(check.missing_bundles(tmp_path)) == {"bundle buckets", "bundle density", "bundle cuda"}
    assert check.missing_bundles(None) == {}


@pytest.mark.parametrize(
    ("model", "sizes"), [("deit_small_patch16_224", "56,96,144,196"), ("vit_digits", "16,32,48,64")]
)
def test_bucket_sizes_follow_the_model(check: ModuleType, model: str, sizes: str) -> None:
    assert check.bucket_sizes(model) == sizes


def test_summary_is_a_table_of_all_steps(check: ModuleType, parts: ModuleType) -> None:
    outcomes = [
        parts.Outcome(
            "a", "", "ran", None, 2.4, 0, {"speedup": 1.2345, "goal": True, "findings": ["x", "y", "z", "w"]}
        ),
        parts.Outcome("b", "", "skipped", "no | nvcc\nhere"),
    ]
    assert check.summary(outcomes).splitlines()[2:] == [
        "| a | ran | 2 | speedup 1.234, goal yes, findings x, y, z and 1 more |",
        "| b | skipped | 0 | no / nvcc here |",
    ]
    assert check.counts(outcomes) == "1 ran, 1 skipped"


def test_last_line_of_pytest_is_read(check: ModuleType, parts: ModuleType) -> None:
    done = parts.Done(1, "SKIPPED [2] tests/x\n1 failed, 23 passed, 280 skipped in 1.96s\n", "")
    assert check.read_pytest(done) == {"failed": 1, "passed": 23, "skipped": 280}


@pytest.mark.parametrize(
    ("batch", "speedup", "reached"), [(1, 0.99, False), (1, 1.01, True), (8, 1.34, False), (8, 1.36, True)]
)
def test_goals_are_never_slower_alone_and_most_of_the_ratio_in_batches(
    check: ModuleType, parts: ModuleType, batch: int, speedup: float, reached: bool
) -> None:
    ratio = {"estimate": speedup, "low": None, "high": None}
    result = {"batch": batch, "speedup": ratio, "macs": {"ratio": 1.5}, "runners": [], "unstable": []}
    figures = check.read_bench(parts.Done(0, json.dumps({"results": result}), ""))
    assert figures["goal reached"] is reached


def test_preparing_exports_every_bundle(
    check: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = setting()
    monkeypatch.setattr(check, "packages", lambda python: {"tensorrt": "no tensorrt"})
    words = ["--prepare", str(tmp_path / "made"), "--only", "static,density", "--edgeprune", " ".join(here.edgeprune)]
    assert check.prepare(check.parse_arguments(words)) == 0
    made = asked(here)
    assert [words[words.index("-o") + 1] for words in made] == [
        str(tmp_path / "made" / n) for n in ("static", "density")
    ]
    assert made[0][:3] == ["export", "-m", "deit_small_patch16_224"]
    assert "gpu_check.sh --bundles" in capsys.readouterr().out


def test_weights_are_sharpened(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    files = [tmp_path / "sharp.safetensors", tmp_path / "again.safetensors"]
    for file in files:
        command = [sys.executable, str(BENCHMARKS / "_sharpened.py"), "vit_digits", "sait", str(file), "mass=0.9"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True)
    first, second = (safetensors.load_file(file) for file in files)
    assert all((first[name] == second[name]).all() for name in first)
    weight = first["blocks.0.attn.qkv.weight"]
    queries, values = weight[: len(weight) // 3], weight[2 * len(weight) // 3 :]
    assert queries.std() / values.std() == pytest.approx(3**0.5, rel=0.05)


def test_preparing_without_torch_ends_with_three(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "packages", lambda python: {"export": "no torch here"})
    assert check.prepare(check.parse_arguments(["--prepare", str(tmp_path / "made")])) == 3


@pytest.mark.parametrize(
    "words", [["--budget", "0"], ["--bundles", "/nonexistent"], ["--prepare", "a", "--bundles", "b"]]
)
def test_wrong_options_are_usage_errors(check: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check.parse_arguments(words)
    assert caught.value.code == 2


def test_the_script_runs_to_its_end_without_a_gpu(check: ModuleType, tmp_path: Path) -> None:
    if "device" not in check.look_around(sys.executable)[0]:
        pytest.skip("this machine has a GPU")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    done = subprocess.run(
        [bash, str(BENCHMARKS / "gpu_check.sh"), "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    result = json.loads((tmp_path / "gpu_check.no-device.json").read_text())
    assert {step["status"] for step in result["steps"][1:]} == {"skipped"}
    assert result["steps"][0]["name"] == "doctor"
    assert result["steps"][0]["status"] == "ran"
    assert all("no CUDA driver" in step["reason"] for step in result["steps"][1:])
    assert result["fingerprint"]["cpu_model"]
    assert "| kernels bench | skipped |" in done.stdout
    assert str(tmp_path) not in json.dumps(result)
