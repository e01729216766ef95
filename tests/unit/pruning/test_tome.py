"""Token merging against the formulas."""

from __future__ import annotations

import itertools
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
from tests.helpers.pruned import VARIANTS, assert_follows, assert_independent, counts_of, images_of, kept_sets, run

DEIT = get_model_config("deit_small_patch16_224")


def model_of(r: int = 3, schedule: str = "constant", prop_attn: bool = True, seed: int = 0, **fields: Any) -> PrunedViT:
    config = small(**fields)
    options = {"r": str(r), "schedule": schedule, "prop_attn": str(prop_attn).lower()}
    return random_model(config, stages_of(config, "tome", 1.0, **options), seed)


def merges(stages: tuple[Stage, ...], depth: int) -> list[int]:
    """Return how many tokens each block merges away."""
    at = {s.block: s.counts.tokens_in - s.counts.kept for s in stages}
    return [at.get(block, 0) for block in range(depth)]


def merged_of(model: PrunedViT) -> dict[int, int]:
    return {s.block: s.counts.tokens_in - s.counts.kept for s in model.stages}


# ------------------------------------------------------------------------------------------------ schedule


def test_constant_schedule_merges_in_every_block() -> None:
    stages = stages_of(DEIT, "tome", 1.0, r="13")
    assert merges(stages, 12) == [13] * 12
    assert 1 + stages[-1].counts.kept == 41
    assert {s.where for s in stages} == {Where.MID_BLOCK}


def test_decreasing_schedule_is_that_of_the_released_code() -> None:
    stages = stages_of(DEIT, "tome", 1.0, r="13", schedule="decreasing")
    assert merges(stages, 12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, [8, 4, 2, 1]), ({"distilled": True}, [8, 4, 2, 1]), ({"image_size": (40, 24)}, [7, 4, 2, 1])],
)
def test_at_most_half_of_the_patches_are_merged(fields: dict[str, Any], expected: list[int]) -> None:
    assert merges(stages_of(small(**fields), "tome", 1.0, r="16"), 4) == expected


def test_no_merging_is_the_dense_model() -> None:
    assert stages_of(DEIT, "tome", 1.0, r="0") == ()


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("prop_attn", [True, False])
def test_tome_follows_the_formulas(fields: dict[str, Any], prop_attn: bool) -> None:
    model = model_of(prop_attn=prop_attn, **fields)
    weights, merged = model.state_dict(), merged_of(model)
    assert_follows(model, lambda i: reference_pruning.tome(model.config, weights, i, merged, prop_attn=prop_attn))


@pytest.mark.parametrize(("r", "schedule"), [(3, "decreasing"), (16, "constant"), (1, "constant")])
def test_other_schedules_follow_the_formulas(r: int, schedule: str) -> None:
    model = model_of(r, schedule, distilled=True)
    weights, merged = model.state_dict(), merged_of(model)
    assert_follows(model, lambda i: reference_pruning.tome(model.config, weights, i, merged, prop_attn=True))


def test_sizes_matter_to_attention_only_when_asked() -> None:
    images = images_of(model_of(), 2)
    a, b = (run(model_of(prop_attn=p), images).logits for p in (True, False))
    assert float((a - b).abs().max()) > 1e-3


def test_sizes_do_not_matter_before_the_first_merge() -> None:
    """The first choice is the same with and without proportional attention: every size is one."""
    images = images_of(model_of(), 2)
    a, b = (run(model_of(prop_attn=p), images) for p in (True, False))
    assert [image[0] for image in kept_sets(a)] == [image[0] for image in kept_sets(b)]


@pytest.mark.parametrize(
    ("fields", "first_source"), [({}, 1), ({"distilled": True}, 0), ({"reg_tokens": 4}, 1)], ids=["1", "2", "5"]
)
def test_even_rows_of_the_sequence_are_merged_into_odd_ones(fields: dict[str, Any], first_source: int) -> None:
    model = model_of(8, **fields)
    sources = set(range(first_source, 16, 2))
    for image in kept_sets(run(model, images_of(model, 4))):
        assert image[0] == set(range(16)) - sources


def test_prefix_is_never_merged() -> None:
    """Registers with the keys of patches stay apart: all sources are taken and the prefix is as long as before."""
    model = model_of(16, reg_tokens=4)
    seen: list[int] = []
    hook = model.blocks[3].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    run(model, images_of(model, 1))
    hook.remove()
    assert seen == [5 + 1]


# ------------------------------------------------------------------------------------------------ corner cases


def test_equal_keys_merge_the_first_sources() -> None:
    model = model_of(3)
    D = model.config.embed_dim
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[D : 2 * D] = 0
            block.attn.qkv.bias[D : 2 * D] = 0
            block.attn.qkv.bias[D] = 1.0  # a single entry, so that every likeness is exactly one
    assert kept_sets(run(model, images_of(model, 1)))[0][0] == set(range(16)) - {1, 3, 5}


@pytest.mark.parametrize(("size", "fields"), [((8, 8), {}), ((8, 8), {"distilled": True})], ids=["one", "distilled"])
def test_single_patch_is_not_merged(size: tuple[int, int], fields: dict[str, Any]) -> None:
    assert stages_of(small(image_size=size, **fields), "tome", 1.0, r="4") == ()


def test_counts_are_fixed_and_never_overflow() -> None:
    model = model_of()
    out = run(model, images_of(model, 3))
    assert counts_of(out) == [[13, 10, 7, 4]] * 3
    assert not out.overflow.any()


def test_kept_patches_are_nested() -> None:
    model = model_of()
    for image in kept_sets(run(model, images_of(model, 3))):
        assert all(later < earlier for earlier, later in itertools.pairwise(image))


def test_weights_are_those_of_the_dense_model() -> None:
    assert not [k for k in model_of().state_dict() if k.startswith("prune.")]


@settings(max_examples=6)
@given(
    rows=st.integers(2, 5),
    columns=st.integers(2, 5),
    r=st.integers(1, 6),
    prop_attn=st.booleans(),
    prefix=st.sampled_from([{}, {"distilled": True}, {"reg_tokens": 4}]),
    seed=st.integers(0, 99),
)
def test_image_alone_is_the_image_in_a_batch(
    rows: int, columns: int, r: int, prop_attn: bool, prefix: dict[str, Any], seed: int
) -> None:
    size = (8 * rows, 8 * columns)
    assert_independent(model_of(r, "constant", prop_attn, seed, image_size=size, **prefix), seed)
