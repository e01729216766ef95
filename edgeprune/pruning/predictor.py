"""DynamicViT's prediction module in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.pruning.dynamicvit import PREDICTOR_NORM_EPS


class Predictor(nn.Module):
    """Score every token from its own features and the mean of all.

    Source: DynamicViT (arXiv 2106.02034) section 3.2; keys `in_conv.*`, `out_conv.*` of the official code.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=PREDICTOR_NORM_EPS), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def logits(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return [B, N, 2] logits, channel 0 keep and channel 1 drop.

        Args:
            tokens: [B, N, D] patch tokens.
            keep: [B, N] in {0, 1}, the tokens that make up the global mean; None means all.
        """
        local, shared = self.in_conv(tokens).chunk(2, dim=-1)
        if keep is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = keep.unsqueeze(-1)
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return self.out_conv(torch.cat([local, mean.expand_as(local)], -1))
