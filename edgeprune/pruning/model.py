"""A backbone with its stages in torch: the reference every exported graph is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.models.config import ViTConfig
from edgeprune.models.vit import Block, VisionTransformer
from edgeprune.pruning.base import Context, Needs, Reducer, Stage, Where

FUSED_TOKEN_ID = -1  # a fused token stands for no single patch


@dataclass
class PrunedOutput:
    """Result of one forward pass.

    Attributes:
        logits: [B, classes].
        kept: per stage [B, K] int64, original patch number of every kept token; -1 for a fused token.
        scores: per stage [B, N] float32, over the tokens that reached the stage.
    """

    logits: Tensor
    kept: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class PrunedViT(VisionTransformer):
    """A ViT that drops tokens at its stages.

    Weights keep timm's keys; the weights of a stage live under `prune.<index>.`. The forward pass gathers (nothing is
    masked), so an image's logits never depend on its batch.

    Args:
        config: the backbone.
        stages: in execution order; empty gives the dense model.
    """

    def __init__(self, config: ViTConfig, stages: Sequence[Stage] = ()) -> None:
        super().__init__(config)
        self.stages = tuple(stages)
        self.prune = nn.ModuleDict()
        for stage in self.stages:
            module = stage.scorer.build(config)
            if module is not None:
                self.prune[str(stage.index)] = module

    def scorer_module(self, stage: Stage) -> nn.Module | None:
        """Return the module that holds a stage's weights, or None when it has none."""
        return dict(self.prune.items()).get(str(stage.index))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalised images [B, C, H, W]."""
        return self.run(images).logits

    def run(self, images: Tensor) -> PrunedOutput:
        """Return logits and, per stage, the kept tokens and their scores."""
        x = self.embed(images)
        ids = torch.arange(self.config.num_patches, device=x.device).expand(len(x), -1)
        out = PrunedOutput(logits=x)
        at = {(stage.block, stage.where): s for s, stage in enumerate(self.stages)}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            before, inside = at.get((i, Where.PRE_BLOCK)), at.get((i, Where.MID_BLOCK))
            if before is not None:
                x, ids = self.reduce(before, x, None, ids, out)
            if inside is None:
                x = block(x)
            else:
                x, attention = self.attend(block, x, self.stages[inside].scorer.needs)
                x, ids = self.reduce(inside, x, attention, ids, out)
                x = block.add_mlp(x)
        out.logits = self.classify(x)
        return out

    def attend(self, block: Block, x: Tensor, needs: Needs) -> tuple[Tensor, Tensor | None]:
        """Return the attention residual [B, P+N, D] and, if needed, the CLS attention [B, H, N]."""
        q, k, v = block.attn.heads(block.norm1(x))
        attention = None
        if needs is Needs.CLASS_ATTENTION:
            attention = block.attn.probabilities(q[:, :, :1], k)[:, :, 0, self.config.num_prefix_tokens :]
        return block.add_attention(x, block.attn.merge(F.scaled_dot_product_attention(q, k, v))), attention

    def reduce(
        self, s: int, x: Tensor, attention: Tensor | None, ids: Tensor, out: PrunedOutput
    ) -> tuple[Tensor, Tensor]:
        """Apply stage s: return the shorter sequence and the original patch number of each of its patch tokens."""
        stage, P = self.stages[s], self.config.num_prefix_tokens
        patches = x[:, P:]
        scores = stage.scorer.score(Context(patches, attention), self.scorer_module(stage))
        positions = stage.selector.select(scores)
        kept = patches.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        ids = ids.gather(1, positions)
        out.kept.append(ids)
        out.scores.append(scores)
        parts = [x[:, :P], kept]
        if stage.reducer is Reducer.FUSE:
            dropped = scores.scatter(1, positions, 0.0)
            parts.append(dropped.unsqueeze(1) @ patches)
            ids = torch.cat([ids, ids.new_full((len(ids), 1), FUSED_TOKEN_ID)], 1)
        return torch.cat(parts, 1), ids
