from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgeprune.errors import InputError
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import Reducer, Where, parse_stages, quarter_blocks
from tests.helpers.lowering import small, stages_of

DEIT = get_model_config("deit_small_patch16_224")


@dataclass(frozen=True)
class Place:
    """What a table of the specification says of one stage."""

    block: int
    tokens_in: int
    kept: int
    fused: int = 0


def places(method: str, keep_rate: float = 0.7, text: str | None = None, **options: object) -> list[Place]:
    stages = stages_of(DEIT, method, keep_rate, text, **options)
    return [Place(s.block, s.counts.tokens_in, s.counts.kept, s.counts.fused) for s in stages]


def test_dynamicvit_prunes_in_front_of_blocks_3_6_9() -> None:
    assert places("dynamicvit") == [Place(3, 196, 137), Place(6, 137, 96), Place(9, 96, 67)]
    assert {s.where for s in stages_of(DEIT, "dynamicvit")} == {Where.PRE_BLOCK}


def test_evit_prunes_inside_blocks_3_6_9() -> None:
    assert places("evit") == [Place(3, 196, 138, 1), Place(6, 139, 98, 1), Place(9, 99, 70, 1)]
    assert {s.where for s in stages_of(DEIT, "evit")} == {Where.MID_BLOCK}
    assert {s.reducer for s in stages_of(DEIT, "evit")} == {Reducer.FUSE}


def test_evit_without_fusing_drops() -> None:
    assert places("evit", fuse="false") == [Place(3, 196, 138), Place(6, 138, 97), Place(9, 97, 68)]
    assert {s.reducer for s in stages_of(DEIT, "evit", fuse="false")} == {Reducer.DROP}


def test_random_has_the_counts_of_dynamicvit() -> None:
    assert places("random") == places("dynamicvit")


@pytest.mark.parametrize("method", ["dense", "dynamicvit", "evit", "random"])
def test_keep_rate_one_is_the_dense_model(method: str) -> None:
    assert stages_of(DEIT, method, 1.0) == ()


@pytest.mark.parametrize("method", ["cropr", "tome"])
def test_keep_rate_is_refused_where_options_say_how_many_go(method: str) -> None:
    for rate, text in ((0.7, None), (1.0, "3:0.5")):
        with pytest.raises(InputError) as caught:
            stages_of(DEIT, method, rate, text)
        assert caught.value.code == "keep-rate"


@pytest.mark.parametrize("method", METHODS)
def test_bad_keep_rate_is_refused_by_every_method(method: str) -> None:
    with pytest.raises(InputError) as caught:
        stages_of(DEIT, method, 1.5)
    assert caught.value.code == "keep-rate"


def test_stages_move_with_their_blocks() -> None:
    assert places("dynamicvit", 0.5, "0,11") == [Place(0, 196, 98), Place(11, 98, 49)]


def test_stages_may_have_rates_of_their_own() -> None:
    assert places("dynamicvit", 1.0, "2:0.7,4:0.5") == [Place(2, 196, 137), Place(4, 137, 98)]
    assert places("evit", 1.0, "2:0.5,4:0.5", fuse="false") == [Place(2, 196, 98), Place(4, 98, 49)]


def test_stage_that_keeps_all_is_left_out_and_keeps_its_number() -> None:
    stages = stages_of(DEIT, "dynamicvit", 1.0, "3:0.7,6:1.0,9:0.35")
    assert [(s.block, s.index) for s in stages] == [(3, 0), (9, 2)]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (3, 6, 9)), (16, (4, 8, 12)), (20, (5, 10, 15)), (4, (1, 2, 3)), (2, (1,)), (1, ())]
)
def test_default_places_divide_the_depth(depth: int, blocks: tuple[int, ...]) -> None:
    assert quarter_blocks(depth) == blocks


@pytest.mark.parametrize("text", ["12", "-1", "6,3", "3,3", "3,6,99"])
def test_places_outside_the_model_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        stages_of(DEIT, "dynamicvit", 0.7, text)
    assert caught.value.code == "stages"
    assert "0 to 11" in str(caught.value.expected)


@pytest.mark.parametrize("text", ["", "three", "3;6", "3:0.7:1", "3:0.7,6", "3,6:0.5", "3:x", "3.5"])
def test_unreadable_stages_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_stages(text, 0.7)
    assert caught.value.code == "stages"
    assert "--stages" in caught.value.message


@pytest.mark.parametrize("text", ["3:0", "3:1.5", "3:nan", "3:-0.1"])
def test_rate_of_a_stage_is_checked(text: str) -> None:
    with pytest.raises(InputError) as caught:
        stages_of(DEIT, "evit", 1.0, text)
    assert caught.value.code == "keep-rate"


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        get_method("dynamicvitt")
    assert caught.value.code == "method-unknown"
    assert "dynamicvit" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("YES", True), ("1", True), ("false", False), ("0", False)]
)
def test_bool_option_reads_words(text: str, value: bool) -> None:
    assert get_method("evit").parse_options({"fuse": text}) == {"fuse": value}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("evit", {"fuse": "perhaps"}), ("evit", {"glue": "1"}), ("random", {"seed": "x"}), ("dense", {"fuse": "true"})],
)
def test_bad_option_is_refused(method: str, settings: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        get_method(method).parse_options(settings)
    assert caught.value.code == "method-option"
    assert next(iter(settings)) in caught.value.message
    assert caught.value.expected


def test_options_have_defaults() -> None:
    assert get_method("evit").parse_options({}) == {"fuse": True}
    assert get_method("random").parse_options({"seed": "4"}) == {"seed": 4}


def test_evit_refuses_a_model_without_class_token() -> None:
    with pytest.raises(InputError) as caught:
        stages_of(small(class_token=False, global_pool="avg"), "evit")
    assert caught.value.code == "model-config"
