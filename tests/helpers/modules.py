"""Modules that are not ours: one as timm builds it, one that prunes by the `edgeprune` ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import edgeprune.pruning.ops  # noqa: F401  registers the ops
from edgeprune.models.config import ViTConfig
from edgeprune.models.vit import VisionTransformer as OurViT
from tests.helpers import reference_vit
from tests.helpers.lowering import random_model


class Pruner(nn.Module):
    """Patches, a CLS row, two selections through the edgeprune ops; positions matter to the logits."""

    def __init__(self, *, order: int = 0, missing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.score, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 1), nn.Linear(16, 5)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.order, self.missing = order, missing

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        scores = self.score(patches).squeeze(-1)
        scores = scores.log() if self.missing else scores  # NaN where negative
        tokens = torch.cat([self.cls.expand(images.shape[0], -1, -1), patches], 1)
        kept, indices, count = torch.ops.edgeprune.topk_gather(scores, tokens, 12, 1, self.order, 0, 0.0)
        kept = kept + torch.ops.edgeprune.gather_tokens(tokens * 2, indices, 1)
        weights = torch.arange(1.0, 14.0)[None, :, None]
        return self.head((kept * weights).mean(1)) * count[:, None]


class VisionTransformer(nn.Module):
    """Has the attributes and keys of timm's class of this name, and computes by the formulas."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        for name, part in OurViT(config).named_children():
            self.add_module(name, part)
        model = random_model(config)
        self._config = config
        for name in ("cls_token", "pos_embed"):
            setattr(self, name, nn.Parameter(torch.zeros_like(getattr(model, name))))
        self.fc_norm = nn.Identity()
        self.patch_embed.img_size, self.patch_embed.patch_size = config.image_size, config.patch_size
        for block in self.blocks:
            block.mlp.act = nn.GELU()
        self.global_pool, self.pretrained_cfg = "token", {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        self.load_state_dict(model.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return reference_vit.logits(self._config, self.state_dict(), images)
