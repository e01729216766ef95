"""One training loop for all methods: AdamW, warm-up, cosine, one pass over the data per epoch.

A step depends on the weights, the optimiser and (seed, step) alone. So several processes do together what one does,
and a training that was killed goes on from its last state as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.data import Dataset, TrainingData
from edgeprune.errors import BuildError, InputError
from edgeprune.models.vit import Block
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import Adapter, Batch, StepResult
from edgeprune.training.distributed import mean_over_processes, process, processes, start, sum_over_processes
from edgeprune.training.ema import Ema
from edgeprune.training.loader import EpochBatches, load
from edgeprune.training.logs import NoLog, TrainingLog
from edgeprune.training.mixing import mix
from edgeprune.training.recipes import Recipe
from edgeprune.training.state import StateFile

Progress = Callable[[str, float], None]  # (what is being done, share that is done)

STAGE_PREFIX = "prune."
EVAL_BATCH = 100
DROP_PATH_TAG = 10_007  # of `Batch.uniform`
MOST_SKIPPED = 50  # steps in a row that fp16 may leave out


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did: means over its steps, and the learning rate at its end."""

    epoch: int
    losses: dict[str, float]
    lr: float
    difficulty: float
    images: int
    seconds: float
    accuracy: float = 0.0
    kept: float | None = None
    gmacs: float | None = None


@dataclass(frozen=True)
class Settings:
    """How a training runs; nothing here changes what comes out, but for `max_steps`.

    Attributes:
        workers: processes that make batches in the background.
        max_steps: stop after so many steps; 0 for all of the recipe's.
        log_every: steps between two rows of the log.
        state: where the state is kept; None keeps none.
    """

    workers: int = 0
    max_steps: int = 0
    log: TrainingLog = field(default_factory=NoLog)
    log_every: int = 50
    state: StateFile | None = None


class Trainee(nn.Module):
    """A model with its adapter as one module, so that the losses are its forward pass."""

    def __init__(self, model: PrunedViT, adapter: Adapter, drop_path: float) -> None:
        super().__init__()
        self.model, self.adapter, self.drop_path = model, adapter, drop_path

    def forward(self, batch: Batch) -> StepResult:
        """Return the losses of a batch."""
        if self.drop_path:
            set_drop_path(self.model, batch, self.drop_path)
        return self.adapter.losses(self.model, batch)


def train(
    model: PrunedViT,
    adapter: Adapter,
    data: TrainingData,
    recipe: Recipe,
    preprocessing: PreprocessInfo,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    accelerator: Any = None,
    settings: Settings | None = None,
    resumed: Mapping[str, Any] | None = None,
) -> tuple[list[EpochLog], Ema | None]:
    """Train a model in place; the result depends on the arguments alone, not on torch's generator.

    Args:
        model: on the accelerator's device.
        adapter: turns batches into losses.
        data: the images.
        recipe: with learning rates that belong to its batch size (`Recipe.scaled`).
        preprocessing: of the images.
        seed: of everything that is random.
        progress: called after every step.
        accelerator: of `edgeprune.training.distributed.start`; None runs in this process alone, on the CPU.
        settings: how it runs.
        resumed: what `StateFile.load` returned.

    Returns:
        What every epoch did, and the moving average of the weights when the recipe has one.

    Raises:
        BuildError: `training-diverged` when a loss or a gradient is no longer a number; `training-no-gradient`.
        InputError: `batch-size` when a batch cannot be divided over the processes.
    """
    if accelerator is None:
        with start(cpu=True) as alone:
            return train(
                model, adapter, data, recipe, preprocessing,
                seed=seed, progress=progress, accelerator=alone, settings=settings, resumed=resumed,
            )  # fmt: skip
    run = _Run(model, adapter, data, recipe, preprocessing, seed, progress, accelerator, settings or Settings())
    if resumed is not None:
        run.resume(resumed)
    return run.all_epochs()


class _Run:
    """One training under way; what `state` returns is all that changes."""

    def __init__(
        self,
        model: PrunedViT,
        adapter: Adapter,
        data: TrainingData,
        recipe: Recipe,
        preprocessing: PreprocessInfo,
        seed: int,
        progress: Progress | None,
        accelerator: Any,
        settings: Settings,
    ) -> None:
        self.model, self.adapter, self.data, self.recipe = model, adapter, data, recipe
        self.preprocessing, self.seed, self.progress = preprocessing, seed, progress
        self.accelerator, self.settings = accelerator, settings
        self.size = min(recipe.batch_size, len(data))
        self.rows = shard_rows(self.size, recipe.mixes)
        self.steps = len(data) // self.size
        self.total = min(self.steps * recipe.epochs, settings.max_steps or math.inf)
        optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)
        trainee = Trainee(model, adapter, recipe.drop_path)
        self.trainee, self.optimizer = accelerator.prepare(trainee, optimizer)
        self.ema = Ema(model, recipe.ema_decay) if recipe.ema_decay else None
        self.step, self.seconds, self.sums, self.log = 0, 0.0, dict[str, float](), list[EpochLog]()
        self.checked, self.skipped = False, 0

    # ------------------------------------------------------------------------------------------- resuming

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "log": [asdict(entry) for entry in self.log],
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load(state["ema"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.sums = state["step"], state["seconds"], dict(state["sums"])
        self.log = [EpochLog(**entry) for entry in state["log"]]

    # ------------------------------------------------------------------------------------------- running

    def all_epochs(self) -> tuple[list[EpochLog], Ema | None]:
        self.clock = self.saved = self.started = time.perf_counter()
        self.begun = self.step
        self.settings.log.begin(self.step)
        try:
            self.trainee.train()
            while self.step < self.total:
                self.epoch()
        finally:
            self.settings.log.close()
            for block in self.model.blocks:
                assert isinstance(block, Block)
                block.branch_scale = None
        self.model.eval()
        return self.log, self.ema

    def epoch(self) -> None:
        """Do what is left of an epoch."""
        epoch, first = divmod(self.step, self.steps)
        difficulty = difficulty_at(epoch / self.recipe.epochs, self.recipe.curriculum)
        stop = int(min(self.steps, first + self.total - self.step))
        lr = 0.0
        batches = EpochBatches(
            self.data, self.size, self.preprocessing, epoch, self.seed, difficulty, self.rows, first, stop
        )
        pin = self.accelerator.device.type == "cuda"
        for images, labels in load(batches, self.settings.workers, pin):
            now = epoch + (self.step % self.steps) / self.steps
            lr = set_learning_rate(self.optimizer, now, 1 / self.steps, self.recipe)
            values = self.one_step(images, labels, now)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * self.size
            self.sums["images"] = self.sums.get("images", 0.0) + self.size
            self.step += 1
            if self.step % self.settings.log_every == 0:
                self.write_row("step", epoch, lr, values)
            self.report(epoch)
            if self.step % self.steps:
                self.save_when_due()
        means = {name: value / self.sums["images"] for name, value in self.sums.items() if name != "images"}
        self.tick()
        self.log.append(
            EpochLog(
                epoch=epoch + 1,
                losses={name[6:]: round(value, 5) for name, value in means.items() if name.startswith("parts/")},
                lr=lr,
                difficulty=round(difficulty, 3),
                images=int(self.sums["images"]),
                seconds=round(self.seconds - sum(entry.seconds for entry in self.log), 1),
                accuracy=round(means["accuracy"], 5),
                kept=round(means["kept"], 2) if "kept" in means else None,
                gmacs=round(means["gmacs"], 5) if "gmacs" in means else None,
            )
        )
        self.write_row("epoch", epoch, lr, means)
        self.sums = {}
        self.save()

    def one_step(self, images: Tensor, labels: Tensor, now: float) -> dict[str, float]:
        """Train on one batch and return its numbers, means over all processes."""
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        classes = self.model.config.num_classes
        images, targets = mix(images, labels, classes, self.recipe, seed=self.seed, step=self.step)
        batch = Batch(images, targets, now, self.seed, self.step, self.rows.start)
        self.optimizer.zero_grad()
        result = self.trainee(batch)
        values = step_values(result, labels)
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            raise diverged(int(now), wrong)
        self.accelerator.backward(torch.stack(list(result.losses.values())).sum())
        self.update(int(now))
        return values

    def update(self, epoch: int) -> None:
        """Check the gradients and move the weights."""
        if not self.checked:
            check_gradients(self.model, self.adapter.without_gradient)
            self.checked = True
        self.accelerator.unscale_gradients()
        still_key_biases(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = bool(torch.isfinite(norm))
        if not finite and (self.accelerator.scaler is None or self.skipped == MOST_SKIPPED):
            raise diverged(epoch, {"norm of the gradient": norm.item()})
        if finite and self.recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_grad, norm)
        self.optimizer.step()  # leaves the weights alone when fp16 made the gradients overflow
        self.skipped = 0 if finite else self.skipped + 1
        if finite and self.ema:
            self.ema.update(self.model)

    # ------------------------------------------------------------------------------------------- telling

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def save_when_due(self) -> None:
        state = self.settings.state
        if state is None:
            return
        late = state.every_seconds and time.perf_counter() - self.saved >= state.every_seconds
        if late or (state.every_steps and self.step % state.every_steps == 0):
            self.save()

    def save(self) -> None:
        if self.settings.state is not None:
            self.tick()
            self.settings.state.save(self.state())
            self.saved = time.perf_counter()

    def write_row(self, scope: str, epoch: int, lr: float, values: Mapping[str, float]) -> None:
        self.tick()
        parts = {name[6:]: value for name, value in values.items() if name.startswith("parts/")}
        plain = {name: values.get(name) for name in ("accuracy", "kept", "gmacs")}
        self.settings.log.write(
            {
                "scope": scope,
                "epoch": epoch + 1,
                "step": self.step,
                "images": self.step * self.size,
                "loss": sum(parts.values()),
                "lr": lr,
                "seconds": round(self.seconds, 1),
                "parts": parts,
                **plain,
            }
        )

    def report(self, epoch: int) -> None:
        if self.progress is None:
            return
        images = self.sums["images"]
        loss = sum(value for name, value in self.sums.items() if name.startswith("parts/")) / images
        words = [f"epoch {epoch + 1}/{self.recipe.epochs}", f"loss {loss:.3f}"]
        words.append(f"accuracy {100 * self.sums['accuracy'] / images:.1f} %")
        if "kept" in self.sums:
            words.append(f"{self.sums['kept'] / images:.1f} tokens")
        if "gmacs" in self.sums:
            words.append(f"{self.sums['gmacs'] / images:.3g} GMACs")
        pace = (time.perf_counter() - self.started) / (self.step - self.begun)
        left = pace * (self.total - self.step)
        words.append(f"{duration(left)} left")
        self.progress(", ".join(words), self.step / self.total)


def step_values(result: StepResult, labels: Tensor) -> dict[str, float]:
    """Return the numbers of a step by name, means over all processes; parts of the loss begin with `parts/`."""
    accuracy = (result.logits.detach().argmax(-1) == labels).float().mean()
    found: dict[str, Any] = {f"parts/{name}": part for name, part in result.losses.items()}
    found |= {"accuracy": accuracy, "kept": result.kept, "gmacs": result.macs}
    found = {name: value for name, value in found.items() if value is not None}
    numbers = [torch.as_tensor(value, device=labels.device).detach().double() for value in found.values()]
    return dict(zip(found, mean_over_processes(torch.stack(numbers)).tolist(), strict=True))


def shard_rows(size: int, mixes: bool) -> slice:
    """Return the rows of a batch that are this process's.

    Raises:
        InputError: `batch-size` when the batch cannot be divided.
    """
    count = processes()
    parts = count * 2 if mixes and count > 1 else count  # images are mixed in pairs
    if size % parts:
        raise InputError(
            f"a batch of {size} images cannot be divided over {count} processes",
            code="batch-size",
            expected=f"a multiple of {parts}" + (", because images are mixed in pairs" if parts > count else ""),
            hint=f"for example --batch-size {max(parts, size // parts * parts)}",
        )
    share = size // count
    return slice(process() * share, (process() + 1) * share)


def check_gradients(model: nn.Module, without: tuple[str, ...]) -> None:
    """Raise BuildError `training-no-gradient` when a parameter that should be trained got no gradient."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and not name.startswith(without)
    ]
    if names:
        raise BuildError(
            f"{len(names)} parameters get no gradient: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else ""),
            code="training-no-gradient",
            expected="a gradient for every parameter that is trained",
            hint="freeze them in the recipe, or list them in the adapter's `without_gradient`",
            details={"parameters": names},
        )


def still_key_biases(model: PrunedViT) -> None:
    """Set the gradients of the keys' biases to zero.

    A softmax over keys does not see a bias all keys share: its gradient is nothing but rounding, which AdamW would
    scale up to full steps that differ with the number of processes and threads.
    """
    D = model.config.embed_dim
    for block in model.blocks:
        assert isinstance(block, Block)
        bias = block.attn.qkv.bias
        if bias is not None and bias.grad is not None:
            bias.grad[D : 2 * D] = 0


def diverged(epoch: int, values: Mapping[str, float]) -> BuildError:
    """Return the error for numbers that are not finite."""
    found = ", ".join(f"{name.removeprefix('parts/')} {value:g}" for name, value in values.items())
    return BuildError(
        f"training diverged in epoch {epoch + 1}: {found}",
        code="training-diverged",
        expected="finite losses and gradients",
        hint="use a smaller --lr, or check the images for damage",
    )


def set_drop_path(model: PrunedViT, batch: Batch, rate: float) -> None:
    """Draw which images skip which branches of which blocks in this step.

    Source: stochastic depth (arXiv 1603.09382), per image, rising linearly with the depth as in timm.
    """
    draws = batch.uniform(len(model.blocks), 2, tag=DROP_PATH_TAG)
    for i, block in enumerate(model.blocks):
        keep = 1 - rate * i / max(1, len(model.blocks) - 1)
        factors = (draws[:, i] < keep).to(draws.dtype).div(keep).view(-1, 2, 1, 1)
        assert isinstance(block, Block)
        block.branch_scale = (factors[:, 0], factors[:, 1])


def parameter_groups(model: PrunedViT, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimiser's groups: weights of stages and of the backbone, each with and without weight decay.

    With layer decay every depth of the backbone has groups of its own. The recipe's frozen parameters are switched
    off and are in no group.
    """
    groups: dict[tuple[bool, bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in recipe.frozen)
        if not parameter.requires_grad:
            continue
        of_stage = name.startswith(STAGE_PREFIX)
        below = 0 if of_stage or recipe.layer_decay == 1 else layers_below_head(name, len(model.blocks))
        decayed = parameter.ndim > 1 and name != "pos_embed" and not name.endswith("_token")
        group = groups.setdefault((of_stage, decayed, below), {"params": []})
        group["params"].append(parameter)
        group["weight_decay"] = recipe.weight_decay if decayed else 0.0
        group["lr_scale"] = 1.0 if of_stage else recipe.backbone_lr_scale * recipe.layer_decay**below
        group["freeze_epochs"] = 0 if of_stage else recipe.backbone_freeze_epochs
    return list(groups.values())


def layers_below_head(name: str, depth: int) -> int:
    """Return how many layers stand between a parameter and the head: 0 for norm and head, 1 for the last block.

    Source: layer-wise decay as in MAE (arXiv 2111.06377).
    """
    if name.startswith("blocks."):
        return depth - int(name.split(".")[1])
    embeds = name.startswith("patch_embed.") or name == "pos_embed" or name.endswith("_token")
    return depth + 1 if embeds else 0


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


def duration(seconds: float) -> str:
    """Return a time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@torch.no_grad()
def top1(model: PrunedViT, data: Dataset, preprocessing: PreprocessInfo) -> float:
    """Return the share of images whose highest logit is the label's; the processes divide the images."""
    model.eval()
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.float64, device=device)
    for pixels, labels in data.batches(EVAL_BATCH, preprocessing, shard=(process(), processes())):
        found = model(torch.from_numpy(pixels).to(device)).argmax(-1)
        right += (found == torch.from_numpy(labels).to(device)).sum()
    return sum_over_processes(right).item() / len(data)
