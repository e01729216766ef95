"""Adaptive sparse ViT: learned thresholds on head-weighted attention, against the formulas."""

from __future__ import annotations

from collections.abc import Sequence
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

THRESHOLDS = (0.03, 0.04, 0.05)  # about half of 16 tokens, then some more


def model_of(
    thresholds: Sequence[float] = THRESHOLDS,
    keep_rate: float = 1.0,
    text: str = "1,2,3",
    count: str = "image",
    seed: int = 0,
    **fields: Any,
) -> PrunedViT:
    config = small(**fields)
    model = random_model(config, stages_of(config, "asvit", keep_rate, text, count=count), seed)
    set_thresholds(model, thresholds)
    return model


def set_thresholds(model: PrunedViT, thresholds: Sequence[float]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for stage, threshold in zip(model.stages, thresholds, strict=True):
            parameters[f"prune.{stage.index}.keep_threshold"].fill_(threshold)


def blocks_of(model: PrunedViT) -> list[int]:
    return [s.block for s in model.stages]


# ------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(("depth", "blocks"), [(12, [4, 7, 10]), (16, [5, 9, 13]), (20, [6, 11, 16])])
def test_default_places_are_one_behind_the_quarters(depth: int, blocks: list[int]) -> None:
    stages = stages_of(get_model_config("deit_small_patch16_224", depth=depth), "asvit", 1.0)
    assert [s.block for s in stages] == blocks
    assert {s.where for s in stages} == {Where.PRE_BLOCK}


def test_slots_are_all_tokens_by_default() -> None:
    assert [s.counts.kept for s in stages_of(small(), "asvit", 1.0, "1,2,3")] == [16, 16, 16]


def test_rates_are_slots() -> None:
    assert [s.counts.kept for s in stages_of(small(), "asvit", 0.7, "1,2,3")] == [11, 7, 5]
    assert [s.counts.kept for s in stages_of(small(), "asvit", 1.0, "1:0.5,2:0.25")] == [8, 4]


def test_first_block_has_no_scores_before_it() -> None:
    with pytest.raises(InputError) as caught:
        stages_of(small(), "asvit", 1.0, "0,2")
    assert caught.value.code == "stages"


def test_each_stage_has_a_scalar_threshold() -> None:
    added = {k: v for k, v in model_of().state_dict().items() if k.startswith("prune.")}
    assert {k: v.shape for k, v in added.items()} == {f"prune.{s}.keep_threshold": torch.Size([]) for s in range(3)}


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_asvit_follows_the_formulas(fields: dict[str, Any]) -> None:
    model = model_of(**fields)
    weights = model.state_dict()
    assert_follows(model, lambda i: reference_pruning.asvit(model.config, weights, i, blocks_of(model)))


def test_asvit_with_few_slots_follows_the_formulas() -> None:
    model = model_of(keep_rate=0.7)
    slots = [s.counts.kept for s in model.stages]
    weights = model.state_dict()
    out = assert_follows(
        model, lambda i: reference_pruning.asvit(model.config, weights, i, blocks_of(model), slots), batch=6
    )
    assert out.overflow.tolist() != [False] * 6


def test_scores_are_those_of_the_previous_block() -> None:
    model = model_of(thresholds=[-1.0], text="2")
    images = images_of(model, 2)
    out = run(model, images)
    for b in range(2):
        state = reference_pruning.Image(model.config, model.state_dict(), images[b])
        for block in (0, 1):
            state.attend(block)
            state.add_mlp(block)
        expected = torch.tensor(list(reference_pruning.asvit_scores(state).values()))
        torch.testing.assert_close(out.scores[0][b], expected.float(), rtol=1e-4, atol=1e-7)


def test_uniform_attention_scores_one_over_all_tokens() -> None:
    model = uniform_attention(model_of(thresholds=[-1.0], text="1", reg_tokens=4))
    scores = run(model, images_of(model, 2)).scores[0]
    torch.testing.assert_close(scores, torch.full((2, 16), 1 / 21), rtol=1e-5, atol=0)


def test_counts_differ_between_images() -> None:
    model = model_of()
    assert len({tuple(c) for c in counts_of(run(model, images_of(model, 8)))}) > 2


# ------------------------------------------------------------------------------------------------ corner cases


@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 4}], ids=["CLS", "distilled", "registers"])
def test_none_kept_leaves_the_prefix(fields: dict[str, Any]) -> None:
    model = model_of(thresholds=[2.0] * 3, **fields)
    weights = model.state_dict()
    out = assert_follows(model, lambda i: reference_pruning.asvit(model.config, weights, i, blocks_of(model)))
    assert counts_of(out) == [[0, 0, 0]] * 3
    assert bool(out.logits.isfinite().all())


def test_one_kept_is_the_best() -> None:
    model = model_of(thresholds=[-1.0], text="1")
    images = images_of(model, 1)
    first, second = run(model, images).scores[0][0].topk(2).values.tolist()
    set_thresholds(model, [(first + second) / 2])
    out = run(model, images)
    assert kept_sets(out) == [[{int(out.scores[0][0].argmax())}]]
    assert counts_of(out) == [[1]]
    expected = reference_pruning.asvit(model.config, model.state_dict(), images[0], [1])
    torch.testing.assert_close(out.logits[0], expected.logits.float(), rtol=0, atol=1e-5)


def test_all_kept_is_the_dense_model() -> None:
    model = model_of(thresholds=[-1.0] * 3)
    dense = PrunedViT(model.config).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("prune.")})
    images = images_of(model, 2)
    out = run(model, images)
    torch.testing.assert_close(out.logits, run(dense, images).logits, rtol=0, atol=1e-5)
    assert counts_of(out) == [[16, 16, 16]] * 2


def test_score_at_the_threshold_is_dropped() -> None:
    model = model_of(thresholds=[-1.0], text="1")
    images = images_of(model, 1)
    scores = run(model, images).scores[0][0]
    middle = scores.sort().values[8]
    set_thresholds(model, [float(middle)])
    assert kept_sets(run(model, images)) == [[{i for i in range(16) if scores[i] > middle}]]


def test_ties_for_the_last_slot_go_to_the_first_tokens() -> None:
    model = uniform_attention(model_of(thresholds=[-1.0], keep_rate=0.5, text="1"), values=False)
    out = run(model, images_of(model, 2))
    assert kept_sets(out) == [[set(range(8))]] * 2
    assert counts_of(out) == [[16]] * 2


def test_missing_scores_are_above_no_threshold() -> None:
    model = model_of(thresholds=[-1.0] * 3)
    images = images_of(model, 2)
    images[1] = torch.nan
    assert counts_of(run(model, images))[1] == [0, 0, 0]


def test_missing_image_harms_no_other() -> None:
    assert_missing_image_harms_no_other(model_of())


# ------------------------------------------------------------------------------------------------ slots and batches


def test_too_few_slots_hold_the_best_and_raise_the_flag() -> None:
    model = model_of(thresholds=[0.045], keep_rate=0.4375, text="1")
    out = run(model, images_of(model, 8))
    assert_overflow_is_counted(model, out)
    assert out.overflow.unique().tolist() == [False, True]
    for b in range(8):
        scores = out.scores[0][b].tolist()
        kept = min(7, sum(s > 0.045 for s in scores))
        assert kept_sets(out)[b][0] == set(sorted(range(16), key=lambda i: -scores[i])[:kept])


def test_batch_mean_keeps_the_rounded_down_mean_of_the_counts() -> None:
    model = model_of(thresholds=[0.03], text="1", count="batch-mean")
    images = images_of(model, 3)
    out = run(model, images)
    own = [int((s > 0.03).sum()) for s in out.scores[0]]
    assert len(set(own)) > 1
    for b in range(3):
        best = out.scores[0][b].topk(sum(own) // 3).indices.tolist()
        assert kept_sets(out)[b][0] == set(best)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_batch_mean_follows_the_formulas(batch: int) -> None:
    model = model_of(count="batch-mean")
    images = images_of(model, batch)
    out = run(model, images)
    outcomes = reference_pruning.asvit_batch(model.config, model.state_dict(), list(images), blocks_of(model))
    assert kept_sets(out) == [[set(k) for k in o.kept] for o in outcomes]
    logits = torch.stack([o.logits for o in outcomes]).float()
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)


@settings(max_examples=6)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    level=st.sampled_from([0.4, 0.7, 1.0]),
    rate=st.sampled_from([1.0, 0.8]),
    prefix=st.sampled_from([{}, {"distilled": True}, {"reg_tokens": 4}]),
    seed=st.integers(0, 99),
)
def test_image_alone_is_the_image_in_a_batch(
    rows: int, columns: int, level: float, rate: float, prefix: dict[str, Any], seed: int
) -> None:
    """The threshold is a share of what uniform attention scores."""
    threshold = level / (rows * columns + 1)
    rate = rate if rows * columns > 2 else 1.0
    size = (8 * rows, 8 * columns)
    model = model_of([threshold] * 2, rate, "1,3", seed=seed, image_size=size, **prefix)
    assert_independent(model, seed)
