"""Token pruning written from the papers' formulas: one image at a time, float64, tokens masked instead of gathered.

Nothing is shared with `edgeprune.pruning`: places, rounding and ranking are restated here. A token that was dropped
stays in the sequence and is hidden from every attention and mean, which gives the same result as removing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeprune.models.config import ViTConfig
from tests.helpers.reference_vit import stem

FUSED = -1


@dataclass
class Outcome:
    """Logits [classes] and, per stage, the original patch numbers that stayed, best first."""

    logits: Tensor
    kept: list[list[int]] = field(default_factory=list)


class Image:
    """One image on its way through the network: every token it ever had, and which are alive."""

    def __init__(self, config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor) -> None:
        self.config = config
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.prefix = config.class_token + config.distilled + config.reg_tokens
        self.x = self._embed(image.double())
        self.ids = [None] * self.prefix + list(range(len(self.x) - self.prefix))
        self.alive = [True] * len(self.x)
        self.kept: list[list[int]] = []

    @property
    def patches(self) -> list[int]:
        """Rows of the patch and fused tokens that are alive."""
        return [i for i in range(self.prefix, len(self.x)) if self.alive[i]]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _embed(self, image: Tensor) -> Tensor:
        (h, w), (rows, cols) = self.config.patch_size, self.config.grid
        if self.config.stem == "lvvit":
            image, h, w = stem(self.w, image[None])[0], h // 2, w // 2
        kernel = self.w["patch_embed.proj.weight"]
        patches = []
        for r in range(rows):
            for c in range(cols):
                patch = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
                patches.append((kernel * patch).sum((1, 2, 3)) + self.w["patch_embed.proj.bias"])
        x = torch.stack(patches)
        prefix = [self.w[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in self.w]
        pos = self.w["pos_embed"][0]
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + pos])
        return torch.cat([*prefix, x]) + pos

    def attend(self, block: int) -> Tensor:
        """Add the attention branch of a block and return its attention [H, T, T]."""
        name, H = f"blocks.{block}", self.config.num_heads
        D = self.x.shape[1]
        d = D // H
        qkv = self.linear(self.norm(self.x, f"{name}.norm1", self.config.norm_eps), f"{name}.attn.qkv")
        q, k, v = (qkv[:, i * D : (i + 1) * D] for i in range(3))
        hidden = torch.tensor([not a for a in self.alive])
        outputs, attention = [], []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            logits = (q[:, part] @ k[:, part].T / math.sqrt(d)).masked_fill(hidden, -math.inf)
            attention.append(logits.softmax(-1))
            outputs.append(attention[-1] @ v[:, part])
        y = self.linear(torch.cat(outputs, 1), f"{name}.attn.proj")
        self.x = self.x + y * self.w.get(f"{name}.ls1.gamma", 1.0) / self.config.residual_scale
        return torch.stack(attention)

    def add_mlp(self, block: int) -> None:
        """Add the MLP branch of a block."""
        name = f"blocks.{block}"
        h = self.norm(self.x, f"{name}.norm2", self.config.norm_eps)
        y = self.linear(F.gelu(self.linear(h, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        self.x = self.x + y * self.w.get(f"{name}.ls2.gamma", 1.0) / self.config.residual_scale

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Let only these patch rows live and return the rows that died."""
        dropped = [i for i in self.patches if i not in set(rows)]
        for i in dropped:
            self.alive[i] = False
        self.kept.append([self.ids[i] for i in rows])
        return dropped

    def classify(self) -> Tensor:
        """Return logits [classes]."""
        c = self.config
        x = self.x if c.fc_norm else self.norm(self.x, "norm", c.norm_eps)
        rows = [*range(self.prefix), *self.patches] if c.pool_include_prefix else self.patches
        pooled = x[rows].mean(0) if c.global_pool == "avg" else x[0]
        if c.fc_norm:
            pooled = self.norm(pooled, "fc_norm", c.norm_eps)
        logits = self.linear(pooled, "head")
        if c.aux_head:
            logits = logits + 0.5 * self.linear(x[self.patches], "aux_head").max(0).values
        return (logits + self.linear(x[1], "head_dist")) / 2 if c.distilled else logits


def best(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the rows of the highest scores, ties to the lower row."""
    return sorted(scores, key=lambda row: (-scores[row], row))[:count]


def dynamicvit(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    places: Mapping[int, int],
    predictors: str = "prune",
) -> Outcome:
    """Methods section 3: predictors in front of blocks; `places` maps a block to the number of tokens it keeps."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        if block in places:
            stage = list(places).index(block)
            state.keep(best(_predictor(state, f"{predictors}.{stage}"), places[block]))
        state.attend(block)
        state.add_mlp(block)
    return Outcome(state.classify(), state.kept)


def _predictor(state: Image, name: str) -> dict[int, float]:
    """Log-probability of channel 0 (keep) for every patch that is alive."""
    rows, half = state.patches, state.config.embed_dim // 2
    z = F.gelu(state.linear(state.norm(state.x[rows], f"{name}.in_conv.0", 1e-5), f"{name}.in_conv.1"))
    mean = sum(z[i, half:] for i in range(len(rows))) / len(rows)
    scores = {}
    for i, row in enumerate(rows):
        h = torch.cat([z[i, :half], mean])
        for layer in (0, 2):
            h = F.gelu(state.linear(h, f"{name}.out_conv.{layer}"))
        scores[row] = float(state.linear(h, f"{name}.out_conv.4").log_softmax(-1)[0])
    return scores


def evit(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    image: Tensor,
    blocks: Sequence[int],
    rate: float,
    *,
    fuse: bool,
) -> Outcome:
    """Methods section 8.1: mean CLS attention of the same block; the rest is summed into one token, or dropped."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        attention = state.attend(block)
        if block in blocks:
            cls = attention[:, 0].mean(0)
            scores = {row: float(cls[row]) for row in state.patches}
            dropped = state.keep(best(scores, math.ceil(rate * len(scores))))
            if fuse and dropped:
                fused = sum(cls[row] * state.x[row] for row in dropped)
                state.x = torch.cat([state.x, fused[None]])
                state.alive.append(True)
                state.ids.append(FUSED)
        state.add_mlp(block)
    return Outcome(state.classify(), state.kept)


def constant(
    config: ViTConfig, weights: Mapping[str, Tensor], image: Tensor, positions: Mapping[int, Sequence[int]]
) -> Outcome:
    """Section 8.3: in front of a block only the tokens at these positions of the current sequence stay."""
    state = Image(config, weights, image)
    for block in range(config.depth):
        if block in positions:
            current = state.patches
            state.keep([current[i] for i in positions[block]])
        state.attend(block)
        state.add_mlp(block)
    return Outcome(state.classify(), state.kept)


def every(images: Tensor, one: Callable[[Tensor], Outcome]) -> tuple[Tensor, list[list[list[int]]]]:
    """Return logits [B, classes] and, per image and stage, what stayed."""
    outcomes = [one(image) for image in images]
    return torch.stack([o.logits for o in outcomes]).float(), [o.kept for o in outcomes]
