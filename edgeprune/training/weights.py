"""The weights a training starts from, learns from and writes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import EdgepruneWarning, InputError
from edgeprune.models.checkpoint import Checkpoint, load_checkpoint
from edgeprune.models.config import ViTConfig
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import Method
from edgeprune.pruning.model import PrunedViT
from edgeprune.training.adapters import ADAPTERS
from edgeprune.training.init import init_from_scratch
from edgeprune.training.loop import STAGE_PREFIX
from edgeprune.training.request import Job

HEADS = ("head.", "head_dist.")


def build_model(job: Job) -> tuple[PrunedViT, dict[str, Any] | None]:
    """Return the model to train and where its weights came from: file name and hash, or None when they are fresh.

    A classifier for another number of classes is replaced by a fresh one, with a warning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.request.seed)
        model = PrunedViT(job.config, ADAPTERS[job.method.name].model_stages(job.stages))
        if job.request.checkpoint is None:
            init_from_scratch(model)
            return model, None
    checkpoint = load_checkpoint(job.request.checkpoint)
    fresh = [STAGE_PREFIX]
    head = checkpoint.tensors.get("head.weight")
    if head is not None and len(head) != job.config.num_classes:
        warnings.warn(
            f"{checkpoint.file} classifies {len(head)} classes, the data has {job.config.num_classes}: "
            "the classifier starts anew",
            EdgepruneWarning,
            stacklevel=2,
        )
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(HEADS)}
        checkpoint = replace(checkpoint, tensors=kept)
        fresh += HEADS
    _load(model, checkpoint, job.method, fresh)
    return model, _origin(checkpoint)


def build_teacher(job: Job) -> tuple[PrunedViT | None, dict[str, Any] | None]:
    """Return the dense model a method learns from, in eval mode, and where it came from; None when it needs none.

    Raises:
        InputError: `option` when a teacher is given to a method that does not use one.
    """
    request = job.request
    if not ADAPTERS[job.method.name].needs_teacher:
        if request.teacher is not None or request.teacher_model is not None:
            raise InputError(
                f"method '{job.method.name}' does not learn from a teacher",
                code="option",
                expected="--teacher only with a method that distils, such as dynamicvit",
                hint="leave out --teacher and --teacher-model",
            )
        return None, None
    source, config = request.teacher or request.checkpoint, job.config
    assert source is not None
    if request.teacher_model is not None:
        config = _teacher_config(job, request.teacher_model)
    checkpoint, teacher = load_checkpoint(source), PrunedViT(config)
    _load(teacher, checkpoint, job.method, [])
    return teacher.eval().requires_grad_(False), _origin(checkpoint)


def _teacher_config(job: Job, name: str) -> ViTConfig:
    """Return the architecture of a teacher that is not the model's own.

    Raises:
        InputError: `model-unknown`; `teacher-model` when it does not see what the model sees.
    """
    config = get_model_config(name, num_classes=job.config.num_classes)
    if job.request.teacher is None:
        raise InputError("--teacher-model needs --teacher", code="option", expected="the weights of the teacher")
    for what in ("image_size", "patch_size", "embed_dim", "mean", "std"):
        ours, theirs = getattr(job.config, what), getattr(config, what)
        if ours != theirs and (what != "embed_dim" or job.recipe.token_weight > 0):
            raise InputError(
                f"teacher '{name}' has {what} {theirs}, model '{job.config.name}' has {ours}",
                code="teacher-model",
                expected="the same images and patches, and for the token loss the same width",
                hint="--recipe-option token_weight=0" if what == "embed_dim" else "choose another --teacher-model",
            )
    return config


def _load(model: PrunedViT, checkpoint: Checkpoint, method: Method, fresh: Sequence[str]) -> None:
    """Put weights into a model that owns them; weights of stages the model lacks are left."""
    prefixes = {official: ours for m in METHODS.values() for official, ours in m.key_prefixes.items()}
    ignored = [STAGE_PREFIX, *prefixes]
    load_into(
        model,
        checkpoint,
        key_prefixes=method.key_prefixes,
        ignore_prefixes=ignored,
        ignore_pattern="|".join(m.training_keys for m in METHODS.values() if m.training_keys) or None,
        fresh_prefixes=fresh,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what was loaded may map the file or belong to another model


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"file": checkpoint.file, "sha256": checkpoint.sha256}


def official_tensors(model: PrunedViT, method: Method) -> dict[str, Tensor]:
    """Return the weights under the keys the method's official code uses, without those only training reads."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if method.training_keys is None or not re.search(method.training_keys, name)
    }
    return {method.official_key(name): tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
