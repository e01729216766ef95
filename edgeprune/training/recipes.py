"""Default hyper-parameters per method and kind of data. Plain data, no torch.

The recipes for image folders carry over what the papers' code uses; two things are not carried over and belong to a
full reproduction: mixup, cutmix, RandAugment and random erasing, and averaging of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FROZEN_EMBEDDINGS = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and with which losses a method trains. AdamW, linear warm-up, then cosine.

    Attributes:
        source: where the values come from.
        batch_size: images per step; `lr` belongs to it and is not rescaled with it.
        lr: peak learning rate of the weights of the stages, and of the backbone times `backbone_lr_scale`.
        min_lr: learning rate at the end, in the same sense.
        warmup_epochs: length of the linear warm-up.
        weight_decay: of matrices; vectors, tokens and position embeddings have none.
        clip_grad: largest norm of the gradient, 0 for no limit.
        label_smoothing: of the classification loss.
        backbone_lr_scale: the backbone's learning rate as a share of `lr`.
        backbone_freeze_epochs: epochs at the start in which the backbone does not move.
        frozen: parameters of the backbone that never move.
        ratio_weight, distill_weight, token_weight: of the losses in `edgeprune.training.losses`.
        keep_warmup: (epoch at which the keep rate begins to fall from 1, epochs its fall takes, as a cosine).
        curriculum: shares of the training between which the difficulty of the data rises from 0 to 1.
    """

    source: str
    epochs: int
    batch_size: int
    lr: float
    min_lr: float = 1e-6
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    label_smoothing: float = 0.1
    backbone_lr_scale: float = 1.0
    backbone_freeze_epochs: int = 0
    frozen: tuple[str, ...] = ()
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5
    keep_warmup: tuple[float, float] = (0.0, 0.0)
    curriculum: tuple[float, float] = (0.0, 0.0)


_SCRATCH = Recipe(
    source="DeiT (arXiv 2012.12877): AdamW, 5e-4 per 512 images, 300 epochs",
    epochs=300,
    batch_size=128,
    lr=1.25e-4,
    min_lr=1e-5,
    warmup_epochs=5,
)
_FINETUNE = Recipe(
    source="EViT (arXiv 2202.07800), finetune.sh: 2e-5 per 512 images, keep rate from the start",
    epochs=30,
    batch_size=128,
    lr=5e-6,
    min_lr=5e-7,
    weight_decay=1e-6,
)

# (method, starts from a checkpoint)
FOLDER_RECIPES: dict[tuple[str, bool], Recipe] = {
    ("dense", False): _SCRATCH,
    ("dense", True): _FINETUNE,
    ("evit", False): replace(
        _SCRATCH, source="EViT (arXiv 2202.07800), run_code.sh: DeiT's recipe, keep rate falls", keep_warmup=(10, 100)
    ),
    ("evit", True): _FINETUNE,
    ("random", False): _SCRATCH,
    ("random", True): _FINETUNE,
    ("dynamicvit", True): Recipe(
        source="DynamicViT (arXiv 2106.02034), official README: 1e-3 per 1024 images, DeiT-S",
        epochs=30,
        batch_size=128,
        lr=1.25e-4,
        warmup_epochs=5,
        backbone_lr_scale=0.01,
        backbone_freeze_epochs=5,
        frozen=FROZEN_EMBEDDINGS,
    ),
}

_DIGITS_SCRATCH = Recipe(
    source="chosen for the digits: short, small steps, from digits of one class to the full clutter",
    epochs=32,
    batch_size=16,
    lr=1e-3,
    min_lr=1e-5,
    warmup_epochs=0.5,
    clip_grad=1.0,
    label_smoothing=0.05,
    curriculum=(0.05, 0.3),
)
_DIGITS_FINETUNE = replace(
    _DIGITS_SCRATCH,
    source="chosen for the digits",
    epochs=4,
    lr=2e-4,
    warmup_epochs=0.25,
    curriculum=(0.0, 0.0),
)

DIGITS_RECIPES: dict[tuple[str, bool], Recipe] = {
    ("dense", False): _DIGITS_SCRATCH,
    ("dense", True): _DIGITS_FINETUNE,
    ("evit", False): replace(_DIGITS_SCRATCH, keep_warmup=(8.0, 8.0)),
    ("evit", True): _DIGITS_FINETUNE,
    ("random", False): _DIGITS_SCRATCH,
    ("random", True): _DIGITS_FINETUNE,
    ("dynamicvit", True): replace(
        _DIGITS_FINETUNE,
        source="DynamicViT's losses and frozen embeddings; lengths and rates chosen for the digits",
        lr=1e-3,
        backbone_lr_scale=0.2,
        frozen=FROZEN_EMBEDDINGS,
    ),
}
