"""The scripts in benchmarks/: their arithmetic, and that they run to the end."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeprune.bench.measure import Measurement, Samples
from edgeprune.bench.stats import Ratio

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_common")


@pytest.fixture
def export_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("export_cost")


@pytest.mark.parametrize(
    ("measured", "at_least", "reached"),
    [(1.05, True, "yes"), (1.04, True, "no"), (1.04, False, "yes"), (1.06, False, "no")],
)
def test_goal_is_reached_on_its_side(common: ModuleType, measured: float, at_least: bool, reached: str) -> None:
    goal = common.Goal("what", common.exact(measured), 1.05, at_least)
    assert goal.row()["reached"] == reached


def test_goal_shows_shares_in_percent(common: ModuleType) -> None:
    row = common.Goal("what", Ratio(0.0065, 0.006, 0.0071, 0.95, 20), 0.007, at_least=False, unit="%").row()
    assert row["measured [95 % CI]"] == "0.65 % [0.60 %, 0.71 %]"
    assert row["wanted"] == "<= 0.7 %"


def test_group_ratio_uses_its_clock(common: ModuleType) -> None:
    samples = {"a": Samples([10.0] * 12, [4.0] * 12), "b": Samples([5.0] * 12, [1.0] * 12)}
    measurement = Measurement(samples, 12, 1, 6, True, 1.0)
    assert common.Group("g", 1, 1, "cpu", measurement, []).ratio("a", "b").estimate == 4.0
    assert common.Group("g", 1, 2, "wall", measurement, []).ratio("a", "b").estimate == 2.0


def test_markdown_table_has_a_line_per_row(common: ModuleType) -> None:
    table = common.markdown_table([{"x": "1", "y": "2"}, {"x": "3", "y": "4"}])
    assert table.splitlines() == ["| x | y |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads to cores")
def test_pinned_takes_the_cores_back(common: ModuleType) -> None:
    before = os.sched_getaffinity(0)
    with common.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_profile_finds_the_selection_of_a_bundle(common: ModuleType, tmp_path: Path) -> None:
    bundle = common.Workshop(tmp_path).bundle(model="vit_digits", method="evit", keep_rate=0.5)
    images = common.random_images(1, (64, 64))
    share = common.profile_share(bundle.graph_path("model"), images, runs=3, part="select")
    assert 0 < share < 0.9
    with pytest.raises(SystemExit, match="the profile says nothing"):
        common.profile_share(bundle.graph_path("dense"), images, runs=1, part="select")


def test_openvino_runs_the_portable_bundle(common: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from edgeprune.runtime.session import Session

    bundle = common.Workshop(tmp_path).bundle(model="vit_digits", target="onnx", method="evit", keep_rate=0.5)
    images = common.random_images(1, (64, 64))
    outputs = common.openvino_runner(bundle.graph_path("model"), images, threads=1)()
    assert common.relative_error(np.array(outputs[0]), Session(bundle, threads=1).run(images).logits) < 1e-4


def test_export_step_is_measured(export_cost: ModuleType) -> None:
    step = export_cost.measure_step("vit_digits", "evit 0.7")
    assert 0 < step.lowering_s < step.total_s
    assert 1 < step.weights_mib < 10
    assert step.extra_mib is None or step.extra_mib >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("ort_cpu_efficiency", ["--batch", "1"]),
        ("ort_cpu_peers", ["--batch", "1"]),
        ("export_cost", []),
        ("adaptive", ["--images", "2", "--calibration-images", "8"]),
        ("governor", ["--busy", "1", "--fps", "50"]),
    ],
)
def test_benchmark_writes_its_result(script: str, own: list[str], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    options = ["--model", "vit_digits", "--quick", "--out", str(tmp_path / "result.json"), *own]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["quick"] is True
    assert result["cases"]
    assert all(goal["what"] in done.stdout for goal in result["goals"])
    assert str(tmp_path) not in json.dumps(result)
