"""Parameters and multiply-accumulates of a backbone by formula: what `edgeprune models` lists. No torch here."""

from __future__ import annotations

from edgeprune.models.config import STEM_CONVOLUTIONS, STEM_WIDTH, ViTConfig


def count_parameters(config: ViTConfig) -> int:
    """Return the number of weights of the dense model, as `VisionTransformer(config)` holds them."""
    D, M = config.embed_dim, config.mlp_dim
    patch = config.proj_chans * config.proj_size[0] * config.proj_size[1]
    embed = patch * D + D + (config.num_prefix_tokens + config.num_pos_tokens) * D
    if config.stem == "lvvit":
        embed += sum(_stem_weights(config)) + 2 * STEM_WIDTH * len(STEM_CONVOLUTIONS)
    attention = 3 * D * D + 3 * D * config.qkv_bias + D * D + D
    mlp = D * M + M + M * D + D
    block = attention + mlp + 4 * D + 2 * D * config.layer_scale
    head = (D * config.num_classes + config.num_classes) * (config.num_head_tokens + config.aux_head)
    return embed + config.depth * block + 2 * D + head


def dense_macs(config: ViTConfig) -> int:
    """Return the multiply-accumulates of one image through the dense model, as the literature counts them.

    Matrix products and convolutions only: per block `(4 + 2 * mlp_ratio) * T * D^2 + 2 * T^2 * D` with T tokens, prefix
    included. The published figures of LV-ViT count its stem and the aux head on every patch token, and so does this.
    """
    D, T = config.embed_dim, config.num_patches + config.num_prefix_tokens
    block = T * (4 * D * D + 2 * D * config.mlp_dim) + 2 * T * T * D
    return embed_macs(config) + config.depth * block + head_macs(config, config.num_patches)


def embed_macs(config: ViTConfig) -> int:
    """Return the multiply-accumulates of one image up to its tokens: stem, if any, and patch projection."""
    macs = config.proj_chans * config.proj_size[0] * config.proj_size[1] * config.num_patches * config.embed_dim
    if config.stem == "lvvit":
        height, width = config.image_size
        for (_, stride), weights in zip(STEM_CONVOLUTIONS, _stem_weights(config), strict=True):
            height, width = height // stride, width // stride
            macs += height * width * weights
    return macs


def head_macs(config: ViTConfig, patch_tokens: int) -> int:
    """Return the multiply-accumulates of the classifiers when so many patch tokens are left."""
    rows = config.num_head_tokens + (patch_tokens if config.aux_head else 0)
    return config.num_classes * config.embed_dim * rows


def _stem_weights(config: ViTConfig) -> list[int]:
    """Return the weights of each convolution of the stem."""
    widths = [config.in_chans] + [STEM_WIDTH] * (len(STEM_CONVOLUTIONS) - 1)
    return [chans * kernel**2 * STEM_WIDTH for chans, (kernel, _) in zip(widths, STEM_CONVOLUTIONS, strict=True)]
