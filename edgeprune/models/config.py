"""What a Vision Transformer is, as data. No torch here: the registry and the manifest read it too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeprune.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)

# The convolutional stem of LV-ViT: kernel and stride of each convolution in front of the patch projection.
STEM_CONVOLUTIONS = ((7, 2), (3, 1), (3, 1))
STEM_STRIDE = 2
STEM_WIDTH = 64
BATCH_NORM_EPS = 1e-5
AUX_WEIGHT = 0.5  # of the best token's class scores beside those of CLS


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a ViT, DeiT or LV-ViT; field names follow timm where it has them.

    Attributes:
        image_size: (height, width) in pixels, multiples of `patch_size`.
        patch_size: (height, width) of a patch in pixels.
        embed_dim: width D of the residual stream.
        mlp_ratio: hidden width of the MLP divided by `embed_dim`.
        class_token: a CLS token stands first.
        distilled: a distillation token stands second, with a head of its own; the two heads are averaged.
        reg_tokens: register tokens after the CLS token.
        no_embed_class: `pos_embed` covers the patches only and is added before the prefix is put in front.
        global_pool: "token" (the head reads CLS) or "avg" (mean over patch tokens).
        pool_include_prefix: the average runs over the prefix tokens too.
        fc_norm: the last LayerNorm stands behind the pooling (`fc_norm`) instead of before it (`norm`).
        aux_head: a second classifier `aux_head` reads every patch token; half of its highest score over the tokens that
            are left, per class, is added to the logits of CLS (LV-ViT). Every row behind the prefix counts as one of
            them, a fused token too.
        stem: "patch" (patches are projected as they are) or "lvvit" (three convolutions with BatchNorm and ReLU halve
            the image first, see `STEM_CONVOLUTIONS`).
        layer_scale: learned per-channel factors `ls1.gamma`, `ls2.gamma` on both branches.
        residual_scale: both branches are divided by it (`skip_lam` of LV-ViT).
        norm_eps: epsilon of every LayerNorm of the backbone.
        mean, std: per-channel normalisation of the training images, in [0, 1] units.
        crop_pct: centre-crop share of the resized image at evaluation.
    """

    name: str
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    global_pool: str = "token"
    pool_include_prefix: bool = False
    fc_norm: bool = False
    aux_head: bool = False
    stem: str = "patch"
    layer_scale: bool = False
    residual_scale: float = 1.0
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            InputError: `model-config` with the offending field.
        """

        def refuse(what: str, expected: str) -> None:
            raise InputError(f"model '{self.name}': {what}", code="model-config", expected=expected)

        for field in ("num_classes", "depth", "embed_dim", "num_heads", "in_chans", "mlp_dim"):
            if getattr(self, field) < 1:
                refuse(f"{field} {getattr(self, field)}", "at least 1")
        if self.reg_tokens < 0:
            refuse(f"reg_tokens {self.reg_tokens}", "0 or more")
        for side, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or side < patch or side % patch:
                refuse(
                    f"image size {self.image_size[0]}x{self.image_size[1]} does not divide into patches of "
                    f"{self.patch_size[0]}x{self.patch_size[1]}",
                    "both sides multiples of the patch size",
                )
        if self.embed_dim % self.num_heads:
            refuse(f"width {self.embed_dim} with {self.num_heads} heads", "a width divisible by the heads")
        if self.global_pool not in ("token", "avg"):
            refuse(f"global_pool '{self.global_pool}'", "'token' or 'avg'")
        if self.global_pool == "token" and not self.class_token:
            refuse("global_pool 'token' without a class token", "class_token=True or global_pool='avg'")
        if self.distilled and (not self.class_token or self.reg_tokens or self.global_pool != "token"):
            refuse("a distilled model with registers or average pooling", "CLS, distillation token, patches")
        if self.pool_include_prefix and self.global_pool != "avg":
            refuse("pool_include_prefix without an average", "global_pool='avg'")
        if self.aux_head and (self.distilled or self.global_pool != "token"):
            refuse("an aux_head with average pooling or a distillation token", "global_pool='token', distilled=False")
        if self.stem not in ("patch", "lvvit"):
            refuse(f"stem '{self.stem}'", "'patch' or 'lvvit'")
        if self.stem == "lvvit" and any(side % STEM_STRIDE for side in self.patch_size):
            refuse(f"patches of {self.patch_size[0]}x{self.patch_size[1]} behind a stem that halves", "even sides")
        if not self.residual_scale > 0:
            refuse(f"residual_scale {self.residual_scale}", "more than 0")
        if self.layer_scale and self.residual_scale != 1:
            refuse("layer_scale and a residual_scale", "one of the two")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])

    @property
    def num_patches(self) -> int:
        """Patch tokens N of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """CLS, distillation and register tokens P; never scored, never pruned."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_pos_tokens(self) -> int:
        """Rows of `pos_embed`."""
        return self.num_patches + (0 if self.no_embed_class else self.num_prefix_tokens)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def proj_chans(self) -> int:
        """Channels that reach the patch projection."""
        return self.in_chans if self.stem == "patch" else STEM_WIDTH

    @property
    def proj_size(self) -> tuple[int, int]:
        """Kernel and stride of the patch projection, in the pixels that reach it."""
        stride = 1 if self.stem == "patch" else STEM_STRIDE
        return (self.patch_size[0] // stride, self.patch_size[1] // stride)

    @property
    def head_reads_patches(self) -> bool:
        """The classifier reads every row of the last block, not only the leading ones."""
        return self.global_pool == "avg" or self.aux_head

    @property
    def num_head_tokens(self) -> int:
        """Leading rows the classifier reads when it pools tokens: CLS, and the distillation token if any."""
        return 2 if self.distilled else 1

    def with_overrides(self, **fields: Any) -> ViTConfig:
        """Return a copy with other values; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in fields.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
