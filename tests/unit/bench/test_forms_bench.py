"""Every form of a bundle, measured for real: what the result holds, never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeprune.bench import BenchResult, bench_bundle, report_notes, report_tables
from edgeprune.export import ExportRequest, export_model

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"


def measured(folder: Path, method: str, *, images_per_run: int = 1, **fields: Any) -> BenchResult:
    import torch

    torch.set_num_threads(1)
    checkpoint = str(CHECKPOINTS / f"vit_digits_{method}.safetensors")
    request = ExportRequest(model="vit_digits", method=method, checkpoint=checkpoint, verify=False, **fields)
    bundle = export_model(request, folder / "bundle")
    result = bench_bundle(bundle, rounds=2, quick=True, batch=images_per_run, data="digits", images=6, callers=2)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["data"] == "digits"
    assert not [warning for warning in result.warnings if "holds no" in warning]
    assert all(rows for _, rows in report_tables(result))
    return result


def test_buckets_are_measured_in_passes(tmp_path: Path) -> None:
    result = measured(tmp_path, "ats", buckets="8,16", calibration="digits", calibration_images=8)
    assert [runner.name for runner in result.runners] == ["dense", "pruned"]
    assert (result.images, result.runs_per_sample) == (6, 6)
    adaptive = result.adaptive
    assert adaptive is not None
    assert (adaptive.form, adaptive.runs, len(adaptive.tokens)) == ("buckets", 6 * result.runners[1].n, 5)
    assert [group.capacities[0] for group in adaptive.groups if group.capacities] == [8, 16, 64]
    assert sum(group.runs for group in adaptive.groups) == adaptive.runs
    assert sum(group.share or 0 for group in adaptive.groups) == pytest.approx(1)
    assert adaptive.differs == ()
    assert adaptive.ratio is not None
    assert adaptive.router_us is not None
    assert result.macs is not None
    assert result.macs.ratio > 1
    assert not any("noise" in note for note in report_notes(result))


def test_runs_of_several_images_may_be_mixed(tmp_path: Path) -> None:
    result = measured(tmp_path, "ats", buckets="8,16", target="onnx", images_per_run=2, batch=(1, 2))
    adaptive = result.adaptive
    assert adaptive is not None
    assert (result.runs_per_sample, adaptive.runs) == (3, 3 * result.runners[1].n)
    assert sum(group.runs for group in adaptive.groups) == adaptive.runs


def test_shapes_that_follow_the_image_are_measured_by_quartile(tmp_path: Path) -> None:
    result = measured(tmp_path, "sait", method_options={"mass": "0.8"})
    assert [runner.name for runner in result.runners] == ["dense", "pruned"]
    adaptive = result.adaptive
    assert adaptive is not None
    assert adaptive.form == "computed"
    assert sum(group.runs for group in adaptive.groups) == adaptive.runs


def test_slots_are_measured_without_rows(tmp_path: Path) -> None:
    result = measured(tmp_path, "sait", method_options={"mass": "0.8"}, adaptive="slots")
    assert [runner.name for runner in result.runners] == ["dense", "pruned", "random"]
    assert result.adaptive is not None
    assert result.adaptive.groups == []
    assert result.macs is not None
    assert result.macs.pruned_executed_g is not None


def test_every_density_is_measured_once(tmp_path: Path) -> None:
    result = measured(tmp_path, "dynamicvit", densities=(1.0, 0.7, 0.5))
    assert [runner.name for runner in result.runners] == ["dense", "pruned at 0.7", "pruned at 0.5", "random"]
    assert [density.runner for density in result.densities] == ["dense", "pruned at 0.7", "pruned at 0.5"]
    assert result.speedup == result.densities[1].speedup
    assert result.switch_us is not None
    assert result.callers is not None
    assert [memory.session for memory in result.memory] == ["dense", "pruned", "random"]
