from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.session import Session


def test_planted_work_changes_no_result(digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    trial = pytest.importorskip("gate_trial", exc_type=ImportError)
    planted = trial.add_work(digits_bundle, tmp_path / "planted", products=40)
    size = digits_bundle.manifest.preprocessing.image_size
    images = np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32)
    before, after = (Session(bundle).run(images).logits for bundle in (digits_bundle, planted))
    assert np.array_equal(before, after)
