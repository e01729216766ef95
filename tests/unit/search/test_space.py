from __future__ import annotations

from random import Random
from typing import Any

import pytest

from edgeprune.errors import InputError
from edgeprune.export import ExportRequest
from edgeprune.pruning.base import parse_stages
from edgeprune.pruning.counts import DYNAMICVIT_RULE, EVIT_RULE
from edgeprune.search.request import SearchRequest, check_request, parse_latency
from edgeprune.search.space import make_space, rate_for

METHODS: dict[str, dict[str, Any]] = {
    "evit": {},
    "evit without fusion": {"method": "evit", "method_options": {"fuse": "false"}},
    "dynamicvit": {},
    "ats": {},
    "sait": {"method_options": {"select": "topk"}},
    "cropr": {},
    "tome": {},
}


def request(name: str, **fields: Any) -> SearchRequest:
    return SearchRequest(
        ExportRequest(**{"model": "vit_digits", "method": name, **METHODS.get(name, {}), **fields}), "digits"
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["vit_digits", "deit_tiny_patch16_224"])
def test_what_an_export_is_told_gives_back_the_candidate(name: str, model: str) -> None:
    resolved = check_request(request(name, model=model))
    space = make_space(resolved)
    candidates = [*space.uniform().values(), *space.designs(24, Random(0))]
    assert len(set(candidates)) > 20
    for candidate in candidates:
        told = space.schedule(candidate)
        options = {**resolved.options, **told.options}
        stages = resolved.method.stages(resolved.config, parse_stages(told.stages, 1.0), options)
        assert stages == space.stages(candidate)
        kept = dict(candidate.steps)
        assert candidate.settings or all(stage.counts.kept == kept[stage.block] for stage in stages)
        for near in space.neighbours(candidate):
            assert near != candidate
            space.stages(near)


@pytest.mark.parametrize("rate", [0.9, 0.7, 0.5])
def test_space_holds_the_uniform_schedules(rate: float) -> None:
    resolved = check_request(request("evit", stages="0,2,3"))
    space = make_space(resolved)
    own = resolved.method.stages(resolved.config, parse_stages("0,2,3", rate), resolved.options)
    assert space.stages(space.uniform()[f"keep rate {rate:g}"]) == own


def test_stages_with_weights_stay_where_they_were_trained() -> None:
    space = make_space(check_request(request("dynamicvit")))
    trained = {(stage.block, stage.index) for stage in space.stages(next(iter(space.uniform().values())))}
    for candidate in space.designs(30, Random(1)):
        assert {(stage.block, stage.index) for stage in space.stages(candidate)} <= trained


def test_fixed_places() -> None:
    space = make_space(check_request(request("evit", stages="0,2,3")), fixed=True)
    assert space.places == (0, 2, 3)
    assert {b for c in space.designs(30, Random(0)) for b, _ in c.steps} <= {0, 2, 3}


@pytest.mark.parametrize("rule", [DYNAMICVIT_RULE, EVIT_RULE])
def test_a_rate_for_every_count(rule: Any) -> None:
    import math

    turn = math.floor if rule.rounding == "floor" else math.ceil
    for base in (25, 64, 196, 577):
        for kept in range(1, base):
            assert turn(float(f"{rate_for(rule, kept, base, base):g}") * base) == kept


@pytest.mark.parametrize(
    ("method", "options", "word"),
    [("dense", {}, "prunes nothing"), ("asvit", {}, "image decides"), ("sait", {}, "image decides")],
)
def test_methods_that_cannot_be_searched(method: str, options: dict[str, str], word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        check_request(SearchRequest(ExportRequest(model="vit_digits", method=method, method_options=options), "digits"))
    assert caught.value.code == "search-method"


def test_target_elsewhere() -> None:
    with pytest.raises(InputError) as caught:
        check_request(request("evit", target="trt-fp16"))
    assert caught.value.code == "search-target"


def test_stages_with_rates() -> None:
    with pytest.raises(InputError) as caught:
        make_space(check_request(request("evit", stages="1:0.5")))
    assert caught.value.code == "stages"


@pytest.mark.parametrize(("text", "ms"), [("8ms", 8), ("800us", 0.8), ("0.5s", 500), (" 1.5 ms ", 1.5), ("1e3us", 1)])
def test_latency_with_unit(text: str, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["8", "0ms", "-3ms", "fast", "8 min", "", "ms", "nanms", "infs", "1e999ms"])
def test_latency_that_is_none(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_latency(text)
    assert caught.value.code == "latency-budget"
