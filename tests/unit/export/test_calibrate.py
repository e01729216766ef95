"""Buckets chosen for real images, end to end on the shipped checkpoints."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.export import ExportRequest, calibrate, export_model
from edgeprune.export.calibrate import blocks_per_stage
from tests.helpers.lowering import small, stages_of

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
ATS = ExportRequest(
    model="vit_digits", method="ats", checkpoint=str(CHECKPOINTS / "vit_digits_ats.safetensors"), buckets="auto:3",
    calibration="digits", calibration_images=48,
)  # fmt: skip


@pytest.mark.parametrize("fill", ["mask", "next-best"])
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_manifest_says_what_was_seen_and_expected(tmp_path: Path, target: str, fill: str) -> None:
    manifest = export_model(replace(ATS, target=target, fill=fill), tmp_path / "bundle").manifest
    adaptive = manifest.adaptive
    assert adaptive is not None
    assert (adaptive.form, adaptive.fill) == ("buckets", fill)
    rows = [bucket.capacities for bucket in adaptive.buckets]
    assert 1 <= len(rows) <= 3
    assert rows[-1] == [stage.kept for stage in manifest.method.stages]
    assert all(a <= b for little, large in pairwise(rows) for a, b in zip(little, large, strict=True))
    assert sum(bucket.share or 0 for bucket in adaptive.buckets) == pytest.approx(1)
    found = adaptive.calibration
    assert found is not None
    assert (found.data, found.images) == ("digits", 48)
    assert [sum(images for _, images in stage) for stage in found.histograms] == [48] * len(rows[0])
    assert found.expected_ms > found.stem_ms > 0
    slow = [warning for warning in manifest.warnings if "the dense graph takes" in warning]
    assert bool(slow) == (found.expected_ms >= found.dense_ms)
    assert (found.held_out_overflow is None) == (fill == "next-best")
    assert all(bucket.latency_ms is not None for bucket in adaptive.buckets)
    multiple = 1 if target == "ort-cpu" else 8
    assert all(row[0] % multiple == 0 or row == rows[-1] for row in rows)


def test_nothing_written_to_try_stays(tmp_path: Path) -> None:
    bundle = export_model(replace(ATS, target="onnx"), tmp_path / "bundle")
    graphs = {bucket.graph for bucket in bundle.manifest.adaptive.buckets} | {"stem", "dense"}  # type: ignore[union-attr]
    assert set(bundle.manifest.graphs) == graphs
    assert {p.stem for p in bundle.path.glob("*.onnx")} == graphs


def test_given_sizes_are_kept_and_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_tokens(calls: dict[Any, Any], rounds: int = 0) -> dict[Any, float]:
        return {key: float(np.sum(key)) + 1 for key in calls}  # the stem, a number of tokens, or a bucket

    monkeypatch.setattr(calibrate, "measure_in_turns", by_tokens)
    manifest = export_model(replace(ATS, buckets="12,30"), tmp_path / "bundle").manifest
    assert manifest.adaptive is not None
    assert [bucket.capacities[0] for bucket in manifest.adaptive.buckets] == [12, 30, 64]
    assert manifest.adaptive.buckets[0].capacities[-1] < 12


def test_images_of_a_directory_need_no_classes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (70, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    request = replace(ATS, calibration=f"imagefolder:{folder}")
    found = export_model(request, tmp_path / "bundle").manifest.adaptive.calibration  # type: ignore[union-attr]
    assert found is not None
    assert (found.data, found.images) == ("imagefolder:photos", 4)


def test_weights_that_give_no_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.pruning.model import PrunedViT

    run = PrunedViT.run

    def broken(self: PrunedViT, images: torch.Tensor, **options: Any) -> Any:
        out = run(self, images, **options)
        out.logits[0] = torch.nan
        return out

    monkeypatch.setattr(PrunedViT, "run", broken)
    with pytest.raises(InputError) as error:
        export_model(ATS, tmp_path / "bundle")
    assert error.value.code == "calibration"
    assert not (tmp_path / "bundle").exists()


def test_blocks_belong_to_the_stage_before_them() -> None:
    config = small(depth=12)
    assert blocks_per_stage(stages_of(config, "asvit", 1.0), 12) == [3, 3, 2]
    assert blocks_per_stage(stages_of(config, "sait", 1.0), 12) == [9]
