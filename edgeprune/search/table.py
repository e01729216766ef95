"""What a target takes for a block by its tokens, from whole networks measured, and what a schedule takes by that.

A network's time is a sum: a constant, every block by the rows that pass it, every stage by the tokens that reach it.
The sum is fitted to the measured networks, so that everything is paid for once and as part of a network that runs. A
block that prunes takes a share of two entries: keys and values at the tokens that reach it, the rest at those it keeps.
The table never falls with more tokens. Plain numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.export.plan import Block, Plan, Restore, Rows, Select, rows_count

Row = NDArray[np.float64]

OUTLIER = 0.03  # relative error from which on a network counts less, in proportion
REWEIGHTINGS = 3
SMOOTHNESS = 0.02  # weight of the second differences of the curve, relative to one measured network
# what a network has besides its blocks
BASE, STAGES, STAGE_TOKENS, STAGE_PAIRS, LAST_TOKENS, RESTORED, FUSED = range(7)
EXTRAS = (
    "base",
    "stage",
    "stage by token",
    "stage by pair of tokens",
    "last block by token",
    "restored token",
    "fused",
)


@dataclass(frozen=True)
class Observation:
    """A measured network: what it is made of, for each image it was run on in turn, and what one run took."""

    plans: Sequence[Plan]
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by part.

    Attributes:
        tokens: rows of a sequence, prefix included, ascending.
        block_ms: one block with so many rows, non-decreasing.
        extras_ms: everything else, in the order of `EXTRAS`; of pairs per 1,000 of them.
        errors: relative error of every measured network, predicted by a table made of the others.
        clock: "cpu" or "wall", what was measured.
    """

    tokens: tuple[int, ...]
    block_ms: tuple[float, ...]
    extras_ms: tuple[float, ...]
    errors: tuple[float, ...] = ()
    clock: str = "wall"

    def predict(self, plans: Sequence[Plan]) -> float:
        """Return the milliseconds of a network, the mean over the plans of several images."""
        return float(_mean_features(plans, self.tokens) @ np.array([*self.block_ms, *self.extras_ms]))

    def block(self, rows: int) -> float:
        """Return the milliseconds of one block with so many rows."""
        return float(_weights(rows, self.tokens) @ np.array(self.block_ms))

    @classmethod
    def fitted(cls, seen: Sequence[Observation], tokens: Sequence[int], *, clock: str = "wall") -> LatencyTable:
        """Return the table that agrees best with what was measured, by relative error.

        Args:
            seen: measured networks.
            tokens: rows that get an entry, ascending.
            clock: that measured them.

        Raises:
            InputError: `latency-table` when there are too few networks, or times that are none.
        """
        ms = np.array([o.ms for o in seen])
        if len(seen) < 3 or not (np.isfinite(ms).all() and (ms > 0).all()):
            raise InputError(
                f"no latency table can be made of {len(seen)} networks",
                code="latency-table",
                expected="at least three, each with a time above zero",
            )
        knots = tuple(tokens)
        design = np.array([_mean_features(o.plans, knots) for o in seen])
        values = _fit(design, ms, knots)
        errors = tuple(
            float(design[i] @ _fit(np.delete(design, i, 0), np.delete(ms, i), knots) / ms[i] - 1)
            for i in range(len(seen))
        )
        n = len(knots)
        return cls(knots, tuple(map(float, values[:n])), tuple(map(float, values[n:])), errors, clock)


def features(plan: Plan, tokens: Sequence[int]) -> Row:
    """Return how often each entry of a table stands in the sum of a network, [tokens + extras]."""
    row = np.zeros(len(tokens) + len(EXTRAS))
    curve, extras = row[: len(tokens)], row[len(tokens) :]  # views
    extras[BASE] = 1
    widths = 4 + 2 * plan.config.mlp_ratio  # of a block's projections, in units of the embedding
    for step in plan.steps:
        stage = step.stage if isinstance(step, (Select, Block)) else None
        if stage is not None:
            reach = stage.counts.tokens_in
            extras[STAGES] += 1
            extras[STAGE_TOKENS] += reach
            extras[STAGE_PAIRS] += reach * reach / 1000
            extras[FUSED] += stage.counts.fused
        if isinstance(step, Restore):
            extras[RESTORED] += step.tokens_out - step.tokens_in
        if not isinstance(step, Block):
            continue
        if step.query_rows is Rows.HEAD:
            extras[LAST_TOKENS] += step.tokens_in
            continue
        queries, projected = (rows_count(plan.config, step, rows) for rows in (step.query_rows, step.projected_rows))
        shares = ((2, step.tokens_in), (1, queries), (1, projected),
                  (2 * plan.config.mlp_ratio, min(projected, step.tokens_out)))  # fmt: skip
        for share, rows in shares:
            curve += share / widths * _weights(rows, tokens)
    return row


def _mean_features(plans: Sequence[Plan], tokens: Sequence[int]) -> Row:
    return np.mean([features(plan, tokens) for plan in plans], axis=0)


def _weights(rows: float, tokens: Sequence[int]) -> Row:
    """Return the shares of the entries around a number of rows; straight on outside, but no less than nothing."""
    at = np.asarray(tokens, np.float64)
    found = np.zeros(len(at))
    if len(at) == 1:
        found[0] = 1
        return found
    right = int(np.clip(np.searchsorted(at, rows), 1, len(at) - 1))
    share = max((rows - at[right - 1]) / (at[right] - at[right - 1]), 0.0)
    found[right - 1 : right + 1] = 1 - share, share
    return found


def _fit(design: Row, ms: Row, tokens: Sequence[int]) -> Row:
    """Return entries >= 0, the curve's non-decreasing: least squares of the relative error, and a smooth curve."""
    n = len(tokens)
    steps = np.tril(np.ones((n, n)))  # curve = steps @ increments, so that increments >= 0 make it rise
    turn = np.eye(design.shape[1])
    turn[:n, :n] = steps
    scaled = (design / ms[:, None]) @ turn
    rough = np.zeros((max(n - 1, 0), design.shape[1]))
    at = np.array([0.0, *tokens])
    for i in range(n - 1):  # change of the slope at every entry but the last, through the origin
        left, right = at[i + 1] - at[i], at[i + 2] - at[i + 1]
        rough[i, i], rough[i, i + 1] = -1 / left, 1 / right
    # slopes in units of the mean time by token, so that the weight means the same for every network
    rough *= SMOOTHNESS * at[-1] * design[:, :n].sum(1).mean() / ms.mean()
    scale = np.maximum(np.abs(scaled).max(0), 1e-12)
    wanted, weights, found = np.ones(len(ms)), np.ones(len(ms)), np.zeros(0)
    for _ in range(REWEIGHTINGS):  # a network that was measured while the machine was busy shall not bend the others
        stacked = np.concatenate([scaled / scale * weights[:, None], rough / scale])
        found = non_negative(stacked, np.concatenate([wanted * weights, np.zeros(len(rough))])) / scale
        weights = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(np.abs(scaled @ found - 1), 1e-12)))
    return turn @ found


def non_negative(matrix: Row, wanted: Row) -> Row:
    """Return x >= 0 with the least |matrix x - wanted|: the active-set method of Lawson and Hanson."""
    n = matrix.shape[1]
    x, free = np.zeros(n), np.zeros(n, bool)
    gradient = matrix.T @ wanted
    tolerance = 1e-10 * max(float(np.abs(gradient).max(initial=0.0)), 1e-300)
    for _ in range(10 * n):
        gradient = matrix.T @ (wanted - matrix @ x)
        if free.all() or gradient[~free].max() <= tolerance:
            break
        free[int(np.argmax(np.where(free, -np.inf, gradient)))] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
            if not free.any() or trial[free].min() > 0:
                break
            back = free & (trial <= 0)
            share = float(np.min(x[back] / np.maximum(x[back] - trial[back], 1e-300)))
            x = x + share * (trial - x)
            free &= x > 1e-15
            x[~free] = 0
        x = trial
    return x
