from __future__ import annotations

import pytest
import torch

from edgeprune.export.plan import build_plan
from edgeprune.models.config import ViTConfig
from edgeprune.models.macs import count_parameters, dense_macs
from edgeprune.models.registry import MODELS
from edgeprune.models.vit import VisionTransformer
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest

SMALL = {"image_size": (16, 24), "patch_size": (8, 4), "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 7}
ODD = [
    ViTConfig(name="registers", reg_tokens=4, no_embed_class=True, layer_scale=True, **SMALL),
    ViTConfig(name="pooled", class_token=False, global_pool="avg", fc_norm=True, qkv_bias=False, **SMALL),
    ViTConfig(name="two heads", distilled=True, mlp_ratio=2.5, in_chans=1, **SMALL),
    ViTConfig(name="stem and aux head", stem="lvvit", aux_head=True, residual_scale=2.0, in_chans=1, **SMALL),
    ViTConfig(name="prefix pooled", global_pool="avg", pool_include_prefix=True, **SMALL),
]


@pytest.mark.parametrize("config", [*MODELS.values(), *ODD], ids=lambda config: config.name)
def test_parameters_are_those_of_the_module(config: ViTConfig) -> None:
    with torch.device("meta"):
        model = VisionTransformer(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [*MODELS.values(), *ODD], ids=lambda config: config.name)
def test_macs_are_those_of_the_plan(config: ViTConfig) -> None:
    assert dense_macs(config) == build_plan(config, ()).macs()


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("deit_tiny_patch16_224", 1.25),
        ("deit_small_patch16_224", 4.60),
        ("deit_base_patch16_224", 17.56),
        ("vit_large_patch16_224", 61.55),
        ("lvvit_s", 6.6),
        ("lvvit_m", 12.7),
    ],
)
def test_macs_are_those_of_the_literature(name: str, giga: float) -> None:
    assert dense_macs(MODELS[name]) / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize(
    ("name", "keep_rate", "giga"),
    [
        ("deit_small_patch16_224", 0.7, 2.9),
        ("deit_base_patch16_224", 0.7, 11.4),
        ("lvvit_s", 0.7, 4.6),
        ("lvvit_s", 0.5, 3.7),
        ("lvvit_m", 0.7, 8.5),
    ],
)
def test_macs_of_dynamicvit_are_those_of_its_readme(name: str, keep_rate: float, giga: float) -> None:
    """The README cuts its figures after the first digit: DeiT-S with 2.98 G is 2.9 there."""
    config, method = MODELS[name], get_method("dynamicvit")
    macs = build_plan(config, method.stages(config, StageRequest(keep_rate), {})).macs()
    assert macs // 10**8 / 10 == giga
