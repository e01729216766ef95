from __future__ import annotations

import pytest

from edgeprune.bench.measure import Measurement, Samples
from edgeprune.search.networks import steady_ms


def test_what_slows_a_whole_block_down_is_taken_out() -> None:
    pace = [1, 1, 1, 1, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1, 1]
    samples = {
        name: Samples([ms * p for p in pace], [ms * p for p in pace])
        for name, ms in (("a", 1.0), ("b", 2.0), ("c", 4.0))
    }
    times = steady_ms(Measurement(samples, 12, 1, 3, True, 1.0), 1)
    assert times["b"] / times["a"] == pytest.approx(2) and times["c"] / times["a"] == pytest.approx(4)
