"""Engines built and timed by the real TensorRT. Not run on a GPU yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.export.trt import BuildOptions, build_engines, can_build_here
from tests.helpers.trt_bundles import write_for_tensorrt

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(autouse=True)
def _able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = can_build_here()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("tactics", ["default", "builtin"])
def test_engines_are_built_and_timed(tactics: Any, tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 4))
    index = build_engines(bundle, BuildOptions(tactics=tactics))
    assert [info.source for info in index.engines] == ["model", "dense"]
    assert [profile.batch for profile in index.engines[0].profiles] == [1, 2, 4]
    assert all((profile.median_ms or 0) > 0 for info in index.engines for profile in info.profiles)
    assert all(info.proof is not None and info.proof.layers > 0 for info in index.engines)


def test_second_build_takes_engines_from_the_cache(tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle")
    first = build_engines(bundle, BuildOptions())
    second = build_engines(bundle, BuildOptions())
    assert [info.build_s for info in second.engines] == [0, 0]
    assert [info.sha256 for info in second.engines] == [info.sha256 for info in first.engines]
    assert list((tmp_path / "cache" / "edgeprune" / "timing").glob("*.cache"))
