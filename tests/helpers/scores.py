"""Scores that provoke mistakes, and the selection written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

# Few distinct values make ties likely; 0.0 and -0.0 are one value; the infinities are ordinary scores.
AWKWARD = (math.nan, -math.inf, math.inf, 0.0, -0.0, 0.5, 0.25, -1.5, 3.0)


def awkward_scores(size: int) -> st.SearchStrategy[list[float]]:
    """Return a strategy for `size` scores with ties, NaN and infinities."""
    return st.lists(st.sampled_from(AWKWARD) | st.floats(width=32), min_size=size, max_size=size)


def awkward_batch(batch: int, size: int, seed: int) -> np.ndarray:
    """Return scores [batch, size] float32 drawn from awkward values and from a normal distribution."""
    rng = np.random.default_rng(seed)
    values = np.array(AWKWARD, np.float32)[rng.integers(0, len(AWKWARD), (batch, size))]
    return np.where(rng.random((batch, size)) < 0.3, rng.standard_normal((batch, size)), values).astype(np.float32)


def ranked(scores: Sequence[float]) -> list[int]:
    """Return positions best first: ties to the lower index, NaN last."""
    missing = [i for i, s in enumerate(scores) if math.isnan(s)]
    present = [i for i, s in enumerate(scores) if not math.isnan(s)]
    return sorted(present, key=lambda i: (-scores[i], i)) + missing


def counted(scores: Sequence[float], k: int, mode: int, threshold: float) -> int:
    """Return how many tokens a mode keeps."""
    if mode == 0:
        return k
    if mode == 1:
        return sum(s > threshold for s in scores)
    if threshold >= 1:
        return len(scores)
    total, count = 0.0, 0
    for i in ranked(scores):
        if total >= threshold:
            break
        total += max(scores[i], 0.0) if not math.isnan(scores[i]) else 0.0
        count += 1
    return max(count, 1)
