from __future__ import annotations

import pytest
import torch

from edgeprune.export.plan import build_plan
from edgeprune.models.config import ViTConfig
from edgeprune.models.macs import count_parameters, dense_macs
from edgeprune.models.registry import MODELS
from edgeprune.models.vit import VisionTransformer

SMALL = {"image_size": (16, 24), "patch_size": (8, 4), "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 7}
ODD = [
    ViTConfig(name="registers", reg_tokens=4, no_embed_class=True, layer_scale=True, **SMALL),
    ViTConfig(name="pooled", class_token=False, global_pool="avg", fc_norm=True, qkv_bias=False, **SMALL),
    ViTConfig(name="two heads", distilled=True, mlp_ratio=2.5, in_chans=1, **SMALL),
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
    ],
)
def test_macs_are_those_of_the_literature(name: str, giga: float) -> None:
    assert dense_macs(MODELS[name]) / 1e9 == pytest.approx(giga, rel=0.01)
