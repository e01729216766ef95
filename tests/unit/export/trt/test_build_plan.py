"""What is to be built, for every kind of bundle."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.errors import InputError
from edgeprune.export.trt.options import BuildOptions
from edgeprune.export.trt.plan import Role, batches_of, bucket_shares, plan_roles
from tests.helpers.trt_bundles import BUCKETS, SHARES, STAGES, bucket_manifest, described, engine_manifest, rest


def role(roles: tuple[Role, ...], name: str) -> Role:
    return next(one for one in roles if one.name == name)


def refused(code: str, *arguments: Any, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        plan_roles(*arguments, BuildOptions(**options))
    assert caught.value.code == code
    assert caught.value.expected
    return caught.value


@pytest.mark.parametrize(
    ("batch", "expected"),
    [((1, 1), (1,)), ((8, 8), (8,)), ((1, 8), (1, 2, 4, 8)), ((1, 6), (1, 2, 4, 6)), ((3, 5), (3, 4, 5))],
)
def test_batches_are_both_ends_and_powers_of_two(batch: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert batches_of(batch) == expected


def test_static_graph_has_one_profile_without_shapes() -> None:
    (only,) = plan_roles(engine_manifest({"model": described("model", 4)}, (4, 4)), BuildOptions())
    (plan,) = only.plans()
    assert (plan.source, plan.plugin) == ("model", False)
    assert [(p.graph, p.batch, p.slots, dict(p.shapes)) for p in plan.profiles] == [("model", 4, None, {})]


def test_open_batch_has_a_profile_per_batch() -> None:
    (only,) = plan_roles(engine_manifest({"model": described("model", -1)}, (1, 8)), BuildOptions())
    (plan,) = only.plans()
    assert [p.shapes["images"] for p in plan.profiles] == [(b, 3, 8, 8) for b in (1, 2, 4, 8)]


def test_asked_batches_replace_those_of_the_bundle() -> None:
    manifest = engine_manifest({"model": described("model", -1)}, (1, 8))
    (only,) = plan_roles(manifest, BuildOptions(batches=(8, 3)))
    assert [p.batch for p in next(only.plans()).profiles] == [3, 8]


@pytest.mark.parametrize("batches", [(16,), (1, 9)])
def test_batch_the_bundle_does_not_have_is_refused(batches: tuple[int, ...]) -> None:
    error = refused("batches", engine_manifest({"model": described("model", -1)}, (1, 8)), batches=batches)
    assert str(max(batches)) in error.message
    assert error.expected == "numbers from 1 to 8"
    assert error.hint is not None
    assert f"--batch 1:{max(batches)}" in error.hint


def variants() -> dict[str, Any]:
    return {
        "model": described("model", 1),
        "model_plugin": described("model_plugin", 1, variant_of="model", plugin=True),
        "dense": described("dense", 1),
    }


def test_both_forms_of_the_selection_are_candidates_of_one_role() -> None:
    roles = plan_roles(engine_manifest(variants(), selection="auto"), BuildOptions())
    assert [one.name for one in roles] == ["model", "dense"]
    (unit,) = role(roles, "model").ways["whole"]
    assert {form: plan.source for form, plan in unit.forms.items()} == {"native": "model", "plugin": "model_plugin"}
    assert unit.forms["plugin"].plugin
    assert [p.graph for p in unit.forms["plugin"].profiles] == ["model"]


@pytest.mark.parametrize(("selection", "source"), [("native", "model"), ("plugin", "model_plugin")])
def test_one_form_can_be_asked_for(selection: Any, source: str) -> None:
    roles = plan_roles(engine_manifest(variants(), selection="auto"), BuildOptions(selection=selection))
    assert [plan.source for plan in role(roles, "model").plans()] == [source]
    assert [plan.source for plan in role(roles, "dense").plans()] == ["dense"]


def test_form_the_bundle_lacks_is_refused() -> None:
    native = engine_manifest({"model": described("model", 1)})
    assert "no graph with plugin nodes" in refused("selection", native, selection="plugin").message
    plugin = engine_manifest({"model": described("model", 1, plugin=True)}, selection="plugin")
    assert "'model' only with plugin nodes" in refused("selection", plugin, selection="native").message


def test_buckets_are_a_stem_and_two_ways_of_rests() -> None:
    roles = plan_roles(bucket_manifest(), BuildOptions())
    assert [one.name for one in roles] == ["stem", "dense", "rest"]
    rests = role(roles, "rest")
    assert rests.needs == "stem"
    (told,) = rests.ways["profiles"]
    found = [(p.graph, p.slots, p.batch) for p in told.forms["native"].profiles]
    assert found == [(f"rest_{b[0]}", b, batch) for b in BUCKETS for batch in (1, 2)]
    assert told.forms["native"].profiles[0].shapes == {"tokens": (1, 17, 32), "token_count": (1,)}
    names = [f"rest_{b[0]}" for b in BUCKETS]
    assert [unit.forms["native"].source for unit in rests.ways["per-bucket"]] == names
    assert [p.slots for unit in rests.ways["per-bucket"] for p in unit.forms["native"].profiles] == [None] * 6


def test_rests_may_get_a_single_image_whatever_the_batch() -> None:
    roles = plan_roles(bucket_manifest((8, 8)), BuildOptions())
    assert {p.batch for plan in role(roles, "rest").plans() for p in plan.profiles} == {1, 2, 4, 8}
    assert {p.batch for plan in role(roles, "dense").plans() for p in plan.profiles} == {8}


@pytest.mark.parametrize("way", ["profiles", "per-bucket"])
def test_one_way_can_be_asked_for(way: Any) -> None:
    assert list(role(plan_roles(bucket_manifest(), BuildOptions(engines=way)), "rest").ways) == [way]


def test_way_the_bundle_lacks_is_refused() -> None:
    assert refused("engines", bucket_manifest(told=None), engines="profiles").expected == "auto or per-bucket"
    plain = engine_manifest({"model": described("model", 1)})
    assert "no buckets" in refused("engines", plain, engines="profiles").message


def test_variant_of_the_told_graph_is_a_form_of_it() -> None:
    extra = rest("rest_plugin", -1, told=True, variant_of="rest", plugin=True)
    rests = role(plan_roles(bucket_manifest(rest_plugin=extra), BuildOptions()), "rest")
    (told,) = rests.ways["profiles"]
    assert list(told.forms) == ["native", "plugin"]
    assert told.forms["plugin"].profiles == told.forms["native"].profiles


def test_densities_that_share_a_told_graph_are_its_profiles() -> None:
    graph = rest("model", 1, told=True)
    graph["outputs"] = graph["outputs"][:1]
    macs = {"dense": 1, "pruned": 1, "dense_executed": 1, "pruned_executed": 1}
    densities = [
        {
            "keep_rate": rate,
            "graph": "model",
            "stages": [{**STAGES[0], "kept": kept}, {**STAGES[1], "kept": kept}],
            "macs": macs,
        }
        for rate, kept in ((0.7, 11), (0.5, 8))
    ]
    (only,) = plan_roles(engine_manifest({"model": graph}, densities=densities), BuildOptions())
    assert [p.slots for p in next(only.plans()).profiles] == [(11, 11), (8, 8)]


def test_graphs_are_those_named() -> None:
    assert [r.name for r in plan_roles(bucket_manifest(), BuildOptions(graphs=("model",)))] == ["stem", "rest"]
    assert [r.name for r in plan_roles(bucket_manifest(), BuildOptions(graphs=("dense",)))] == ["dense"]
    roles = plan_roles(engine_manifest(variants(), selection="auto"), BuildOptions(graphs=("model", "dense")))
    assert [r.name for r in roles] == ["model", "dense"]


def test_unknown_graph_names_those_there_are() -> None:
    error = refused("graph-missing", bucket_manifest(), graphs=("models",))
    assert error.expected == "some of model, stem, dense, rest"


def test_graph_of_which_more_is_open_is_refused() -> None:
    graph = described("model", -1)
    graph["inputs"][0]["shape"] = [-1, 3, -1, 8]
    error = refused("graph-dynamic", engine_manifest({"model": graph}, (1, 2)))
    assert "'images'" in error.message


def test_shares_are_by_graph_and_slots() -> None:
    shares = bucket_shares(bucket_manifest())
    assert [shares[f"rest_{b[0]}", b] for b in BUCKETS] == list(SHARES)
    assert [shares[f"rest_{b[0]}", None] for b in BUCKETS] == list(SHARES)
    assert bucket_shares(engine_manifest({"model": described("model", 1)})) == {}


def test_unknown_shares_are_equal() -> None:
    manifest = bucket_manifest()
    assert manifest.adaptive is not None
    buckets = [bucket.model_copy(update={"share": None}) for bucket in manifest.adaptive.buckets]
    adaptive = manifest.adaptive.model_copy(update={"buckets": buckets})
    assert set(bucket_shares(manifest.model_copy(update={"adaptive": adaptive})).values()) == {1 / 3}


@pytest.mark.parametrize("name", ["../model", "a/b", ".hidden", ""])
def test_name_that_would_leave_the_folder_is_refused(name: str) -> None:
    graphs = {"model": described("model", 1), name: described("other", 1)}
    assert repr(name) in refused("bundle-invalid", engine_manifest(graphs)).message


def test_role_without_some_candidates_loses_incomplete_ways() -> None:
    rests = role(plan_roles(bucket_manifest(), BuildOptions()), "rest")
    assert list(rests.without(lambda plan: plan.source == "rest_12").ways) == ["profiles"]
    assert list(rests.without(lambda plan: plan.source == "rest").ways) == ["per-bucket"]
    assert rests.without(lambda plan: True).ways == {}
    model = role(plan_roles(engine_manifest(variants(), selection="auto"), BuildOptions()), "model")
    assert [plan.source for plan in model.without(lambda plan: plan.plugin).plans()] == ["model"]
