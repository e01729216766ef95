"""Hyper-parameters as named presets. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

FROZEN_EMBEDDINGS = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and with which losses a method trains. AdamW, linear warm-up, then cosine.

    Attributes:
        source: where the values come from, and which are ours.
        epochs: passes over the data.
        batch_size: images per step, of all processes together.
        lr: peak learning rate of the weights of the stages, and of the backbone times `backbone_lr_scale`.
        lr_batch: images per step that `lr` and `min_lr` belong to; they scale linearly with the batch. 0: as they are.
        min_lr: learning rate at the end, in the same sense.
        warmup_epochs: length of the linear warm-up.
        weight_decay: of matrices; vectors, tokens and position embeddings have none.
        clip_grad: largest norm of the gradient, 0 for no limit.
        label_smoothing: of the classification loss.
        backbone_lr_scale: the backbone's learning rate as a share of `lr`.
        backbone_freeze_epochs: epochs at the start in which the backbone does not move.
        layer_decay: factor between the learning rates of one block and the next deeper one; 1 for none.
        frozen: parameters of the backbone that never move.
        ratio_weight, distill_weight, token_weight: of the losses in `edgeprune.training.losses`.
        budget, budget_weight: operations to reach as a share of the dense model's, and the weight of that loss.
        threshold_temperature: of the sigmoid that stands in for AS-ViT's thresholds in the gradient.
        attention_weight: of SaiT's loss on token scores.
        aux_weight: of the losses of Cropr's auxiliary heads.
        keep_warmup: (epoch at which the keep rate begins to fall from 1, epochs its fall takes, as a cosine).
        curriculum: shares of the training between which the difficulty of the data rises from 0 to 1.
        ema_decay: of the moving average of the weights, which is written beside the weights; 0 for none.
        mixup, cutmix: parameters of the beta distributions, 0 for none.
        mixup_prob: share of the batches that are mixed.
        mixup_switch: share of CutMix among them when both are on.
        rand_augment, color_jitter, random_erase, repeated_augmentation: see `edgeprune.data.augment.Augmentation`.
        drop_path: share of images that skip the last block's branches; falls linearly to 0 at the first block.
        note: something a user of the preset has to know.
    """

    source: str
    epochs: int
    batch_size: int
    lr: float
    lr_batch: int = 0
    min_lr: float = 1e-6
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    label_smoothing: float = 0.1
    backbone_lr_scale: float = 1.0
    backbone_freeze_epochs: int = 0
    layer_decay: float = 1.0
    frozen: tuple[str, ...] = ()
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5
    budget: float = 0.65
    budget_weight: float = 2.0
    threshold_temperature: float = 1e-4
    attention_weight: float = 1.0
    aux_weight: float = 1.0
    keep_warmup: tuple[float, float] = (0.0, 0.0)
    curriculum: tuple[float, float] = (0.0, 0.0)
    ema_decay: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch: float = 0.5
    rand_augment: str | None = None
    color_jitter: float = 0.0
    random_erase: float = 0.0
    repeated_augmentation: bool = False
    drop_path: float = 0.0
    note: str = ""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def scaled(self) -> Recipe:
        """Return the recipe with the learning rates that belong to its own batch size."""
        factor = self.batch_size / self.lr_batch if self.lr_batch else 1.0
        return replace(self, lr=self.lr * factor, min_lr=self.min_lr * factor, lr_batch=0)


_IMAGENET = Recipe(
    source="",
    epochs=300,
    batch_size=1024,
    lr=5e-4,
    lr_batch=512,
    mixup=0.8,
    cutmix=1.0,
    rand_augment="m9-n2-mstd0.5",
    random_erase=0.25,
)
_DEIT = replace(
    _IMAGENET,
    source="DeiT (arXiv 2012.12877): 300 epochs, 5e-4 per 512 images, EMA 0.99996, repeated "
    "augmentation, drop path 0.1",
    min_lr=5e-6,
    warmup_epochs=5,
    ema_decay=0.99996,
    repeated_augmentation=True,
    drop_path=0.1,
)
_FINETUNE = replace(
    _IMAGENET,
    source="EViT (arXiv 2202.07800), finetune.sh: 30 epochs, 2e-5 per 512 images, no warm-up, keep rate from the "
    "start; augmentation and EMA as DeiT",
    epochs=30,
    batch_size=512,
    lr=2e-5,
    min_lr=2e-6,
    weight_decay=1e-6,
    ema_decay=0.99996,
    repeated_augmentation=True,
)
_DYNAMICVIT = replace(
    _IMAGENET,
    source="DynamicViT (arXiv 2106.02034), official README and defaults for DeiT-T/S: 30 epochs, 1e-3 per 1024 images, "
    "backbone 0.01 of it and still for 5 epochs, EMA 0.9999",
    epochs=30,
    lr=1e-3,
    lr_batch=1024,
    warmup_epochs=5,
    backbone_lr_scale=0.01,
    backbone_freeze_epochs=5,
    frozen=FROZEN_EMBEDDINGS,
    ema_decay=0.9999,
)
_SAIT_NOTE = (
    "US patent 12,299,960 B2 covers training that alternates dense and sparse epochs, as SaiT does; "
    "ask a lawyer before commercial use"
)

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
    epochs=3,
    lr=2e-4,
    warmup_epochs=0.25,
    curriculum=(0.0, 0.0),
)

PRESETS: dict[str, Recipe] = {
    "dense-scratch": _DEIT,
    "dense-finetune": replace(
        _FINETUNE, source="as evit-finetune, the fine-tuning recipe of EViT (arXiv 2202.07800); for dense models ours"
    ),
    "dynamicvit": _DYNAMICVIT,
    "dynamicvit-base": replace(
        _DYNAMICVIT,
        source="DynamicViT (arXiv 2106.02034), official README for DeiT-B: as dynamicvit, ratio weight 5, "
        "drop path 0.2",
        ratio_weight=5.0,
        drop_path=0.2,
    ),
    "dynamicvit-lvvit": replace(
        _DYNAMICVIT,
        source="DynamicViT (arXiv 2106.02034) for LV-ViT: as dynamicvit; the token loss is a KL divergence of the "
        "auxiliary head's scores where the model has one",
    ),
    "evit-scratch": replace(
        _DEIT,
        source="EViT (arXiv 2202.07800), run_code.sh: DeiT's recipe, keep rate 1 to epoch 10, then falls over "
        "100 epochs",
        keep_warmup=(10, 100),
    ),
    "evit-finetune": _FINETUNE,
    "asvit": replace(
        _FINETUNE,
        source="AS-ViT, finetune.sh: 30 epochs, 2e-5 per 512 images, no warm-up, weight decay 1e-6, EMA 0.99996, "
        "repeated augmentation, budget 0.65 with weight 2, distillation 0.5; published with fp16 "
        "(--mixed-precision fp16)",
    ),
    "ats": replace(
        _IMAGENET,
        source="third party: TokenReduction's recipe for all methods, 30 epochs, 1e-3 per 1024 images, 20 epochs of "
        "warm-up; the paper's own was not readable; augmentation as DeiT, ours",
        epochs=30,
        lr=1e-3,
        lr_batch=1024,
        warmup_epochs=20,
    ),
    "sait": replace(
        _FINETUNE,
        source="ours: no recipe of SaiT (arXiv 2210.05832) is published; lengths and rates of evit-finetune",
        note=_SAIT_NOTE,
    ),
    "cropr": replace(
        _IMAGENET,
        source="Token Cropr, official code and logs for ImageNet: 50 epochs, 5 of warm-up, 1e-3 per 256 images at "
        "1024, layer decay 0.75, drop path 0.2",
        epochs=50,
        lr=1e-3,
        lr_batch=256,
        min_lr=2.5e-7,
        warmup_epochs=5,
        layer_decay=0.75,
        drop_path=0.2,
    ),
    "tome": replace(_DEIT, source="ToMe (arXiv 2210.09461) trains with DeiT's recipe; see dense-scratch"),
    "random": replace(_FINETUNE, source="ours: evit-finetune with random tokens, so that both can be compared"),
    "digits-scratch": _DIGITS_SCRATCH,
    "digits-finetune": _DIGITS_FINETUNE,
    "digits-evit-scratch": replace(_DIGITS_SCRATCH, keep_warmup=(8.0, 8.0)),
    "digits-evit": replace(
        _DIGITS_FINETUNE, source="chosen for the digits; at the other methods' 2e-4 one of three seeds broke", lr=5e-5
    ),
    "digits-dynamicvit": replace(
        _DIGITS_FINETUNE,
        source="DynamicViT's losses and frozen embeddings; lengths and rates chosen for the digits",
        lr=1e-3,
        backbone_lr_scale=0.2,
        frozen=FROZEN_EMBEDDINGS,
    ),
    "digits-asvit": replace(
        _DIGITS_FINETUNE,
        source="AS-ViT's losses; lengths and rates chosen for the digits; the budget's weight is the published one "
        "times the ratio of DeiT-S's operations to this model's, since the loss counts operations, and the temperature "
        "as much wider as an image has fewer tokens",
        lr=1e-4,
        backbone_lr_scale=2.0,
        budget=0.6,
        budget_weight=190.0,
        threshold_temperature=3e-4,
    ),
    "digits-sait": replace(_DIGITS_FINETUNE, note=_SAIT_NOTE),
}

# (method, starts from a checkpoint) -> preset
DIGITS_RECIPES: dict[tuple[str, bool], str] = {
    ("dense", False): "digits-scratch",
    ("dense", True): "digits-finetune",
    ("evit", False): "digits-evit-scratch",
    ("evit", True): "digits-evit",
    ("random", False): "digits-scratch",
    ("random", True): "digits-finetune",
    ("dynamicvit", True): "digits-dynamicvit",
    ("ats", True): "digits-finetune",
    ("asvit", True): "digits-asvit",
    ("sait", True): "digits-sait",
    ("cropr", True): "digits-finetune",
    ("tome", False): "digits-scratch",
    ("tome", True): "digits-finetune",
}
FOLDER_RECIPES: dict[tuple[str, bool], str] = {
    ("dense", False): "dense-scratch",
    ("dense", True): "dense-finetune",
    ("evit", False): "evit-scratch",
    ("evit", True): "evit-finetune",
    ("random", False): "dense-scratch",
    ("random", True): "random",
    ("dynamicvit", True): "dynamicvit",
    ("ats", True): "ats",
    ("asvit", True): "asvit",
    ("sait", True): "sait",
    ("cropr", True): "cropr",
    ("tome", False): "tome",
    ("tome", True): "dense-finetune",
}


def default_recipe(method: str, model: str, *, digits: bool, checkpoint: bool) -> str | None:
    """Return the name of the preset for a method, a model and a kind of data; None when the method needs weights."""
    name = (DIGITS_RECIPES if digits else FOLDER_RECIPES).get((method, checkpoint))
    if name == "dynamicvit" and "base" in model:
        return "dynamicvit-base"
    return "dynamicvit-lvvit" if name == "dynamicvit" and model.startswith("lvvit") else name
