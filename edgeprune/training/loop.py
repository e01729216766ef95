"""One training loop for all methods: AdamW, warm-up, cosine, one pass over the data per epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.data import Dataset, TrainingData
from edgeprune.errors import BuildError
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import Adapter, Batch
from edgeprune.training.recipes import Recipe

Progress = Callable[[str, float], None]  # (what is being done, share that is done)

STAGE_PREFIX = "prune."
EVAL_BATCH = 100


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did: means over its steps, and the learning rate at its end."""

    epoch: int
    losses: dict[str, float]
    lr: float
    difficulty: float
    images: int
    seconds: float


def train(
    model: PrunedViT,
    adapter: Adapter,
    data: TrainingData,
    recipe: Recipe,
    preprocessing: PreprocessInfo,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[EpochLog]:
    """Train a model in place; the result depends on the arguments alone, not on torch's generator.

    Raises:
        BuildError: `training-diverged` when the loss is no longer a number.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)
    steps = max(1, len(data) // min(recipe.batch_size, len(data)))
    log: list[EpochLog] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for epoch in range(recipe.epochs):
            begin, sums, images, lr = time.perf_counter(), dict[str, float](), 0, 0.0
            difficulty = difficulty_at(epoch / recipe.epochs, recipe.curriculum)
            batches = data.batches(recipe.batch_size, preprocessing, epoch=epoch, seed=seed, difficulty=difficulty)
            for step, (pixels, labels) in enumerate(batches):
                now = epoch + step / steps
                lr = set_learning_rate(optimizer, now, 1 / steps, recipe)
                parts = adapter.losses(model, Batch(torch.from_numpy(pixels), torch.from_numpy(labels), now))
                _update(model, optimizer, parts, recipe.clip_grad, epoch)
                images += len(labels)
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(labels)
                if progress is not None:
                    loss = sum(sums.values()) / images
                    progress(f"epoch {epoch + 1}/{recipe.epochs}, loss {loss:.3f}", (now + 1 / steps) / recipe.epochs)
            means = {name: round(value / images, 5) for name, value in sums.items()}
            seconds = round(time.perf_counter() - begin, 1)
            log.append(EpochLog(epoch + 1, means, lr, round(difficulty, 3), images, seconds))
        model.eval()
    return log


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Tensor], clip_grad: float, epoch: int
) -> None:
    loss = torch.stack(list(parts.values())).sum()
    if not torch.isfinite(loss):
        values = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
        raise BuildError(
            f"training diverged in epoch {epoch + 1}: {values}",
            code="training-diverged",
            expected="finite losses",
            hint="use a smaller --lr, or check the images for damage",
        )
    optimizer.zero_grad()
    loss.backward()
    if clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()


def parameter_groups(model: PrunedViT, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimiser's groups: weights of stages and of the backbone, each with and without weight decay.

    The recipe's frozen parameters are switched off and are in no group.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in recipe.frozen)
        if not parameter.requires_grad:
            continue
        of_stage = name.startswith(STAGE_PREFIX)
        decayed = parameter.ndim > 1 and name != "pos_embed" and not name.endswith("_token")
        group = groups.setdefault((of_stage, decayed), {"params": []})
        group["params"].append(parameter)
        group["weight_decay"] = recipe.weight_decay if decayed else 0.0
        group["lr_scale"] = 1.0 if of_stage else recipe.backbone_lr_scale
        group["freeze_epochs"] = 0 if of_stage else recipe.backbone_freeze_epochs
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, now: float, step: float, recipe: Recipe) -> float:
    """Set every group's learning rate for the step that begins at epoch `now` and return the unscaled one."""
    lr = learning_rate(now, step, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if now < group["freeze_epochs"] else lr * group["lr_scale"]
    return lr


def learning_rate(now: float, step: float, recipe: Recipe) -> float:
    """Return the learning rate for the step that begins at epoch `now` and is `step` epochs long."""
    if now < recipe.warmup_epochs:
        return recipe.lr * (now + step) / (recipe.warmup_epochs + step)
    done = (now - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, step)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def difficulty_at(share: float, curriculum: tuple[float, float]) -> float:
    """Return the difficulty when `share` of the training is done; see `Recipe.curriculum`."""
    start, end = curriculum
    return 1.0 if share >= end else max(0.0, (share - start) / (end - start))


@torch.no_grad()
def top1(model: PrunedViT, data: Dataset, preprocessing: PreprocessInfo) -> float:
    """Return the share of images whose highest logit is the label's."""
    model.eval()
    right = 0
    for pixels, labels in data.batches(EVAL_BATCH, preprocessing):
        right += int((model(torch.from_numpy(pixels)).argmax(-1) == torch.from_numpy(labels)).sum())
    return right / len(data)
