"""SaiT: one cut by value, mass or rank of the attention, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.base import Where
from edgeprune.pruning.model import PrunedViT
from tests.helpers import reference_pruning
from tests.helpers.lowering import random_model, small, stages_of
from tests.helpers.pruned import (
    VARIANTS,
    assert_follows,
    assert_independent,
    assert_missing_image_harms_no_other,
    assert_overflow_is_counted,
    counts_of,
    images_of,
    kept_sets,
    run,
    uniform_attention,
)


def model_of(
    select: str = "mass", amount: str = "0.7", keep_rate: float = 1.0, tis: str = "cls", seed: int = 0, **fields: Any
) -> PrunedViT:
    config = small(**fields)
    options = {"select": select, "tis": tis}
    options |= {} if select == "topk" else {select: amount}
    return random_model(config, stages_of(config, "sait", keep_rate, "1", **options), seed)


def dense_of(model: PrunedViT) -> PrunedViT:
    dense = PrunedViT(model.config).eval()
    dense.load_state_dict(model.state_dict())
    return dense


# ------------------------------------------------------------------------------------------------ formulas


def test_one_stage_stands_in_front_of_the_second_quarter() -> None:
    (stage,) = stages_of(get_model_config("deit_small_patch16_224"), "sait", 1.0)
    assert (stage.block, stage.where) == (3, Where.PRE_BLOCK)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("tis", ["cls", "colmean"])
@pytest.mark.parametrize(("select", "amount"), [("mass", 0.7), ("value", 0.9)])
def test_sait_follows_the_formulas(fields: dict[str, Any], tis: str, select: str, amount: float) -> None:
    model = model_of(select, str(amount), tis=tis, **fields)
    weights = model.state_dict()
    assert_follows(model, lambda i: reference_pruning.sait(model.config, weights, i, 1, select, amount, tis))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("tis", ["cls", "colmean"])
def test_topk_follows_the_formulas(fields: dict[str, Any], tis: str) -> None:
    model = model_of("topk", keep_rate=0.5, tis=tis, **fields)
    K, weights = model.config.num_patches // 2, model.state_dict()
    assert_follows(model, lambda i: reference_pruning.sait(model.config, weights, i, 1, "topk", K, tis))


def test_mass_is_nine_tenths_unless_said() -> None:
    config = small()
    model = random_model(config, stages_of(config, "sait", 1.0, "1"))
    weights = model.state_dict()
    assert_follows(model, lambda i: reference_pruning.sait(config, weights, i, 1, "mass", 0.9))


def test_counts_differ_between_images() -> None:
    model = model_of()
    assert len({c[0] for c in counts_of(run(model, images_of(model, 8)))}) > 1


@pytest.mark.parametrize("select", ["mass", "value", "topk"])
def test_weights_are_those_of_the_dense_model(select: str) -> None:
    assert not [k for k in model_of(select, keep_rate=0.5).state_dict() if k.startswith("prune.")]


def test_first_block_has_no_scores_before_it() -> None:
    with pytest.raises(InputError) as caught:
        stages_of(small(), "sait", 1.0, "0")
    assert caught.value.code == "stages"


# ------------------------------------------------------------------------------------------------ corner cases


def test_model_without_stages_is_dense_to_the_bit() -> None:
    model = model_of()
    images = images_of(model, 2)
    expected = run(dense_of(model), images).logits
    model.stages = ()
    assert torch.equal(run(model, images).logits, expected)


@pytest.mark.parametrize(("select", "amount"), [("mass", "1"), ("mass", "1.5"), ("value", "0")])
def test_dense_run_gives_the_dense_logits(select: str, amount: str) -> None:
    model = model_of(select, amount)
    images = images_of(model, 2)
    out = run(model, images)
    torch.testing.assert_close(out.logits, run(dense_of(model), images).logits, rtol=0, atol=2e-6)
    assert all(kept == set(range(16)) for image in kept_sets(out) for kept in image)


@pytest.mark.parametrize(("select", "amount"), [("mass", "0.000001"), ("value", "16")])
def test_one_token_stays_at_least(select: str, amount: str) -> None:
    model = model_of(select, amount)
    out = run(model, images_of(model, 3))
    assert counts_of(out) == [[1]] * 3
    assert kept_sets(out) == [[{int(s.argmax())}] for s in out.scores[0]]


def test_mass_of_uniform_scores_is_shared_equally() -> None:
    model = uniform_attention(model_of("mass", "0.53"))  # eight sixteenths are too few
    out = run(model, images_of(model, 2))
    assert counts_of(out) == [[9]] * 2
    assert kept_sets(out) == [[set(range(9))]] * 2


@pytest.mark.parametrize(("value", "count"), [("0.9", 16), ("1.1", 1)])
def test_uniform_scores_are_all_above_or_all_below_a_value(value: str, count: int) -> None:
    model = uniform_attention(model_of("value", value))
    assert counts_of(run(model, images_of(model, 2))) == [[count]] * 2


def test_ties_go_to_the_first_tokens() -> None:
    model = uniform_attention(model_of("topk", keep_rate=0.5))
    assert kept_sets(run(model, images_of(model, 2))) == [[set(range(8))]] * 2


def test_share_of_the_prefix_is_left_out() -> None:
    """With five uniform prefix tokens the patches still share a mass of one."""
    model = uniform_attention(model_of("mass", "0.53", reg_tokens=4))
    assert counts_of(run(model, images_of(model, 1))) == [[9]]


@pytest.mark.parametrize("select", ["mass", "value"])
def test_missing_image_harms_no_other(select: str) -> None:
    assert_missing_image_harms_no_other(model_of(select))


# ------------------------------------------------------------------------------------------------ slots and batches


@pytest.mark.parametrize(("select", "amount"), [("mass", 0.75), ("value", 0.9)])
def test_too_few_slots_hold_the_best_and_raise_the_flag(select: str, amount: float) -> None:
    model = model_of(select, str(amount), keep_rate=0.375)
    weights = model.state_dict()
    out = assert_follows(
        model, lambda i: reference_pruning.sait(model.config, weights, i, 1, select, amount, slots=6), batch=12
    )
    assert_overflow_is_counted(model, out)
    assert out.overflow.unique().tolist() == [False, True]


def test_topk_never_overflows() -> None:
    model = model_of("topk", keep_rate=0.25)
    out = run(model, images_of(model, 3))
    assert counts_of(out) == [[4]] * 3
    assert not out.overflow.any()


@settings(max_examples=6)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 5),
    rule=st.sampled_from([("mass", "0.6"), ("mass", "0.9"), ("value", "0.8")]),
    tis=st.sampled_from(["cls", "colmean"]),
    rate=st.sampled_from([1.0, 0.5]),
    prefix=st.sampled_from([{}, {"distilled": True}, {"reg_tokens": 4}]),
    seed=st.integers(0, 99),
)
def test_image_alone_is_the_image_in_a_batch(
    rows: int, columns: int, rule: tuple[str, str], tis: str, rate: float, prefix: dict[str, Any], seed: int
) -> None:
    size = (8 * rows, 8 * columns)
    assert_independent(model_of(*rule, rate, tis, seed, image_size=size, **prefix), seed)
