"""Parameters and multiply-accumulates of a backbone by formula: what `edgeprune models` lists. No torch here."""

from __future__ import annotations

from edgeprune.models.config import ViTConfig


def count_parameters(config: ViTConfig) -> int:
    """Return the number of weights of the dense model, as `VisionTransformer(config)` holds them."""
    D, M = config.embed_dim, config.mlp_dim
    patch = config.in_chans * config.patch_size[0] * config.patch_size[1]
    embed = patch * D + D + (config.num_prefix_tokens + config.num_pos_tokens) * D
    attention = 3 * D * D + 3 * D * config.qkv_bias + D * D + D
    mlp = D * M + M + M * D + D
    block = attention + mlp + 4 * D + 2 * D * config.layer_scale
    head = (D * config.num_classes + config.num_classes) * config.num_head_tokens
    return embed + config.depth * block + 2 * D + head


def dense_macs(config: ViTConfig) -> int:
    """Return the multiply-accumulates of one image through the dense model, as the literature counts them.

    Matrix products and the patch convolution only: per block `(4 + 2 * mlp_ratio) * T * D^2 + 2 * T^2 * D` with T
    tokens, prefix included.
    """
    D, T = config.embed_dim, config.num_patches + config.num_prefix_tokens
    patch = config.in_chans * config.patch_size[0] * config.patch_size[1]
    block = T * (4 * D * D + 2 * D * config.mlp_dim) + 2 * T * T * D
    return config.num_patches * patch * D + config.depth * block + config.num_head_tokens * config.num_classes * D
