"""Token Cropr's module in torch: queries for scoring, and what it trains them with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.models.config import ViTConfig

HIDDEN_RATIO = 4
MLP_NORM_EPS = 1e-6


class CrossAttention(nn.Module):
    """Queries, and while training the aggregator; keys of the official code.

    Args:
        dim: width D.
        queries: number of learned queries.
        training_parts: build the aggregator's norm and MLP.
    """

    def __init__(self, dim: int, queries: int, training_parts: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, queries, dim))
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)
        if training_parts:
            self.mlp_norm = nn.LayerNorm(dim, eps=MLP_NORM_EPS)
            self.mlp = nn.Sequential()
            self.mlp.add_module("fc1", nn.Linear(dim, HIDDEN_RATIO * dim))
            self.mlp.add_module("act", nn.GELU())
            self.mlp.add_module("fc2", nn.Linear(HIDDEN_RATIO * dim, dim))

    def aggregate(self, tokens: Tensor) -> Tensor:
        """Return what the queries [B, Nq, D] gather of tokens [B, T, D]."""
        logits = self.queries @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5
        mixed = logits.softmax(-1) @ tokens
        return mixed + self.mlp(self.mlp_norm(mixed))


class AuxiliaryHead(nn.Module):
    """Norm and classifier of one module."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, Nq, classes] of [B, Nq, D]."""
        return self.head(self.norm(x))


class CroprModule(nn.Module):
    """Scores tokens; while training also predicts the task from them.

    Args:
        config: the backbone.
        queries: learned queries; 1 for classification.
        training_parts: build the aggregator and the auxiliary head.

    Source: Token Cropr (arXiv 2412.00965) section 3.1; keys `cross_attn.*`, `head.*` of the official code.
    """

    def __init__(self, config: ViTConfig, queries: int = 1, *, training_parts: bool = True) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config.embed_dim, queries, training_parts)
        if training_parts:
            self.head = AuxiliaryHead(config.embed_dim, config.num_classes)

    def score(self, tokens: Tensor) -> Tensor:
        """Return scores [B, N] of tokens [B, N, D]: products with the sum of the queries, without gradient."""
        return (tokens.detach() @ self.cross_attn.queries.detach().sum(1).unsqueeze(-1))[..., 0]

    def predict(self, tokens: Tensor) -> Tensor:
        """Return auxiliary logits [B, classes] of the whole sequence [B, T, D]; nothing flows back into the tokens."""
        return self.head(self.cross_attn.aggregate(tokens.detach())).mean(1)
