"""The numbers the methods' published code gives, by the number they have in the specification's list of oracles.

Elsewhere: 2, the counts of DynamicViT and EViT (test_counts, test_base), of Cropr and ToMe (test_cropr, test_tome);
3, policy softmax and masking against gathering (training/test_masking); 5, batch independence (test_ats, test_asvit,
test_sait); 6, the worked example of ATS (test_ats); 8, graphs (export/test_adaptive); 9, the floor of 0.7 - 0.2
(test_counts); 10, argparse.Namespace and left-over keys (models/test_checkpoint).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.export.plan import build_plan
from edgeprune.models.checkpoint import Checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.macs import dense_macs
from edgeprune.models.registry import get_model_config
from edgeprune.models.vit import policy_softmax
from edgeprune.pruning import get_method
from edgeprune.pruning.counts import CountRule, resolve_counts
from edgeprune.pruning.model import PrunedViT
from tests.helpers.lowering import random_model, small, stages_of

DEIT = get_model_config("deit_small_patch16_224")
LARGE = get_model_config("vit_large_patch16_224")


def keys_of(method: str, keep_rate: float, **options: str) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of a pruned DeiT-S."""
    with torch.device("meta"):
        model = PrunedViT(DEIT, stages_of(DEIT, method, keep_rate, **options))
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def in_memory(tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(dict(tensors), "memory.pth", None, None)


# ------------------------------------------------------------------------------------------------ 1: key sets


@pytest.mark.parametrize(
    ("method", "keep_rate", "total", "extra"),
    [
        ("dynamicvit", 0.7, 182, 30),
        ("ats", 1.0, 152, 0),  # the released file has nine more, constant zeros: see oracle 10
        ("asvit", 1.0, 155, 3),
        ("evit", 0.7, 152, 0),
        ("tome", 1.0, 152, 0),
    ],
)
def test_oracle_1_model_has_the_published_keys(method: str, keep_rate: float, total: int, extra: int) -> None:
    options = {"r": "13"} if method == "tome" else {}
    keys = keys_of(method, keep_rate, **options)
    assert len(keys) == total
    assert sum(k.startswith("prune.") for k in keys) == extra


def test_oracle_1_cropr_keeps_one_vector_for_each_of_22_modules() -> None:
    with torch.device("meta"):
        model = PrunedViT(LARGE, stages_of(LARGE, "cropr", 1.0, tokens_per_block="8"))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith("prune.")}
    assert shapes == {f"prune.{s}.cross_attn.queries": (1, 1, 1024) for s in range(22)}


def test_oracle_1_cropr_module_of_training_has_eleven_tensors() -> None:
    from edgeprune.pruning.cropr_module import CroprModule

    with torch.device("meta"):
        state = CroprModule(LARGE).state_dict()
    assert len(state) == 11
    assert sum(k.endswith("queries") for k in state) == 1
    mlp = [(4096, 1024), (4096,), (1024, 4096), (1024,)]
    norms, head = [(1024,)] * 4, [(1000, 1024), (1000,)]
    assert sorted(tuple(v.shape) for v in state.values()) == sorted([(1, 1, 1024), *mlp, *norms, *head])


# ------------------------------------------------------------------------------------------------ 2, 9: counts, MACs


@pytest.mark.parametrize(("ratio", "kept"), [(0.7, [137, 97, 58]), (0.9, [176, 137, 98])])
def test_oracle_2_hierarchical_counts_follow_the_differences(ratio: float, kept: list[int]) -> None:
    """Float64 in the order of the released code; nothing is nested there, so every stage starts from all tokens."""
    rule = CountRule("initial", "floor", cumulative=False)
    assert [resolve_counts(rule, 196, (r,))[0].kept for r in (ratio, ratio - 0.2, ratio - 0.4)] == kept


@pytest.mark.parametrize(
    ("name", "method", "options", "giga"),
    [
        ("deit_tiny_patch16_224", "tome", {"r": "13"}, 0.73),
        ("deit_small_patch16_224", "tome", {"r": "13"}, 2.70),
        ("deit_base_patch16_224", "tome", {"r": "13"}, 10.37),
        ("vit_large_patch16_224", "cropr", {"tokens_per_block": "8"}, 34.66),
        ("vit_large_patch16_224", "cropr", {"tokens_per_block": "8", "llf": "false"}, 32.26),
    ],
)
def test_oracle_2_macs_are_those_of_the_table(name: str, method: str, options: dict[str, Any], giga: float) -> None:
    config = get_model_config(name)
    macs = build_plan(config, stages_of(config, method, 1.0, **options)).macs()
    assert macs / 1e9 == pytest.approx(giga, rel=0.02)


# ------------------------------------------------------------------------------------------------ 7: AS-ViT


def test_oracle_7_masked_token_scores_nearly_nothing() -> None:
    """Head weights sum to one at most, so the attention of CLS bounds the score; 197 tokens, every second masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 197, 197, generator=generator)
    policy = torch.ones(1, 197)
    policy[:, 2::2] = 0
    attention = policy_softmax(logits, policy)[0, :, 0]
    assert float(attention[:, 2::2].max()) < 1e-8


def test_oracle_7_budget_reference_counts_patches_only() -> None:
    """Twelve blocks and the embedding of 196 tokens, no class token and no classifier."""
    config = get_model_config("deit_small_patch16_224", class_token=False, global_pool="avg", num_classes=1)
    assert (dense_macs(config) - config.embed_dim) / 1e9 == pytest.approx(4.573643, abs=1e-6)


# ------------------------------------------------------------------------------------------------ 10: loader


@pytest.mark.parametrize(
    ("method", "official", "ours"),
    [
        ("asvit", "score_predictor.{}.keep_threshold", "prune.{}.keep_threshold"),
        ("cropr", "cropr.{}.cross_attn.queries", "prune.{}.cross_attn.queries"),
    ],
)
def test_oracle_10_official_names_are_loaded(method: str, official: str, ours: str) -> None:
    config = small()
    options = {"tokens_per_block": "2"} if method == "cropr" else {}
    stages = stages_of(config, method, 1.0, "1,2" if method == "asvit" else None, **options)
    source, model = random_model(config, stages, 0), random_model(config, stages, 1)
    names = {ours.format(s.index): official.format(s.index) for s in stages}
    tensors = {names.get(k, k): v.clone() for k, v in source.state_dict().items()}
    report = load_into(model, in_memory(tensors), key_prefixes=get_method(method).key_prefixes)
    assert report.matched == len(tensors)
    for key in names:
        assert torch.equal(model.state_dict()[key], source.state_dict()[key])


def test_oracle_10_zero_masks_of_ats_are_named_and_can_be_left_out() -> None:
    config = small()
    model = random_model(config, stages_of(config, "ats", 1.0))
    masks = {f"blocks.{b}.attn.out_zero_mask": torch.zeros(1, 32) for b in (1, 2, 3)}
    tensors = {**model.state_dict(), **masks}
    report = load_into(model, in_memory(tensors), ignore_prefixes=list(masks))
    assert set(report.unused) == set(masks)


def test_oracle_10_file_that_matches_no_key_is_refused() -> None:
    """As the released ATS loader does it: every key under `base_model.`, and one without so that none is stripped."""
    config = small()
    tensors = {f"base_model.{k}": v for k, v in random_model(config).state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_into(random_model(config), in_memory({**tensors, "step": torch.ones(1)}))
    assert caught.value.code.startswith("checkpoint-")


def test_oracle_10_unknown_key_is_named() -> None:
    config = small()
    model = random_model(config, stages_of(config, "asvit", 1.0, "1,2"))
    tensors = {**model.state_dict(), "prune.7.keep_threshold": torch.zeros(())}
    with pytest.raises(InputError, match=r"prune\.7\.keep_threshold"):
        load_into(model, in_memory(tensors), key_prefixes=get_method("asvit").key_prefixes)
