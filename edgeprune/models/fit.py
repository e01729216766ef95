"""Fit the weights of a checkpoint into a model, strictly: every key is used, missing or named in an error."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeprune.errors import (
    EdgepruneError,
    EdgepruneWarning,
    InputError,
)
from edgeprune.models.adapters import from_transformers_keys
from edgeprune.models.checkpoint import Checkpoint, listed
from edgeprune.models.config import STEM_STRIDE, ViTConfig
from edgeprune.models.metadata import read_metadata
from edgeprune.models.registry import MODELS
from edgeprune.models.vit import VisionTransformer

# What the keys of other architectures look like, first match wins.
FAMILIES = (
    (r"^(aux_head|patch_embed\.conv1)\.", "an LV-ViT"),
    (r"^layers\.\d+\.blocks\.", "a Swin Transformer"),
    (r"^(stages\.\d+|downsample_layers\.\d+)\.", "a ConvNeXt or another model in stages"),
    (r"^layer1\.\d+\.", "a ResNet"),
    (r"^blocks\.\d+\.\d+\.", "an EfficientNet or MobileNet"),
    (r"^features\.\d+\.", "a torchvision convolutional network"),
    (r"^(conv_proj|encoder\.layers\.encoder_layer_0)\.", "a torchvision ViT"),
    (r"^(visual|vision_model)\.", "a CLIP model"),
    (r"encoder\.layer\.\d+\.", "a Hugging Face transformers encoder"),
)

# What the weights of stages look like by either name: pattern, what they are, the --method that has them.
STAGE_KINDS = (
    (r"^(score_predictor|prune)\.\d+\.(in_conv|out_conv)\.", "token predictors", "dynamicvit"),
    (r"^(score_predictor|prune)\.\d+\.keep_threshold$", "learned thresholds", "asvit"),
    (r"^(cropr|prune)\.\d+\.(cross_attn|head)\.", "learned queries", "cropr"),
    (r"\.attn\.out_zero_mask$", "masks of its training", "ats"),
)
STAGE_KEY = r"^(score_predictor|cropr|prune)\.(\d+)\.|\.attn\.out_zero_mask$"


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights.

    Attributes:
        matched: weights of the model that came from the checkpoint.
        missing: weights that kept their initial values, because the caller allowed it.
        unused: keys of the checkpoint that were left, because the caller allowed it.
        resized: what was interpolated, for example "pos_embed 14x14 -> 24x24".
        cast: changes of the number format with their counts, for example "152 float16 -> float32".
    """

    matched: int
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


def load_into(
    model: VisionTransformer,
    checkpoint: Checkpoint,
    *,
    key_prefixes: Mapping[str, str] | None = None,
    ignore_prefixes: Sequence[str] = (),
    fresh_prefixes: Sequence[str] = (),
    ignore_pattern: str | None = None,
) -> LoadReport:
    """Put a checkpoint's weights into a model; the model takes the tensors over, nothing is copied.

    Keys are timm's, the official ones of a method, or those of a transformers ViT or DeiT. Half precision
    becomes float32, position embeddings are resized to the model's grid. The model may be on the meta device.

    Args:
        model: gets the weights.
        checkpoint: from `load_checkpoint`.
        key_prefixes: official prefix -> ours, `Method.key_prefixes`.
        ignore_prefixes: keys, by either name, that may be left over.
        ignore_pattern: regular expression found in keys, by either name, that may be left over.
        fresh_prefixes: keys of ours that may be missing and keep their initial values.

    Raises:
        InputError: `checkpoint-foreign`, `checkpoint-shape`, `checkpoint-dtype`, `checkpoint-mismatch`; the
            model stays as it was.
    """
    source = from_transformers_keys(checkpoint.tensors) or checkpoint.tensors
    origin = {_our_key(k, key_prefixes or {}): k for k in source}
    state = model.state_dict()
    wanted = {k: v.shape for k, v in state.items()}
    ignored = tuple(ignore_prefixes)
    extra = [k for k in origin if k not in wanted]
    unused = [
        origin[k]
        for k in extra
        if any(
            name.startswith(ignored) or (ignore_pattern is not None and re.search(ignore_pattern, name))
            for name in (k, origin[k])
        )
    ]
    left = [origin[k] for k in extra if origin[k] not in unused]
    missing = [k for k in wanted if k not in origin]
    fresh = [k for k in missing if k.startswith(tuple(fresh_prefixes))]

    fit = _Fit(model.config, checkpoint.file, {k: source[v] for k, v in origin.items()}, checkpoint.metadata)
    tensors = {k: source[origin[k]] for k in wanted if k in origin}
    if not any(k.startswith("blocks.") for k in tensors):
        raise fit.foreign()
    if wrong := [k for k, v in tensors.items() if not _same_shape(k, v.shape, wanted[k])]:
        raise fit.wrong_shapes({k: (tuple(tensors[k].shape), tuple(wanted[k])) for k in wrong})
    if integers := [k for k, v in tensors.items() if state[k].is_floating_point() and not v.is_floating_point()]:
        raise fit.not_float(integers[0])
    if left or len(fresh) < len(missing):
        raise fit.mismatch([k for k in missing if k not in fresh], left, list(wanted))

    resized = None
    if "pos_embed" in tensors:
        tensors, resized = fit_position_embedding(tensors, model.config, checkpoint.file)
    changes = Counter(
        f"{_dtype(source[origin[k]])} -> {_dtype(state[k])}"
        for k in tensors
        if k in origin and source[origin[k]].dtype != state[k].dtype
    )
    tensors = {k: v.to(state[k].dtype).contiguous() for k, v in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    cast = tuple(f"{count} {change}" for change, count in changes.items())
    return LoadReport(len(tensors), tuple(fresh), tuple(unused), (resized,) if resized else (), cast)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same_shape(key: str, given: torch.Size, wanted: torch.Size) -> bool:
    """Compare shapes; the rows of `pos_embed` may differ."""
    if key == "pos_embed":
        return len(given) == 3 and given[2] == wanted[2]
    return given == wanted


def _our_key(key: str, key_prefixes: Mapping[str, str]) -> str:
    official = next((p for p in key_prefixes if key.startswith(p)), None)
    return key if official is None else key_prefixes[official] + key.removeprefix(official)


def fit_position_embedding(
    tensors: dict[str, Tensor], config: ViTConfig, file: str
) -> tuple[dict[str, Tensor], str | None]:
    """Return tensors whose `pos_embed` has the rows the model wants, and what was resized.

    The grid of another size is taken to be square and resized as timm does (bicubic, antialiased). A model
    whose position embedding leaves the prefix out gets the prefix rows added to the prefix tokens; the other
    way round the rows are zero. Both give the same sums.

    Raises:
        InputError: `checkpoint-shape` when no square grid explains the rows.
    """
    pos, (rows, cols), P = tensors["pos_embed"], config.grid, config.num_prefix_tokens
    have, ambiguous = pos.shape[1], rows != cols and _is_square(config.num_patches)
    if have == config.num_pos_tokens and not ambiguous:
        return tensors, None
    # Prefix rows the checkpoint's may have: none, all, or CLS only.
    covered = (0, P, int(config.class_token)) if config.no_embed_class else (P, 0, int(config.class_token))
    prefix = next((c for c in covered if have > c and _is_square(have - c)), None)
    if prefix is None:
        raise InputError(
            f"checkpoint '{file}': pos_embed has {have} rows, '{config.name}' needs {config.num_pos_tokens}",
            code="checkpoint-shape",
            expected=f"{P} or no prefix rows and a square grid of patches, which can be resized",
            hint="set --image-size and --patch-size to what the checkpoint was trained with",
        )
    side = math.isqrt(have - prefix)
    head, grid = pos[:, :prefix].float(), pos[:, prefix:].float()
    resized = None
    if (side, side) != (rows, cols):
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", antialias=True, align_corners=False)
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
        resized = f"pos_embed {side}x{side} -> {rows}x{cols}"
        if have == config.num_pos_tokens:
            text = f"checkpoint '{file}': its position grid is taken to be {side}x{side}, not {rows}x{cols}"
            warnings.warn(text, EdgepruneWarning, stacklevel=3)
    tensors = dict(tensors)
    if config.no_embed_class:
        start = 0
        for name in ("cls_token", "dist_token", "reg_token"):
            if name in tensors and start < prefix:
                token = tensors[name].float()
                tensors[name] = token + head[:, start : start + token.shape[1]]
                start += token.shape[1]
        tensors["pos_embed"] = grid
    else:
        tensors["pos_embed"] = torch.cat([head, head.new_zeros(1, P - prefix, head.shape[-1]), grid], 1)
    return tensors, resized


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


@dataclass(frozen=True)
class _Fit:
    """The errors of a checkpoint that does not fit, with what its keys and shapes say it is."""

    config: ViTConfig
    file: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def foreign(self) -> EdgepruneError:
        family = self._family()
        what = f"; its keys look like {family}" if family else ""
        return InputError(
            f"checkpoint '{self.file}' matches nothing of {self.config.name}{what}: {listed(self.tensors)}",
            code="checkpoint-foreign",
            expected="a ViT, DeiT or LV-ViT checkpoint with keys such as blocks.0.attn.qkv.weight",
            hint="`edgeprune models` lists the architectures that can be loaded",
            details={"family": family, "keys": sorted(self.tensors)},
        )

    def wrong_shapes(self, wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> EdgepruneError:
        details = {k: {"checkpoint": list(a), "model": list(b)} for k, (a, b) in wrong.items()}
        only_head = all(k.startswith(("head.", "head_dist.", "aux_head.")) for k in wrong)
        if only_head:
            classes = next(iter(wrong.values()))[0][0]
            what, hint = f"it has {classes} classes", f"add --num-classes {classes}"
        else:
            what, hint = self._describe(), self._said() or self._advice()
        shown = [f"{k} {list(a)} instead of {list(b)}" for k, (a, b) in wrong.items()]
        return InputError(
            f"checkpoint '{self.file}' does not fit '{self.config.name}': {what} ({listed(shown, 3)})",
            code="checkpoint-shape",
            expected=f"{self.config.num_classes} classes" if only_head else _words(_facts_of(self.config)),
            hint=hint,
            details={"shapes": details},
        )

    def not_float(self, key: str) -> EdgepruneError:
        return InputError(
            f"checkpoint '{self.file}' holds {self.tensors[key].dtype} weights ({key})",
            code="checkpoint-dtype",
            expected="float32, float16 or bfloat16 weights",
            hint="pass the checkpoint from before quantization",
        )

    def mismatch(self, missing: Sequence[str], left: Sequence[str], wanted: Sequence[str]) -> EdgepruneError:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(left)} left over ({listed(left)})"] if left else []
        if all(re.search(STAGE_KEY, k) for k in (*missing, *left)):
            what, hint = self._stages(left, wanted)
            parts.append(what)
        else:
            hint = self._advice()
        if left or _stage_kind(list(self.tensors)):  # else it may be the dense model a method starts from
            hint = self._said() or hint
        return InputError(
            f"checkpoint '{self.file}' does not fit '{self.config.name}': keys {'; '.join(parts)}",
            code="checkpoint-mismatch",
            expected=f"exactly the {len(wanted)} weights of the model",
            hint=hint,
            details={"missing": list(missing), "left_over": list(left)},
        )

    def _stages(self, left: Sequence[str], wanted: Sequence[str]) -> tuple[str, str]:
        """Say what is wrong when all that is missing or left over are weights of stages, and what to do."""
        theirs, ours = _stage_kind([*left, *self.tensors]), _stage_kind(wanted)
        if theirs is None and left:
            return "these are weights of stages", "choose the --method and --stages of the checkpoint"
        if theirs is None:
            name = "weights of the stages" if ours is None else ours[0]
            hint = "use a checkpoint of this method, or train with `edgeprune finetune`"
            return f"the {name} would be untrained", hint
        name, method = theirs
        if theirs != ours:
            return f"the file holds {name} of {method}", f"choose --method {method}, and the --stages of the checkpoint"
        given, needed = (len({m[2] for k in keys if (m := re.search(STAGE_KEY, k))}) for keys in (self.tensors, wanted))
        what = f"the file has {name} for {given} stages, the model {needed} stages"
        if given == needed:
            return what, f"choose the --stages and --method-option of the checkpoint for --method {method}"
        return what, f"give the {given} blocks of the checkpoint with --stages"

    def _said(self) -> str | None:
        """What the file says of itself, None when it is not ours."""
        try:
            info = read_metadata(self.metadata, self.file)
        except InputError:
            return None
        return None if info is None else f"the file says it is for {info.options()}"

    def _family(self) -> str | None:
        keys = list(self.tensors)
        return next((name for pattern, name in FAMILIES if any(re.search(pattern, k) for k in keys)), None)

    def _describe(self) -> str:
        return "its shapes say " + _words(self._facts())

    def _facts(self) -> dict[str, Any]:
        """What the shapes tell of a ViT's configuration; the heads cannot be told."""
        t = self.tensors
        facts: dict[str, Any] = {name: f"{token}_token" in t for name, token in _TOKENS.items()}
        facts["reg_tokens"] = t["reg_token"].shape[1] if "reg_token" in t else 0
        facts["depth"] = len({m[1] for k in t if (m := re.match(r"blocks\.(\d+)\.", k))})
        facts["aux_head"] = "aux_head.weight" in t
        facts["stem"] = "lvvit" if "patch_embed.conv1.weight" in t else "patch"
        patch = t.get("patch_embed.proj.weight")
        if patch is not None and patch.ndim == 4:
            stride = 1 if facts["stem"] == "patch" else STEM_STRIDE
            facts["embed_dim"], facts["patch_size"] = patch.shape[0], tuple(side * stride for side in patch.shape[2:])
        return facts

    def _advice(self) -> str:
        """One thing to do: the registered model that fits, or a look at what the keys are."""
        facts = self._facts()
        rows = self.tensors["pos_embed"].shape[1] if "pos_embed" in self.tensors else 0
        others = (c for c in MODELS.values() if _facts_of(c) != _facts_of(self.config))
        fits = [c for c in others if facts.items() <= _facts_of(c).items()]
        if "patch_size" in facts and facts["patch_size"] != self.config.patch_size and not fits:
            return "set --patch-size to the checkpoint's {}x{}".format(*facts["patch_size"])
        line = self.config.name.split("_")[0]
        fits.sort(key=lambda c: (c.name != self.config.name, c.num_pos_tokens != rows, not c.name.startswith(line)))
        if fits:
            return f"its weights fit --model {' or '.join(c.name for c in fits[:2])}"
        family = self._family()
        return (
            f"its keys look like {family}; `edgeprune models` lists what can be loaded"
            if family
            else ("choose the --model the checkpoint was trained as; `edgeprune models` lists them")
        )


def _stage_kind(keys: Sequence[str]) -> tuple[str, str] | None:
    """Return what the first weights of stages among the keys are, and the method that has them."""
    return next(((what, name) for pattern, what, name in STAGE_KINDS if any(re.search(pattern, k) for k in keys)), None)


_TOKENS = {"class_token": "cls", "distilled": "dist"}


def _facts_of(config: ViTConfig) -> dict[str, Any]:
    names = ("class_token", "distilled", "reg_tokens", "depth", "embed_dim", "patch_size", "aux_head", "stem")
    return {name: getattr(config, name) for name in names}


def _words(facts: Mapping[str, Any]) -> str:
    words = [f"width {facts['embed_dim']}"] if "embed_dim" in facts else []
    words.append(f"{facts['depth']} blocks")
    words += ["patches of {}x{}".format(*facts["patch_size"])] if "patch_size" in facts else []
    words += ["a distillation token"] if facts["distilled"] else []
    words += [f"{facts['reg_tokens']} registers"] if facts["reg_tokens"] else []
    words += ["a convolutional stem"] if facts["stem"] == "lvvit" else []
    words += ["a head per token"] if facts["aux_head"] else []
    return ", ".join(words) + ("" if facts["class_token"] else ", no class token")
