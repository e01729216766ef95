"""Two published methods in plain torch, the way their users export them: the rivals of our graphs.

Both are written from the papers' descriptions and share the backbone's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.models.vit import Block, VisionTransformer
from edgeprune.pruning.model import PrunedViT
from edgeprune.pruning.predictor import Predictor


class OfficialStyleDynamicViT(nn.Module):
    """DynamicViT's published inference path: full argsort, decisions carried along, flattened gather.

    Args:
        model: of method `dynamicvit`; its weights are used.

    Source: arXiv 2106.02034, sections 3.2 and 3.3.
    """

    def __init__(self, model: PrunedViT) -> None:
        super().__init__()
        self.model = model
        self.stage_at = {stage.block: stage for stage in model.stages}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        model = self.model
        x = model.embed(images)
        decision = x.new_ones(len(x), model.config.num_patches, 1)
        for index, block in enumerate(model.blocks):
            stage = self.stage_at.get(index)
            if stage is not None:
                module = model.scorer_module(stage)
                assert isinstance(module, Predictor)
                scores = self.scores(module, x[:, 1:], decision)
                keep = scores.argsort(dim=1, descending=True)[:, : stage.counts.kept]
                first = keep.new_zeros(len(keep), 1)
                x = select_rows(x, torch.cat([first, keep + 1], 1))
                decision = select_rows(decision, keep)
            x = block(x)
        return model.classify(x)

    def scores(self, predictor: Predictor, tokens: Tensor, decision: Tensor) -> Tensor:
        """Return the keep log-probability [B, N] of tokens [B, N, D] under the decision so far [B, N, 1]."""
        half = tokens.shape[-1] // 2
        x = predictor.in_conv(tokens)
        shared = (x[..., half:] * decision).sum(1, keepdim=True) / decision.sum(1, keepdim=True)
        x = torch.cat([x[..., :half], shared.expand(-1, x.shape[1], -1)], -1)
        return predictor.out_conv(x).log_softmax(-1)[..., 0]


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows [B, K, D] of x [B, N, D] at index [B, K], by one gather on the flattened batch."""
    B, N, D = x.shape
    flat = index + torch.arange(B, device=x.device).unsqueeze(1) * N
    return x.reshape(B * N, D)[flat.reshape(-1)].reshape(B, index.shape[1], D)


class MergingViT(nn.Module):
    """Token merging: in every block the r most similar pairs of tokens become their weighted mean.

    Proportional attention: a token that stands for s patches counts s times as a key.

    Args:
        model: the backbone; needs a CLS token and nothing else in front of the patches.
        r: tokens to merge away per block, at most half of what is there.

    Source: ToMe (arXiv 2210.09461), section 3, from its description.
    """

    def __init__(self, model: VisionTransformer, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self.model.classify(self.tokens(images)[0])

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last block's output [B, T, D] and how many patches each token stands for [B, T, 1]."""
        x = self.model.embed(images)
        size = x.new_ones(*x.shape[:2], 1)
        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            x, metric = self.attend(block, x, size if index else None)
            r = min(self.r, (x.shape[1] - 1) // 2)
            if r > 0:
                x, size = merge(x, size, metric, r)
            x = block.add_mlp(x)
        return x, size

    def attend(self, block: Block, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the attention residual [B, T, D] and the keys averaged over heads [B, T, d]."""
        q, k, v = block.attn.heads(block.norm1(x))
        logits = (q @ k.transpose(-2, -1)) * block.attn.scale
        if size is not None:  # in the first block every size is one
            logits = logits + size.log()[:, None, None, :, 0]
        return x + block.ls1(block.attn.merge(logits.softmax(-1) @ v)), k.mean(1)


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge r tokens away.

    Tokens at even places (A) look for the most similar token at an odd place (B); the r best pairs are
    merged. CLS, the first of A, never merges.

    Args:
        x: [B, T, D].
        size: [B, T, 1] patches behind each token.
        metric: [B, T, d] what similarity is measured on.
        r: below T / 2.

    Returns:
        x [B, T - r, D] (CLS first) and size [B, T - r, 1].
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    never = similarity.new_zeros(1, similarity.shape[1], 1)
    never[:, 0] = -torch.inf
    best, partner = (similarity + never).max(-1)
    order = best.argsort(dim=1, descending=True)
    merged, unmerged = order[:, :r], order[:, r:].sort(1).values
    into = partner.gather(1, merged)

    def reduce(values: Tensor) -> Tensor:
        D = values.shape[-1]
        a, b = values[:, ::2], values[:, 1::2]
        moved = a.gather(1, merged.unsqueeze(-1).expand(-1, -1, D))
        stays = a.gather(1, unmerged.unsqueeze(-1).expand(-1, -1, D))
        return torch.cat([stays, b.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, D), moved)], 1)

    total = reduce(size)
    return reduce(x * size) / total, total
