"""Timing candidates through the run time, and building with it, on stand-ins of TensorRT and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.export.trt import BuildOptions, build_engines, builder, measure
from edgeprune.export.trt.job import Built, Job
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import EngineIndex
from tests.helpers import fake_trt
from tests.helpers.trt_bundles import write_for_tensorrt, write_two_buckets


@pytest.fixture(params=fake_trt.VERSIONS)
def trt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_trt.FakeTensorRT:
    """Install a TensorRT whose engines are built in this process."""

    def run_job(job: Job, what: str, report: Any) -> Built:
        with Path(job.log).open("w") as log:
            return builder.build(job, log, report)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("edgeprune.export.trt.api.run_job", run_job)
    return fake_trt.install(monkeypatch, request.param)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, Any]]:
    """Return what the calls that took turns gave, by group; their times are told: engines of one bucket are slow."""
    groups: list[dict[Any, Any]] = []

    def once(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
        assert rounds == measure.ROUNDS
        groups.append({key: call() for key, call in calls.items()})
        return {(file, n): 5.0 if file.startswith("rest_") else 1.0 for file, n in calls}

    monkeypatch.setattr(measure, "measure_in_turns", once)
    return groups


def build(bundle: Bundle, **options: Any) -> EngineIndex:
    return build_engines(bundle, BuildOptions(**options))


def test_forms_of_one_batch_take_turns(trt: fake_trt.FakeTensorRT, turns: list[Any], tmp_path: Path) -> None:
    build(write_for_tensorrt(tmp_path / "bundle", (1, 2), plugin=True))
    assert [sorted(group) for group in turns] == [
        [("model.engine", 0), ("model_plugin.engine", 0)],
        [("model.engine", 1), ("model_plugin.engine", 1)],
        [("dense.engine", 0)],
        [("dense.engine", 1)],
    ]
    for group, batch in zip(turns, (1, 2, 1, 2), strict=True):
        assert {out["logits"].shape for out in group.values()} == {(batch, 4)}


def test_rests_run_on_what_the_stem_hands_on(trt: fake_trt.FakeTensorRT, turns: list[Any], tmp_path: Path) -> None:
    index = build(write_two_buckets(tmp_path / "bundle"))
    (choice,) = index.choices
    assert (choice.what, choice.chosen) == ("engines", "profiles")
    assert [info.source for info in index.engines] == ["stem", "rest"]
    of_rests = turns[2:]
    assert [sorted(group) for group in of_rests] == [
        [("rest.engine", 0), ("rest.engine", 2), ("rest_2.engine", 0), ("rest_4.engine", 0)],
        [("rest.engine", 1), ("rest.engine", 3), ("rest_2.engine", 1), ("rest_4.engine", 1)],
    ]
    for group in of_rests:
        told = [group[key]["logits"] for key in sorted(group) if key[0] == "rest.engine"]
        alone = [group[key]["logits"] for key in sorted(group) if key[0] != "rest.engine"]
        assert np.abs(told[0] - told[1]).max() > 1e-3  # two buckets are two functions
        for one, other in zip(told, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_asked_way_is_the_only_one_timed(trt: fake_trt.FakeTensorRT, turns: list[Any], tmp_path: Path) -> None:
    index = build(write_two_buckets(tmp_path / "bundle"), engines="per-bucket")
    assert [info.source for info in index.engines] == ["stem", "rest_2", "rest_4"]
    assert index.choices == []
    assert {file for group in turns for file, _ in group} == {"stem.engine", "rest_2.engine", "rest_4.engine"}


def test_real_times_are_put_down(trt: fake_trt.FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)
    index = build(write_two_buckets(tmp_path / "bundle"))
    assert all((profile.median_ms or 0) > 0 for info in index.engines for profile in info.profiles)


@pytest.mark.parametrize("engines", ["profiles", "per-bucket"])
def test_built_bundle_runs(
    engines: Any, trt: fake_trt.FakeTensorRT, turns: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.runtime.session import Session

    bundle = write_two_buckets(tmp_path / "bundle")
    build(bundle, engines=engines)
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    images[0] -= 4  # no bright patch: the smaller bucket
    images[1] += 4
    found = Session(bundle).run(images)
    assert found.logits.shape == (2, 4)
    assert np.isfinite(found.logits).all()
