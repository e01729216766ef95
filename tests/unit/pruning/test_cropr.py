"""Token Cropr: learned queries on the raw tokens, with and without last-layer fusion, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.export.plan import Block, build_plan
from edgeprune.models.registry import get_model_config
from edgeprune.pruning.base import Where
from edgeprune.pruning.model import PrunedViT, inverse_permutation
from tests.helpers import reference_pruning
from tests.helpers.lowering import random_model, small, stages_of
from tests.helpers.pruned import VARIANTS, assert_follows, assert_independent, counts_of, images_of, kept_sets, run

LARGE = get_model_config("vit_large_patch16_224")


def model_of(llf: bool = True, removed: int = 2, seed: int = 0, **fields: Any) -> PrunedViT:
    config = small(**fields)
    stages = stages_of(config, "cropr", 1.0, tokens_per_block=str(removed), llf=str(llf).lower())
    return random_model(config, stages, seed)


def removed_of(model: PrunedViT, removed: int) -> dict[int, int]:
    """Return what is removed in front of each block: one more in front of block 1."""
    return {s.block: removed + (s.block == 1) for s in model.stages}


# ------------------------------------------------------------------------------------------------ schedule


def test_fusion_prunes_in_front_of_all_but_the_first_and_the_last_block() -> None:
    stages = stages_of(LARGE, "cropr", 1.0)
    assert [s.block for s in stages] == list(range(1, 23))
    assert {s.where for s in stages} == {Where.PRE_BLOCK}


def test_without_fusion_the_last_block_prunes_too() -> None:
    assert [s.block for s in stages_of(LARGE, "cropr", 1.0, llf="false")] == list(range(1, 24))


def test_first_stage_removes_one_more() -> None:
    stages = stages_of(LARGE, "cropr", 1.0, tokens_per_block="8")
    assert [s.counts.tokens_in - s.counts.kept for s in stages] == [9] + [8] * 21


def test_fusion_brings_all_tokens_to_the_last_block() -> None:
    plan = build_plan(LARGE, stages_of(LARGE, "cropr", 1.0, tokens_per_block="8"))
    tokens = [step.tokens_in for step in plan.steps if isinstance(step, Block)]
    assert tokens == [197, *range(188, 19, -8), 197]


def test_without_fusion_twelve_tokens_are_left() -> None:
    plan = build_plan(LARGE, stages_of(LARGE, "cropr", 1.0, tokens_per_block="8", llf="false"))
    assert [step.tokens_in for step in plan.steps if isinstance(step, Block)] == [197, *range(188, 11, -8)]


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("llf", [True, False])
def test_cropr_follows_the_formulas(fields: dict[str, Any], llf: bool) -> None:
    model = model_of(llf, **fields)
    weights, removed = model.state_dict(), removed_of(model, 2)
    assert_follows(model, lambda i: reference_pruning.cropr(model.config, weights, i, removed, llf=llf))


def test_each_stage_has_its_queries() -> None:
    added = {k: tuple(v.shape) for k, v in model_of().state_dict().items() if k.startswith("prune.")}
    assert added == {"prune.0.cross_attn.queries": (1, 1, 32), "prune.1.cross_attn.queries": (1, 1, 32)}


def test_sum_of_the_queries_ranks_as_all_of_them() -> None:
    many, one = model_of(False), model_of(False)
    generator = torch.Generator().manual_seed(1)
    for stage in many.stages:
        queries = torch.randn(1, 7, 32, generator=generator)
        many.prune[str(stage.index)].cross_attn.queries = nn.Parameter(queries)
        one.prune[str(stage.index)].cross_attn.queries = nn.Parameter(queries.sum(1, keepdim=True))
    images = images_of(many, 3)
    a, b = run(many, images), run(one, images)
    assert kept_sets(a) == kept_sets(b)
    torch.testing.assert_close(a.scores[0], b.scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)


def test_scores_are_products_with_the_raw_tokens() -> None:
    model = model_of()
    images = images_of(model, 2)
    out = run(model, images)
    with torch.no_grad():
        raw = model.blocks[0](model.embed(images))
    expected = raw[:, 1:] @ model.state_dict()["prune.0.cross_attn.queries"][0, 0]
    torch.testing.assert_close(out.scores[0], expected, rtol=1e-5, atol=1e-5)


def test_fused_tokens_are_read_by_the_last_block() -> None:
    """Same weights and choices, but what was dropped comes back: the logits differ."""
    with_fusion, without = model_of(True), model_of(True)
    with_fusion_images = images_of(with_fusion, 1)
    removed, weights = removed_of(without, 2), without.state_dict()
    fused = run(with_fusion, with_fusion_images).logits[0]
    bare = reference_pruning.cropr(without.config, weights, with_fusion_images[0], removed, llf=False)
    assert float((fused - bare.logits.float()).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------ corner cases


def test_uniform_scores_keep_the_first_tokens() -> None:
    model = model_of(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("queries"):
                parameter.zero_()
    assert kept_sets(run(model, images_of(model, 1))) == [[set(range(13)), set(range(11)), set(range(9))]]


def test_one_token_is_kept() -> None:
    model = model_of(False, removed=4, image_size=(56, 16))  # 14 patches: 9, 5, 1
    assert counts_of(run(model, images_of(model, 2))) == [[9, 5, 1]] * 2


def test_two_blocks_with_fusion_are_dense() -> None:
    assert stages_of(small(depth=2), "cropr", 1.0, tokens_per_block="2") == ()


def test_counts_are_fixed_and_never_overflow() -> None:
    model = model_of()
    out = run(model, images_of(model, 3))
    assert counts_of(out) == [[13, 11]] * 3
    assert not out.overflow.any()


@settings(max_examples=6)
@given(
    rows=st.integers(2, 5),
    columns=st.integers(4, 5),
    llf=st.booleans(),
    prefix=st.sampled_from([{}, {"distilled": True}, {"reg_tokens": 4}]),
    seed=st.integers(0, 99),
)
def test_image_alone_is_the_image_in_a_batch(
    rows: int, columns: int, llf: bool, prefix: dict[str, Any], seed: int
) -> None:
    assert_independent(model_of(llf, 1, seed, image_size=(8 * rows, 8 * columns), **prefix), seed)


# ------------------------------------------------------------------------------------------------ dense prediction


@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 4}, {"image_size": (40, 24)}], ids=str)
def test_every_patch_comes_back_in_its_place_for_dense_heads(fields: dict[str, Any]) -> None:
    model = model_of(True, **fields)
    P, N = model.config.num_prefix_tokens, model.config.num_patches
    out = run(model, images_of(model, 3))
    assert out.ids is not None and out.tokens is not None
    order = inverse_permutation(out.ids)
    assert torch.equal(out.ids.gather(1, order), torch.arange(N).expand(3, -1))
    dense = out.dense_tokens(P)
    for image in range(3):
        for place, patch in enumerate(out.ids[image].tolist()):
            assert torch.equal(dense[image, patch], out.tokens[image, P + place])


def test_dense_tokens_are_refused_when_patches_are_gone() -> None:
    model = model_of(False)
    with pytest.raises(ValueError, match="every patch once"):
        run(model, images_of(model, 1)).dense_tokens(1)
