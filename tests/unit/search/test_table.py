from __future__ import annotations

from random import Random

import numpy as np
import pytest

from edgeprune.errors import InputError
from edgeprune.export import ExportRequest
from edgeprune.search.networks import plan_of
from edgeprune.search.request import SearchRequest, check_request
from edgeprune.search.space import make_space
from edgeprune.search.table import EXTRAS, LatencyTable, Observation, features, non_negative

TOKENS = (6, 17, 33, 49, 65)
RESOLVED = check_request(SearchRequest(ExportRequest(model="vit_digits", method="evit"), "digits"))
SPACE = make_space(RESOLVED)
STAGES = [SPACE.stages(c) for c in SPACE.designs(40, Random(0))]
PLANS = [plan_of(RESOLVED, stages) for stages in ((), *STAGES)]


def truth(noise: float = 0.0) -> list[Observation]:
    """Return networks that cost what a known table says, a little off."""
    curve = np.array([0.02, 0.04, 0.07, 0.1, 0.14])
    extras = np.zeros(len(EXTRAS))
    extras[:3] = 0.2, 0.02, 0.0004
    rng = np.random.default_rng(0)
    exact = [features(plan, TOKENS) @ np.concatenate([curve, extras]) for plan in PLANS]
    return [
        Observation([p], float(ms * (1 + noise * rng.standard_normal()))) for p, ms in zip(PLANS, exact, strict=True)
    ]


def test_table_predicts_networks_it_has_not_seen() -> None:
    seen = truth()
    table = LatencyTable.fitted(seen[:30], TOKENS)
    for o in seen[30:]:
        assert table.predict(o.plans) == pytest.approx(o.ms, rel=0.02)
    assert max(map(abs, table.errors)) < 0.05


def test_prediction_is_the_sum_of_its_parts() -> None:
    table = LatencyTable(TOKENS, (1.0, 2.0, 4.0, 6.0, 8.0), (10.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0))
    dense = PLANS[0]  # five whole blocks and the last one, which computes the classifier's row only
    assert table.predict([dense]) == pytest.approx(10 + 5 * 8)
    assert table.block(25) == pytest.approx(3.0)
    assert table.predict([dense, dense]) == table.predict([dense])


def test_curve_never_falls_although_measurements_do() -> None:
    seen = truth(noise=0.1)
    table = LatencyTable.fitted(seen, TOKENS)
    assert list(table.block_ms) == sorted(table.block_ms)
    assert min(*table.block_ms, *table.extras_ms) >= 0


def test_fewer_tokens_are_never_slower() -> None:
    table = LatencyTable.fitted(truth(noise=0.05), TOKENS)
    rates = [f"1:{r},3:{r}" for r in (0.3, 0.5, 0.7, 0.9)]
    from edgeprune.pruning.base import parse_stages

    times = [
        table.predict(
            [plan_of(RESOLVED, RESOLVED.method.stages(RESOLVED.config, parse_stages(r, 1.0), RESOLVED.options))]
        )
        for r in rates
    ]
    assert times == sorted(times)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan")])
def test_times_that_are_none(ms: float) -> None:
    with pytest.raises(InputError) as caught:
        LatencyTable.fitted([Observation([p], ms) for p in PLANS[:5]], TOKENS)
    assert caught.value.code == "latency-table"


def test_non_negative_least_squares() -> None:
    matrix = np.random.default_rng(1).standard_normal((30, 6))
    known = np.array([1.0, 0.0, 2.0, 0.0, 0.5, 0.0])
    assert np.allclose(non_negative(matrix, matrix @ known), known)
    x = non_negative(matrix, matrix @ np.array([1.0, -2, 1, -1, 1, -3]))
    gradient = matrix.T @ (matrix @ np.array([1.0, -2, 1, -1, 1, -3]) - matrix @ x)
    assert (x >= 0).all() and (gradient[x == 0] <= 1e-8).all() and np.allclose(gradient[x > 0], 0, atol=1e-8)


def test_one_network_measured_while_the_machine_was_busy() -> None:
    seen = truth(noise=0.01)
    exact = LatencyTable.fitted(truth(), TOKENS)
    seen[20] = Observation(seen[20].plans, 1.5 * seen[20].ms)
    table = LatencyTable.fitted(seen, TOKENS)
    for plan in PLANS[:10]:
        assert table.predict([plan]) == pytest.approx(exact.predict([plan]), rel=0.03)
