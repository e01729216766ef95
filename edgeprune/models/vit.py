"""The backbone in torch, with timm's state_dict keys. It is the reference of every export and the training model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.models.config import AUX_WEIGHT, BATCH_NORM_EPS, STEM_CONVOLUTIONS, STEM_WIDTH, ViTConfig


class Attention(nn.Module):
    """Multi-head self-attention with timm's keys `qkv` and `proj`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = config.head_dim**-0.5
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [B, H, T, d], of x [B, T, D]."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, context: Tensor) -> Tensor:
        """Return the projected output [B, T, D] of per-head outputs [B, H, T, d]."""
        B, H, T, d = context.shape
        return self.proj(context.transpose(1, 2).reshape(B, T, H * d))

    def probabilities(self, q: Tensor, k: Tensor, policy: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return attention [B, H, Tq, Tk].

        Args:
            q: [B, H, Tq, d].
            k: [B, H, Tk, d].
            policy: [B, Tk] in {0, 1}, for the masked softmax of `policy_softmax`.
            bias: added to the logits, for example [B, 1, 1, Tk].
        """
        logits = (q @ k.transpose(-2, -1)) * self.scale
        logits = logits if bias is None else logits + bias
        return logits.softmax(-1) if policy is None else policy_softmax(logits, policy)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Return the attention branch [B, T, D] of normed tokens x [B, T, D]."""
        q, k, v = self.heads(x)
        if policy is None:
            return self.merge(F.scaled_dot_product_attention(q, k, v))
        return self.merge(self.probabilities(q, k, policy) @ v)


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the tokens a policy keeps, differentiable in the policy.

    Every token may attend to itself. The maximum runs over all keys and the sums over T run in float32.

    Args:
        logits: [B, H, T, T] scaled attention logits.
        policy: [B, T] in {0, 1}, prefix tokens 1; carries gradient.
        eps: leak that keeps the gradient of dropped keys alive.

    Returns:
        [B, H, T, T] in the dtype of `logits`.

    Source: DynamicViT (arXiv 2106.02034) section 3.3, eq. 11.
    """
    T = logits.shape[-1]
    keep = policy.float()[:, None, None, :]
    eye = torch.eye(T, dtype=keep.dtype, device=keep.device)
    weights = (logits - logits.amax(-1, keepdim=True)).float().exp() * (keep + (1 - keep) * eye)
    return ((weights + eps / T) / (weights.sum(-1, keepdim=True) + eps)).to(logits.dtype)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, D] of [B, T, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Per-channel factor, timm key `gamma`."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Return x scaled per channel."""
        return x * self.gamma


class ResidualScale(nn.Module):
    """Division of a branch by a constant, without weights.

    Source: LV-ViT (arXiv 2104.10858), `skip_lam` of the official code.
    """

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        """Return x divided."""
        return x / self.divisor


def branch_scale(config: ViTConfig) -> nn.Module:
    """Return what stands between a branch and the residual sum."""
    if config.layer_scale:
        return LayerScale(config.embed_dim)
    return nn.Identity() if config.residual_scale == 1 else ResidualScale(config.residual_scale)


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        branch_scale: while training with stochastic depth, factors [B, 1, 1] of the attention and the MLP branch:
            0 for images that skip it, more than 1 for the others.
    """

    branch_scale: tuple[Tensor, Tensor] | None = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = branch_scale(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = branch_scale(config)

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return x plus the MLP branch; [B, T, D]."""
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if self.branch_scale is None else branch * self.branch_scale[1])

    def add_attention(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return x plus the output of the attention; both [B, T, D]."""
        branch = self.ls1(attention)
        return x + (branch if self.branch_scale is None else branch * self.branch_scale[0])

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Return the block's output [B, T, D]; `policy` [B, T] masks tokens while training."""
        return self.add_mlp(self.add_attention(x, self.attn(self.norm1(x), policy)))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each; timm key `proj`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, N, D] of images [B, C, H, W]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Halve the image by convolutions with BatchNorm and ReLU, then cut and project; keys of LV-ViT.

    Source: LV-ViT (arXiv 2104.10858); keys `conv1`, `bn1` to `bn3` and `proj` of the official code.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.in_chans
        for i, (kernel, stride) in enumerate(STEM_CONVOLUTIONS, 1):
            conv = nn.Conv2d(width, STEM_WIDTH, kernel, stride=stride, padding=kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(STEM_WIDTH, eps=BATCH_NORM_EPS))
            width = STEM_WIDTH
        self.proj = nn.Conv2d(width, config.embed_dim, config.proj_size, stride=config.proj_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, N, D] of images [B, C, H, W]."""
        x = images
        for i in range(1, len(STEM_CONVOLUTIONS) + 1):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            x = F.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT, DeiT and LV-ViT, distilled or not, with registers or not, pooled by token or by average.

    Args:
        config: the architecture; weights start as timm's do (truncated normal, 0.02).

    Source: ViT (arXiv 2010.11929), DeiT (arXiv 2012.12877), registers (arXiv 2309.16588), LV-ViT (arXiv 2104.10858).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config) if config.stem == "patch" else ConvStem(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_pos_tokens, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.norm = nn.Identity() if config.fc_norm else norm
        self.fc_norm = norm if config.fc_norm else nn.Identity()
        self.head = nn.Linear(D, config.num_classes)
        if config.distilled:
            self.head_dist = nn.Linear(D, config.num_classes)
        if config.aux_head:
            self.aux_head = nn.Linear(D, config.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw linear weights, tokens and position embeddings from a truncated normal of 0.02; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name == "pos_embed" or name.endswith("_token"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Return the token sequence [B, P+N, D] of images [B, C, H, W]."""
        x = self.patch_embed(images)
        names = ("cls_token", "dist_token", "reg_token")
        prefix = [getattr(self, name).expand(len(x), -1, -1) for name in names if hasattr(self, name)]
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + self.pos_embed], 1)
        return torch.cat([*prefix, x], 1) + self.pos_embed

    def classify(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return logits [B, classes] of the last block's output.

        Args:
            x: [B, P+N, D].
            valid: [B, N] bool, the patch tokens an average or the aux head's maximum runs over; a mask in {0, 1} may be
                float and then passes its gradient to the average. None means all. A head that reads the prefix alone
                has no use for it.
        """
        if self.config.global_pool == "avg":
            return self.head(self.fc_norm(self.average(x, valid)))
        if self.config.aux_head:
            return add_best_token(*self.class_and_token_logits(x), valid)
        x = self.fc_norm(self.norm(x[:, : self.config.num_head_tokens]))
        logits = self.head(x[:, 0])
        return (logits + self.head_dist(x[:, 1])) / 2 if self.config.distilled else logits

    def average(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean [B, D] of the normed tokens `classify` pools; 0 when there are none."""
        P, prefix_too = self.config.num_prefix_tokens, self.config.pool_include_prefix
        x = self.norm(x if prefix_too else x[:, P:])
        if valid is None:
            return x.mean(1)
        weight = valid.to(x.dtype)
        weight = (torch.cat([weight.new_ones(len(x), P), weight], 1) if prefix_too else weight).unsqueeze(-1)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)

    def class_and_token_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the two heads of a model with `aux_head` say: of CLS [B, classes], per patch [B, N, classes]."""
        x = self.fc_norm(self.norm(x))
        return self.head(x[:, 0]), self.aux_head(x[:, self.config.num_prefix_tokens :])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalised images [B, C, H, W]."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


def add_best_token(class_logits: Tensor, token_logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the logits [B, classes] of a model with an aux head.

    Args:
        class_logits: [B, classes] of CLS.
        token_logits: [B, N, classes] of the patch tokens.
        valid: [B, N] in {0, 1}, the tokens whose maximum counts; None means all. An image without one gets nothing
            added.

    Source: LV-ViT (arXiv 2104.10858), evaluation of the official code; DynamicViT takes it over the tokens it keeps.
    """
    if valid is None:
        return class_logits + AUX_WEIGHT * token_logits.amax(1)
    keep = valid > 0.5
    best = token_logits.masked_fill(~keep.unsqueeze(-1), -torch.inf).amax(1)
    return class_logits + AUX_WEIGHT * torch.where(keep.any(1, keepdim=True), best, 0.0)
