"""Torch reference of the `edgeprune` ops, version 1, registered as `torch.ops.edgeprune.*`.

Each op is held together over four implementations: this reference, the portable ONNX body in
`edgeprune.export.ops`, the CUDA kernel in `plugins/kernels` and the TensorRT engine (engines are not built yet).
"""

from __future__ import annotations

import torch
from torch import Tensor

MODE_TOP_K, MODE_THRESHOLD, MODE_MASS = 0, 1, 2
ORDER_RANK, ORDER_POSITION = 0, 1


def rank_tokens(scores: Tensor) -> Tensor:
    """Return positions [B, N] int64 of all tokens, best first; ties to the lower index, NaN last.

    Args:
        scores: [B, N] any float dtype; compared in float32.
    """
    scores = scores.detach().float()
    missing = scores.isnan()
    order = scores.masked_fill(missing, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    last = missing.gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices
    return order.gather(1, last)


def gather_rows(tokens: Tensor, indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return [B, P+K, D]: the prefix and the patch tokens at `indices` [B, K] of tokens [B, P+N, D]; differentiable."""
    prefix = tokens[:, :num_prefix_tokens]
    patches = tokens[:, num_prefix_tokens:]
    rows = patches.gather(1, indices.long().unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return torch.cat([prefix, rows], 1)


def count_tokens(scores: Tensor, k: int, mode: int, threshold: float) -> Tensor:
    """Return how many tokens the mode keeps, [B] int32; more than `k` means that k was too small.

    Mode 0 keeps k. Mode 1 keeps scores above the threshold. Mode 2 keeps the best tokens until their scores, taken
    as at least 0, sum to the threshold; it keeps one at least, and all from a threshold of 1 up.
    """
    B, N = scores.shape
    scores = scores.detach().float()
    if mode == MODE_TOP_K:
        return torch.full((B,), k, dtype=torch.int32, device=scores.device)
    if mode == MODE_THRESHOLD:
        return (scores > threshold).sum(1, dtype=torch.int32)
    if threshold >= 1:
        return torch.full((B,), N, dtype=torch.int32, device=scores.device)
    ranked = scores.nan_to_num(nan=0.0).clamp(min=0).gather(1, rank_tokens(scores))
    before = torch.nn.functional.pad(ranked, (1, -1)).cumsum(1)
    return (before < threshold).sum(1, dtype=torch.int32).clamp(min=1)


@torch.library.custom_op("edgeprune::topk_gather", mutates_args=())
def topk_gather(
    scores: Tensor,
    tokens: Tensor,
    k: int,
    num_prefix_tokens: int = 1,
    order: int = ORDER_RANK,
    mode: int = MODE_TOP_K,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the prefix and the k best patch tokens.

    Args:
        scores: [B, N] higher stays; compared in float32.
        tokens: [B, P+N, D].
        k: slots per image, 1 <= k <= N; slots past the count hold the next best tokens.
        num_prefix_tokens: P.
        order: 0 by rank, 1 by position.
        mode: 0 top-k, 1 threshold, 2 cumulative mass.
        threshold: for modes 1 and 2.

    Returns:
        kept [B, P+k, D]; indices [B, k] int32 into N; count [B] int32.
    """
    indices = rank_tokens(scores)[:, :k]
    if order == ORDER_POSITION:
        indices = indices.sort(1).values
    kept = gather_rows(tokens, indices, num_prefix_tokens)
    return kept, indices.int(), count_tokens(scores, k, mode, threshold)


@topk_gather.register_fake
def _(
    scores: Tensor,
    tokens: Tensor,
    k: int,
    num_prefix_tokens: int = 1,
    order: int = ORDER_RANK,
    mode: int = MODE_TOP_K,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, D = tokens.shape
    kept = tokens.new_empty(B, num_prefix_tokens + k, D)
    return kept, scores.new_empty((B, k), dtype=torch.int32), scores.new_empty((B,), dtype=torch.int32)


@torch.library.custom_op("edgeprune::gather_tokens", mutates_args=())
def gather_tokens(tokens: Tensor, indices: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Return [B, P+K, D]: the prefix and the patch tokens at indices [B, K] int32 of tokens [B, P+N, D]."""
    return gather_rows(tokens, indices, num_prefix_tokens)


@gather_tokens.register_fake
def _(tokens: Tensor, indices: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    B, _, D = tokens.shape
    return tokens.new_empty(B, num_prefix_tokens + indices.shape[1], D)


@torch.library.custom_op("edgeprune::scatter_tokens", mutates_args=())
def scatter_tokens(base: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """Return base [B, N, D] with tokens [B, K, D] at indices [B, K] int32, each position once."""
    return base.scatter(1, indices.long().unsqueeze(-1).expand(-1, -1, base.shape[-1]), tokens)


@scatter_tokens.register_fake
def _(base: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    return torch.empty_like(base)
