"""Which candidates are kept, from made-up times."""

from __future__ import annotations

import pytest

from edgeprune.export.trt.choose import LEAST_GAIN, choose, score
from edgeprune.export.trt.options import BuildOptions
from edgeprune.export.trt.plan import Role, bucket_shares, plan_roles
from tests.helpers.trt_bundles import BUCKETS, SHARES, bucket_manifest, described, engine_manifest

GRAPHS = {
    "model": described("model", -1),
    "model_plugin": described("model_plugin", -1, variant_of="model", plugin=True),
}


def of_forms() -> Role:
    (role,) = plan_roles(engine_manifest(GRAPHS, (1, 8)), BuildOptions(batches=(1, 8)))
    return role


def rests() -> Role:
    return plan_roles(bucket_manifest((1, 1)), BuildOptions())[-1]


@pytest.mark.parametrize(
    ("native", "plugin", "chosen"),
    [((1.0, 4.0), (0.9, 4.0), "plugin"), ((1.0, 4.0), (1.0, 4.0), "native"), ((1.0, 4.0), (2.0, 2.1), "native")],
)
def test_faster_form_is_kept(native: tuple[float, float], plugin: tuple[float, float], chosen: str) -> None:
    times = {
        (source, i): ms for source, both in (("model", native), ("model_plugin", plugin)) for i, ms in enumerate(both)
    }
    kept, (choice,) = choose(of_forms(), times, {})
    assert [plan.source for plan in kept] == ["model" if chosen == "native" else "model_plugin"]
    assert (choice.what, choice.graph, choice.chosen) == ("selection", "model", chosen)
    assert choice.median_ms["native"] == pytest.approx((native[0] * native[1]) ** 0.5)


def test_nothing_to_choose_is_no_choice() -> None:
    (role,) = plan_roles(engine_manifest({"model": described("model", 1)}), BuildOptions())
    assert choose(role, {("model", 0): 1.0}, {}) == (list(role.plans()), [])


@pytest.mark.parametrize(
    ("gain", "chosen"), [(1.0, "profiles"), (LEAST_GAIN - 0.005, "profiles"), (1.03, "per-bucket")]
)
def test_engines_per_bucket_must_be_clearly_faster(gain: float, chosen: str) -> None:
    times = {("rest", i): float(i + 1) for i in range(3)}
    times |= {(f"rest_{b[0]}", 0): (i + 1) / gain for i, b in enumerate(BUCKETS)}
    kept, (choice,) = choose(rests(), times, bucket_shares(bucket_manifest()))
    assert [plan.source for plan in kept] == (["rest"] if chosen == "profiles" else [f"rest_{b[0]}" for b in BUCKETS])
    assert (choice.what, choice.graph, choice.chosen) == ("engines", "rest", chosen)
    assert choice.median_ms["profiles"] == pytest.approx(sum(s * (i + 1) for i, s in enumerate(SHARES)))


def test_buckets_count_by_their_share() -> None:
    times = {("rest", i): 1.0 for i in range(3)}
    times |= {("rest_8", 0): 0.5, ("rest_12", 0): 1.0, ("rest_16", 0): 2.0}  # better where half of the images end
    _, (choice,) = choose(rests(), times, bucket_shares(bucket_manifest()))
    assert choice.chosen == "per-bucket"
    assert choice.median_ms == {"profiles": pytest.approx(1.0), "per-bucket": pytest.approx(0.95)}


def test_buckets_without_any_share_count_alike() -> None:
    plans = rests().ways["per-bucket"]
    times = {(f"rest_{b[0]}", 0): float(i) for i, b in enumerate(BUCKETS)}
    shares = dict.fromkeys(bucket_shares(bucket_manifest()), 0.0)
    assert score([unit.forms["native"] for unit in plans], times, shares) == pytest.approx(1.0)
