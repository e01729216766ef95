from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pruning.counts import (
    DYNAMICVIT_RULE,
    EVIT_RULE,
    CountRule,
    StageCounts,
    check_keep_rate,
    resolve_counts,
)

RATES = st.floats(min_value=1e-3, max_value=1.0)
PATCHES = st.integers(min_value=1, max_value=1024)


def counts_of(rule: CountRule, patches: int, rate: float, stages: int = 3, *, fuse: bool = False) -> list[StageCounts]:
    return list(resolve_counts(rule, patches, rule.stage_rates(rate, stages), fuse=fuse))


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (0.7, [137, 96, 67]),
        (0.9, [176, 158, 142]),
        (0.8, [156, 125, 100]),
        (0.6, [117, 70, 42]),
        (0.5, [98, 49, 24]),
    ],
)
def test_dynamicvit_counts_are_those_of_the_official_code(rate: float, kept: list[int]) -> None:
    assert [c.kept for c in counts_of(DYNAMICVIT_RULE, 196, rate)] == kept


def test_evit_fused_counts_are_those_of_the_official_code() -> None:
    counts = counts_of(EVIT_RULE, 196, 0.7, fuse=True)
    assert [1 + c.tokens_out for c in counts] == [140, 100, 72]  # with CLS
    assert [c.fused for c in counts] == [1, 1, 1]
    assert [c.tokens_in for c in counts] == [196, 139, 99]  # the fused token counts as a token of the next stage


def test_evit_unfused_counts_round_up_the_current_number() -> None:
    assert [c.kept for c in counts_of(EVIT_RULE, 196, 0.7)] == [138, 97, 68]


def test_initial_base_is_unmoved_by_earlier_stages() -> None:
    counts = resolve_counts(DYNAMICVIT_RULE, 100, (0.5, 0.4, 0.2))
    assert [(c.tokens_in, c.kept) for c in counts] == [(100, 50), (50, 40), (40, 20)]


def test_current_base_multiplies_what_is_left() -> None:
    counts = resolve_counts(EVIT_RULE, 100, (0.5, 0.4, 0.2))
    assert [(c.tokens_in, c.kept) for c in counts] == [(100, 50), (50, 20), (20, 4)]


def test_stage_never_keeps_more_than_reach_it() -> None:
    counts = resolve_counts(DYNAMICVIT_RULE, 100, (0.5, 0.9))
    assert counts[1] == StageCounts(tokens_in=50, kept=50)


def test_floor_and_ceil_follow_float64() -> None:
    down, up = (CountRule("initial", rounding, cumulative=False) for rounding in ("floor", "ceil"))
    rate = 0.7 - 0.2  # 0.49999999999999994: the product with 196 is just below 98
    assert resolve_counts(down, 196, (rate,))[0].kept == 97
    assert resolve_counts(up, 196, (rate,))[0].kept == 98


def test_rate_one_keeps_all_and_fuses_nothing() -> None:
    for rule in (DYNAMICVIT_RULE, EVIT_RULE):
        assert counts_of(rule, 49, 1.0, fuse=True) == [StageCounts(49, 49, 0)] * 3


def test_single_token_survives_every_rounding_up() -> None:
    assert [c.kept for c in counts_of(EVIT_RULE, 1, 0.01, fuse=True)] == [1, 1, 1]


def test_one_kept_token_is_the_smallest_count() -> None:
    assert resolve_counts(DYNAMICVIT_RULE, 16, (1 / 16,))[0].kept == 1


def test_stage_without_a_token_is_refused_with_the_least_rate() -> None:
    with pytest.raises(InputError) as caught:
        counts_of(DYNAMICVIT_RULE, 64, 0.2)  # 64 * 0.2**3 is 0.51
    error = caught.value
    assert error.code == "keep-rate"
    assert "stage 2" in error.message and "0.51" in error.message
    assert "0.0156" in str(error.hint)
    assert error.details["tokens_in"] == 2


@pytest.mark.parametrize("rate", [0, -0.5, 1.0001, 1.5, 9, math.nan, math.inf, -math.inf, "0.7", None])
def test_rate_out_of_range_is_refused(rate: object) -> None:
    with pytest.raises(InputError) as caught:
        check_keep_rate(rate)
    assert caught.value.code == "keep-rate"
    assert str(rate) in caught.value.message
    assert caught.value.expected


def test_percentage_is_recognised() -> None:
    with pytest.raises(InputError) as caught:
        check_keep_rate(70)
    assert "0.7" in str(caught.value.hint)


@pytest.mark.parametrize("rate", [0, 1.5, math.nan])
def test_bad_rate_of_one_stage_names_the_stage(rate: float) -> None:
    with pytest.raises(InputError, match="stage 1"):
        resolve_counts(EVIT_RULE, 196, (0.7, rate))


def test_cumulative_rates_are_powers() -> None:
    assert DYNAMICVIT_RULE.stage_rates(0.7, 3) == (0.7, 0.7**2, 0.7**3)
    assert EVIT_RULE.stage_rates(0.7, 3) == (0.7, 0.7, 0.7)


@given(patches=PATCHES, rate=RATES, stages=st.integers(1, 5), fuse=st.booleans())
def test_evit_counts_hold_their_invariants(patches: int, rate: float, stages: int, fuse: bool) -> None:
    current = patches
    for c in counts_of(EVIT_RULE, patches, rate, stages, fuse=fuse):
        assert c.tokens_in == current
        assert c.kept == min(math.ceil(rate * current), current) >= 1
        assert c.fused == (fuse and c.kept < c.tokens_in)
        assert c.tokens_out == c.kept + c.fused <= c.tokens_in
        current = c.tokens_out


@given(patches=PATCHES, rate=RATES, stages=st.integers(1, 5))
def test_dynamicvit_counts_are_the_floor_or_refused(patches: int, rate: float, stages: int) -> None:
    wanted = [math.floor(patches * rate ** (s + 1)) for s in range(stages)]
    if min(wanted) < 1:
        with pytest.raises(InputError):
            counts_of(DYNAMICVIT_RULE, patches, rate, stages)
        return
    counts = counts_of(DYNAMICVIT_RULE, patches, rate, stages)
    assert [c.kept for c in counts] == wanted
    assert all(c.kept <= c.tokens_in for c in counts)


@given(patches=PATCHES, rates=st.tuples(RATES, RATES), fuse=st.booleans())
def test_counts_grow_with_the_rate(patches: int, rates: tuple[float, float], fuse: bool) -> None:
    low, high = (counts_of(EVIT_RULE, patches, rate, fuse=fuse) for rate in sorted(rates))
    assert all(a.kept <= b.kept and a.tokens_out <= b.tokens_out for a, b in zip(low, high, strict=True))
