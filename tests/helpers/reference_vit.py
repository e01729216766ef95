"""A ViT written from the papers' formulas on plain tensors: what the modules are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeprune.models.config import ViTConfig

LVVIT: dict[str, object] = {
    "stem": "lvvit",
    "residual_scale": 2.0,
    "qkv_bias": False,
    "mlp_ratio": 3.0,
    "aux_head": True,
    "norm_eps": 1e-5,
}


def tiny(**fields: object) -> ViTConfig:
    """Return a model of 16 patches, 2 blocks and width 32."""
    small = {"image_size": (32, 32), "patch_size": (8, 8), "embed_dim": 32, "depth": 2, "num_heads": 2}
    return ViTConfig(**{"name": "tiny", "num_classes": 5, **small, **fields})


def tiny_lvvit(**fields: object) -> ViTConfig:
    """Return `tiny` as an LV-ViT."""
    return tiny(**{**LVVIT, **fields})


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return the module in eval mode, every parameter random, so that a forgotten bias or token shows.

    Running statistics of a BatchNorm are random too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        randomize_statistics(module, generator)
    return module.eval()


def randomize_statistics(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every BatchNorm running statistics away from 0 and 1."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 2 + 0.1)


def stem(w: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the maps [B, 64, H / 2, W / 2] that LV-ViT projects: three times convolution, BatchNorm, ReLU."""
    x = images
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
        x = F.conv2d(x, w[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, shift = (w[f"patch_embed.bn{i}.{part}"][:, None, None] for part in parts)
        x = ((x - mean) / (var + 1e-5).sqrt() * gain + shift).clamp(min=0)
    return x


def logits(config: ViTConfig, w: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return logits [B, classes]; `w` has timm's keys."""
    B, D, H = len(images), config.embed_dim, config.num_heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    p, q = config.patch_size
    if config.stem == "lvvit":
        images, p, q = stem(w, images), p // 2, q // 2
    rows, cols = config.grid
    cut = images.reshape(B, -1, rows, p, cols, q).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * cols, -1)
    x = cut @ w["patch_embed.proj.weight"].reshape(D, -1).T + w["patch_embed.proj.bias"]
    prefix = [w[t].expand(B, -1, -1) for t in ("cls_token", "dist_token", "reg_token") if t in w]
    P = sum(t.shape[1] for t in prefix)
    if config.no_embed_class:
        x = torch.cat([*prefix, x + w["pos_embed"]], 1)
    else:
        x = torch.cat([*prefix, x], 1) + w["pos_embed"]

    d = D // H
    for i in range(config.depth):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        heads = []
        for h in range(H):
            query, key, value = (qkv[..., s * D + h * d : s * D + (h + 1) * d] for s in range(3))
            heads.append((query @ key.transpose(1, 2) / d**0.5).softmax(-1) @ value)
        y = linear(torch.cat(heads, -1), f"{b}.attn.proj")
        x = x + y * w.get(f"{b}.ls1.gamma", torch.ones(())) / config.residual_scale
        y = linear(F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + y * w.get(f"{b}.ls2.gamma", torch.ones(())) / config.residual_scale

    if not config.fc_norm:
        x = norm(x, "norm")
    first = 0 if config.pool_include_prefix else P
    pooled = x[:, first:].mean(1) if config.global_pool == "avg" else x[:, 0]
    if config.fc_norm:
        pooled = norm(pooled, "fc_norm")
    out = linear(pooled, "head")
    if config.aux_head:
        out = out + 0.5 * linear(x[:, P:], "aux_head").max(1).values
    return (out + linear(x[:, 1], "head_dist")) / 2 if config.distilled else out
