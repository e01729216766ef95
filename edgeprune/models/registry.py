"""Models by name, as timm names them; add a model by adding a line to `MODELS`."""

from __future__ import annotations

import difflib
from typing import Any

from edgeprune.errors import InputError
from edgeprune.models.config import INCEPTION_MEAN, INCEPTION_STD, ViTConfig

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _vit(name: str, size: str, **extra: Any) -> ViTConfig:
    """A supervised ViT of timm's augreg line: inception statistics, 90 % centre crop."""
    inception: dict[str, Any] = {"mean": INCEPTION_MEAN, "std": INCEPTION_STD, "crop_pct": 0.9}
    return ViTConfig(name=name, **{**_SIZES[size], **inception, **extra})


def _deit(name: str, size: str, **extra: Any) -> ViTConfig:
    return ViTConfig(name=name, **{**_SIZES[size], **extra})


def _lvvit(name: str, **extra: Any) -> ViTConfig:
    """An LV-ViT of the TokenLabeling repository; LayerNorm has torch's own epsilon there."""
    common: dict[str, Any] = {"mlp_ratio": 3.0, "qkv_bias": False, "aux_head": True, "stem": "lvvit"}
    return ViTConfig(name=name, **{**common, "residual_scale": 2.0, "norm_eps": 1e-5, **extra})


_GAP: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
_REG_GAP_256: dict[str, Any] = {**_GAP, "fc_norm": True, "no_embed_class": True, "image_size": (256, 256)}
_384: dict[str, Any] = {"image_size": (384, 384), "crop_pct": 1.0}

MODELS: dict[str, ViTConfig] = {
    config.name: config
    for config in (
        _deit("deit_tiny_patch16_224", "tiny"),
        _deit("deit_small_patch16_224", "small"),
        _deit("deit_base_patch16_224", "base"),
        _deit("deit_base_patch16_384", "base", **_384),
        _deit("deit_tiny_distilled_patch16_224", "tiny", distilled=True),
        _deit("deit_small_distilled_patch16_224", "small", distilled=True),
        _deit("deit_base_distilled_patch16_224", "base", distilled=True),
        _deit("deit_base_distilled_patch16_384", "base", distilled=True, **_384),
        _vit("vit_tiny_patch16_224", "tiny"),
        _vit("vit_small_patch16_224", "small"),
        _vit("vit_base_patch16_224", "base"),
        _vit("vit_base_patch16_384", "base", **_384),
        _vit("vit_large_patch16_224", "large"),
        _vit("vit_large_patch16_384", "large", **_384),
        _vit("vit_base_patch16_gap_224", "base", **_GAP, num_heads=16),
        _vit("vit_base_patch16_reg4_gap_256", "base", **_REG_GAP_256, reg_tokens=4),
        # as Token Cropr fine-tunes it: the average runs over CLS too, DeiT's preprocessing
        _deit("vit_large_patch16_224.mae", "large", global_pool="avg", pool_include_prefix=True, fc_norm=True),
        _lvvit("lvvit_s", embed_dim=384, depth=16, num_heads=6, crop_pct=0.9),
        _lvvit("lvvit_m", embed_dim=512, depth=20, num_heads=8, crop_pct=1.0),
        ViTConfig(
            name="vit_digits",
            image_size=(64, 64),
            patch_size=(8, 8),
            num_classes=10,
            embed_dim=96,
            depth=6,
            num_heads=3,
            mean=INCEPTION_MEAN,
            std=INCEPTION_STD,
            crop_pct=1.0,
        ),
    )
}


def get_model_config(name: str, **overrides: Any) -> ViTConfig:
    """Return the configuration of a registered model.

    Args:
        name: a key of `MODELS`; a `hf-hub:` or timm prefix is not part of it.
        **overrides: fields of `ViTConfig` to replace; None leaves a field alone.

    Raises:
        InputError: `model-unknown` with the nearest names, `model-config` when the overrides do not fit.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        raise InputError(
            f"unknown model '{name}'",
            code="model-unknown",
            expected="one of the names `edgeprune models` lists",
            hint=f"did you mean {', '.join(close)}?" if close else "run `edgeprune models`",
            details={"model": name, "close": close},
        )
    return MODELS[name].with_overrides(**overrides)
