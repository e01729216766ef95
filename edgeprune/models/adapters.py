"""ViT objects and checkpoints of timm and transformers in our terms. Neither package is imported here.

A module is read by its attributes, and then checked: the ViT its parts describe must give its logits. So a
module with a forward pass of its own (merged tokens, another block order) is refused, not quietly changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import InputError
from edgeprune.models.config import INCEPTION_MEAN, INCEPTION_STD, ViTConfig
from edgeprune.models.vit import VisionTransformer

# timm's float32 attention is not bit-equal to ours; a forward pass that differs is off by far more than this.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_ANCHOR = "embeddings.patch_embeddings.projection.weight"
_PARTS = {  # transformers, old and new names -> timm
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_TOP = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_NEVER_READ = ("pooler.", "embeddings.mask_token")  # by a classifier


class NotRepresentableError(Exception):
    """The module is no ViT that `ViTConfig` can describe; the text is the reason. It can still be traced."""


def from_transformers_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of a transformers ViT or DeiT under our keys; None when the keys are not theirs.

    Query, key and value become `qkv`. The distillation token of a model without a distillation head is a
    register: it takes part and is not read. Pooler and mask token, which no classifier reads, are left out;
    unknown names stay as they are.
    """
    anchor = next((k for k in tensors if k.endswith(_ANCHOR)), None)
    if anchor is None:
        return None
    prefix = anchor.removesuffix(_ANCHOR)
    second = "dist_token" if "distillation_classifier.weight" in tensors else "reg_token"
    tokens = {"cls_token": "cls_token", "position_embeddings": "pos_embed", "distillation_token": second}
    ours: dict[str, Tensor] = {}
    separate: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        part, _, leaf = name.rpartition(".")
        layer = re.match(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", part)
        target = _PARTS.get(layer[2]) if layer else _TOP.get(part)
        if name.startswith(_NEVER_READ):
            continue
        if part == "embeddings" and leaf in tokens:
            ours[tokens[leaf]] = tensor
        elif layer and target in ("q", "k", "v"):
            separate.setdefault(f"blocks.{layer[1]}.attn.qkv.{leaf}", {})[target] = tensor
        elif target is not None:
            ours[f"blocks.{layer[1]}.{target}.{leaf}" if layer else f"{target}.{leaf}"] = tensor
        else:
            ours[key] = tensor
    for key, parts in separate.items():
        if len(parts) == 3:
            ours[key] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return ours


def never_read(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys `from_transformers_keys` leaves out; none of a checkpoint with other keys."""
    anchor = next((k for k in tensors if k.endswith(_ANCHOR)), None)
    if anchor is None:
        return []
    prefix = anchor.removesuffix(_ANCHOR)
    return [key for key in tensors if key.removeprefix(prefix).startswith(_NEVER_READ)]


def from_module(module: nn.Module) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Return the configuration and the weights of a timm or transformers ViT: float32, CPU, our keys.

    Understood are timm's `VisionTransformer` and `VisionTransformerDistilled`, and transformers'
    `ViTForImageClassification`, `DeiTForImageClassification` and `DeiTForImageClassificationWithTeacher`.
    Dropout is left out. A transformers module does not know its preprocessing: mean and std are the usual
    ones of its type, and `with_overrides` sets others.

    Raises:
        NotRepresentableError: with the reason; trace such a module instead.
    """
    kind = type(module).__name__
    try:
        if kind in ("VisionTransformer", "VisionTransformerDistilled"):
            config = _timm_config(module)
            tensors = dict(module.state_dict())
        elif kind in (
            "ViTForImageClassification",
            "DeiTForImageClassification",
            "DeiTForImageClassificationWithTeacher",
        ):
            tensors = from_transformers_keys(module.state_dict()) or {}
            config = _transformers_config(module, tensors)
        else:
            raise NotRepresentableError(f"{kind} is neither timm's VisionTransformer nor transformers' ViT or DeiT")
        with torch.device("meta"):
            vit = VisionTransformer(config).eval()
    except (AttributeError, TypeError, InputError) as error:
        reason = error.message if isinstance(error, InputError) else str(error)
        raise NotRepresentableError(f"{kind} is not built as expected: {reason}") from error

    tensors = {k: v.detach().cpu().float() for k, v in tensors.items()}
    wanted = {k: v.shape for k, v in vit.state_dict().items()}
    for what, keys in (
        ("has weights a plain ViT lacks", tensors.keys() - wanted.keys()),
        ("lacks weights of a plain ViT", wanted.keys() - tensors.keys()),
        (
            "has weights of other shapes",
            {k for k in wanted if k in tensors and tensors[k].shape != wanted[k]},
        ),
    ):
        if keys:
            raise NotRepresentableError(f"{kind} {what}: {', '.join(sorted(keys)[:4])}")
    vit.load_state_dict(tensors, assign=True)
    _check_logits(module, vit)
    return config, tensors


def _timm_config(module: Any) -> ViTConfig:
    patch, block = module.patch_embed, module.blocks[0]
    _refuse_unless(type(block).__name__ == "Block", f"its blocks are of type {type(block).__name__}")
    _refuse_unless(isinstance(module.head, nn.Linear), "it has no linear classifier")
    pool = getattr(module, "global_pool", "token")
    _refuse_unless(pool in ("token", "avg"), f"it pools by '{pool}'")
    for b in module.blocks:
        _refuse_unless(_is_gelu(b.mlp.act), f"its activation is {b.mlp.act}, not the exact GELU")
    cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    D, hidden = module.head.in_features, block.mlp.fc1.out_features
    fc_norm = isinstance(getattr(module, "fc_norm", None), nn.LayerNorm)
    reg_token = getattr(module, "reg_token", None)
    known: dict[str, Any] = {k: tuple(cfg[k]) for k in ("mean", "std") if cfg.get(k) is not None}
    known |= {k: cfg[k] for k in ("crop_pct", "interpolation") if cfg.get(k) is not None}
    return ViTConfig(
        name=cfg.get("architecture") or f"vit_{D}",
        image_size=_pair(patch.img_size),
        patch_size=_pair(patch.patch_size),
        in_chans=patch.proj.in_channels,
        num_classes=module.head.out_features,
        embed_dim=D,
        depth=len(module.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=_mlp_ratio(hidden, D),
        qkv_bias=block.attn.qkv.bias is not None,
        class_token=getattr(module, "cls_token", None) is not None,
        distilled=getattr(module, "dist_token", None) is not None,
        reg_tokens=0 if reg_token is None else reg_token.shape[1],
        no_embed_class=bool(getattr(module, "no_embed_class", False)),
        global_pool=pool,
        pool_include_prefix=pool == "avg" and bool(getattr(module, "pool_include_prefix", False)),
        fc_norm=fc_norm,
        layer_scale=hasattr(block, "ls1") and hasattr(block.ls1, "gamma"),
        norm_eps=_norm_eps(module),
        **known,
    )


def _transformers_config(module: Any, tensors: Mapping[str, Tensor]) -> ViTConfig:
    c = module.config
    _refuse_unless(c.hidden_act == "gelu", f"its activation is '{c.hidden_act}', not the exact GELU")
    _refuse_unless("head.weight" in tensors, "it has no linear classifier")
    is_deit = type(module).__name__.startswith("DeiT")
    statistics: dict[str, Any] = {} if is_deit else {"mean": INCEPTION_MEAN, "std": INCEPTION_STD}
    return ViTConfig(
        name=str(getattr(c, "name_or_path", "") or c.model_type).rstrip("/").rsplit("/", 1)[-1],
        image_size=_pair(c.image_size),
        patch_size=_pair(c.patch_size),
        in_chans=c.num_channels,
        num_classes=tensors["head.weight"].shape[0],
        embed_dim=c.hidden_size,
        depth=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        mlp_ratio=_mlp_ratio(c.intermediate_size, c.hidden_size),
        qkv_bias=bool(c.qkv_bias),
        distilled="dist_token" in tensors,
        reg_tokens=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        norm_eps=_norm_eps(module),
        **statistics,
    )


def _refuse_unless(holds: bool, reason: str) -> None:
    if not holds:
        raise NotRepresentableError(reason)


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Iterable) else (value, value)
    return int(pair[0]), int(pair[1])


def _is_gelu(act: nn.Module) -> bool:
    return type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"


def _mlp_ratio(hidden: int, dim: int) -> float:
    """Return the ratio that `int(dim * ratio)` turns back into `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _norm_eps(module: nn.Module) -> float:
    found = {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}
    _refuse_unless(len(found) == 1, f"its LayerNorms have the epsilons {sorted(found)}, one is expected")
    return found.pop()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation and back, every submodule to the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _check_logits(module: nn.Module, vit: VisionTransformer) -> None:
    """Raise NotRepresentableError unless both give the same logits on one noise image."""
    config, like = vit.config, next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, config.in_chans, *config.image_size, generator=generator)
    with torch.no_grad(), _evaluating(module):
        try:
            out = module(image.to(like))
        except Exception as error:
            raise NotRepresentableError(f"it cannot be run on one image: {error}") from error
        theirs = getattr(out, "logits", out)
        ours = vit(image)
    _refuse_unless(isinstance(theirs, Tensor) and theirs.shape == ours.shape, "its output is not one row of logits")
    difference = (theirs.cpu().float() - ours).abs().max() / ours.abs().max().clamp(min=1e-6)
    tolerance = LOGITS_TOLERANCE.get(like.dtype, 0.0)
    reason = "its logits differ from those of the ViT its parts describe"
    _refuse_unless(bool(difference <= tolerance), f"{reason} (relative {difference:.1e}, allowed {tolerance:.0e})")
