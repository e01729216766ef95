"""Adaptive token sampling, released and as in the paper, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.models.registry import get_model_config
from edgeprune.pruning.base import Stage, Where
from edgeprune.pruning.model import PrunedViT
from tests.helpers import reference_pruning
from tests.helpers.lowering import random_model, small, stages_of
from tests.helpers.pruned import (
    VARIANTS,
    assert_follows,
    assert_independent,
    assert_missing_image_harms_no_other,
    chosen,
    counts_of,
    images_of,
    kept_sets,
    run,
    uniform_attention,
)

WORKED = [0.05, 0.1, 0.15, 0.3, 0.4]  # stretched CDF 0, .1053, .2632, .5789, 1


def model_of(variant: str, keep_rate: float = 1.0, text: str = "1,2,3", seed: int = 0, **fields: Any) -> PrunedViT:
    config = small(**fields)
    return random_model(config, stages_of(config, "ats", keep_rate, text, variant=variant), seed)


def sampler(variant: str, tokens: int, keep_rate: float) -> Stage:
    """Return the only stage of a model with so many patches."""
    config = small(image_size=(8 * tokens, 8))
    (stage,) = stages_of(config, "ats", keep_rate, "1", variant=variant)
    return stage


def points_of(model: PrunedViT, variant: str, keep_rate: float) -> dict[int, int]:
    N = model.config.num_patches
    rates = [keep_rate if variant == "official" else keep_rate**power for power in (1, 2, 3)]
    return {stage.block: int(N * rate) for stage, rate in zip(model.stages, rates, strict=True)}


# ------------------------------------------------------------------------------------------------ schedule


def test_official_samples_in_the_last_three_quarters_of_the_blocks() -> None:
    stages = stages_of(get_model_config("deit_small_patch16_224"), "ats", 1.0, variant="official")
    assert [s.block for s in stages] == list(range(3, 12))
    assert {s.where for s in stages} == {Where.MID_BLOCK}


def test_paper_samples_in_three_blocks() -> None:
    stages = stages_of(get_model_config("deit_small_patch16_224"), "ats", 0.7, variant="paper")
    assert [s.block for s in stages] == [3, 6, 9]
    assert {s.where for s in stages} == {Where.MID_BLOCK}


def test_paper_has_as_many_slots_as_points() -> None:
    stages = stages_of(get_model_config("deit_small_patch16_224"), "ats", 0.7, variant="paper")
    assert [s.counts.kept for s in stages] == [137, 96, 67]


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("variant", "rate"), [("official", 1.0), ("official", 0.6), ("paper", 1.0), ("paper", 0.7)])
def test_ats_follows_the_formulas(fields: dict[str, Any], variant: str, rate: float) -> None:
    model = model_of(variant, rate, **fields)
    points, weights = points_of(model, variant, rate), model.state_dict()
    assert_follows(model, lambda i: reference_pruning.ats(model.config, weights, i, points, variant))


def test_ats_counts_differ_between_images() -> None:
    model = model_of("official")
    assert len({tuple(c) for c in counts_of(run(model, images_of(model, 8)))}) > 2


@pytest.mark.parametrize(("rate", "kept"), [(1.0, {1, 2, 3, 4}), (0.6, {1, 3, 4})])
def test_official_sampler_gives_the_worked_example(rate: float, kept: set[int]) -> None:
    assert chosen(sampler("official", 5, rate), WORKED) == kept


def test_official_sampler_ranks_before_it_samples() -> None:
    assert chosen(sampler("official", 5, 0.6), [0.4, 0.3, 0.05, 0.1, 0.15]) == {0, 1, 3}


@pytest.mark.parametrize(("rate", "kept"), [(0.6, {1, 3, 4}), (0.4, {2, 3})])
def test_paper_sampler_gives_the_worked_example(rate: float, kept: set[int]) -> None:
    assert chosen(sampler("paper", 5, rate), WORKED) == kept


def test_paper_sampler_follows_token_order() -> None:
    assert chosen(sampler("paper", 5, 0.4), [0.4, 0.05, 0.3, 0.1, 0.15]) == {0, 2}


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_scale_of_the_scores_does_not_matter(variant: str) -> None:
    stage = sampler(variant, 5, 0.6)
    assert chosen(stage, WORKED) == chosen(stage, [8 * s for s in WORKED])


@settings(max_examples=30)
@given(
    scores=st.lists(st.floats(2**-7, 1, width=16), min_size=9, max_size=9, unique=True),
    valid=st.integers(2, 9),
    rubbish=st.sampled_from([0.0, 5.0, -3.0]),
)
@pytest.mark.parametrize(("variant", "choose"), [("official", "ats_official_choice"), ("paper", "ats_paper_choice")])
def test_empty_slots_do_not_count(variant: str, choose: str, scores: list[float], valid: int, rubbish: float) -> None:
    """Nine slots of which some are empty: the choice is that of the loop over the tokens alone."""
    expected = set(getattr(reference_pruning, choose)(scores[:valid], 9))
    padded = scores[:valid] + [rubbish] * (9 - valid)
    found = chosen(sampler(variant, 9, 1.0), padded, valid)
    if _far_from_a_tie(scores[:valid], variant):
        assert found == expected


def _far_from_a_tie(scores: list[float], variant: str) -> bool:
    """No sample point stands in the middle between two entries, where rounding decides."""
    total = sum(scores)
    ordered = sorted(scores) if variant == "official" else scores
    cdf = [sum(ordered[: i + 1]) / total for i in range(len(ordered))]
    if variant == "official":
        cdf = [(c - cdf[0]) / (cdf[-1] - cdf[0]) for c in cdf]
        ys = [cdf[1] + t / 8 * (1 - cdf[1]) for t in range(9)]
    else:
        ys = [(2 * i - 1) / 18 for i in range(1, 10)]
    nearest = [sorted(abs(y - c) for c in cdf)[:2] for y in ys]
    return all(second - first > 1e-5 for first, second in nearest)


# ------------------------------------------------------------------------------------------------ corner cases


def test_uniform_scores_lose_one_token_in_every_block() -> None:
    model = uniform_attention(model_of("official"))
    out = run(model, images_of(model, 2))
    assert counts_of(out) == [[15, 14, 13]] * 2


@pytest.mark.parametrize("tokens", [2, 5, 16])
def test_uniform_scores_drop_exactly_one(tokens: int) -> None:
    assert len(chosen(sampler("official", tokens, 1.0), [1 / tokens] * tokens)) == tokens - 1


@settings(max_examples=30)
@given(st.lists(st.floats(2**-7, 1, width=16), min_size=8, max_size=8, unique=True))
def test_lowest_token_is_never_sampled(scores: list[float]) -> None:
    kept = chosen(sampler("official", 8, 1.0), scores)
    assert scores.index(min(scores)) not in kept
    assert scores.index(max(scores)) in kept


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_single_token_stays(variant: str) -> None:
    assert chosen(sampler(variant, 4, 1.0), [0.3, 0.0, 0.0, 0.0], valid=1) == {0}


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_single_patch_survives_every_stage(variant: str) -> None:
    model = model_of(variant, image_size=(8, 8))
    out = run(model, images_of(model, 2))
    assert all(kept == {0} for image in kept_sets(out) for kept in image)
    assert bool(out.logits.isfinite().all())


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("scores", [[0.0] * 4, [float("nan")] * 4], ids=["zero", "NaN"])
def test_scores_without_mass_keep_all(variant: str, scores: list[float]) -> None:
    assert chosen(sampler(variant, 4, 1.0), scores) == {0, 1, 2, 3}


def test_one_score_of_all_the_mass_keeps_that_token() -> None:
    assert chosen(sampler("official", 4, 1.0), [0.0, 0.0, 1.0, 0.0]) == {2}


def test_equal_entries_are_sampled_once() -> None:
    """Zeros in token order repeat a CDF entry: the first of equals is taken."""
    assert chosen(sampler("paper", 4, 1.0), [0.5, 0.0, 0.0, 0.5]) == {0, 3}


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_missing_image_harms_no_other(variant: str) -> None:
    assert_missing_image_harms_no_other(model_of(variant))


def test_ats_refuses_a_model_without_class_token() -> None:
    from edgeprune.errors import InputError

    with pytest.raises(InputError) as caught:
        stages_of(small(class_token=False, global_pool="avg"), "ats", 1.0)
    assert caught.value.code == "model-config"


# ------------------------------------------------------------------------------------------------ slots and batches


@pytest.mark.parametrize(("variant", "rate"), [("official", 0.5), ("paper", 0.5)])
def test_points_never_exceed_the_slots(variant: str, rate: float) -> None:
    model = model_of(variant, rate)
    assert not run(model, images_of(model, 8)).overflow.any()


def test_weights_are_those_of_the_dense_model() -> None:
    model = model_of("official")
    assert not [k for k in model.state_dict() if k.startswith("prune.")]


@settings(max_examples=6)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 5),
    variant=st.sampled_from(["official", "paper"]),
    rate=st.sampled_from([1.0, 0.8]),
    prefix=st.sampled_from([{}, {"distilled": True}, {"reg_tokens": 4}]),
    seed=st.integers(0, 99),
)
def test_image_alone_is_the_image_in_a_batch(
    rows: int, columns: int, variant: str, rate: float, prefix: dict[str, Any], seed: int
) -> None:
    text = "1,3" if variant == "official" or rows * columns > 2 else "1"
    assert_independent(model_of(variant, rate, text, seed, image_size=(8 * rows, 8 * columns), **prefix), seed)


def test_values_are_measured_over_all_heads_as_released() -> None:
    """Released: length over all heads times summed attention; paper: head by head. The same weights, other scores."""
    official, paper = model_of("official", 1.0, "1"), model_of("paper", 1.0, "1")
    paper.load_state_dict(official.state_dict())
    images = images_of(official, 2)
    a, b = run(official, images).scores[0], run(paper, images).scores[0]
    assert not torch.allclose(a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True), atol=1e-4)
