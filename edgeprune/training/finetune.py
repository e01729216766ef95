"""`finetune`: train a model for a method and write its weights with the story of how they came about."""

from __future__ import annotations

import difflib
import math
import os
import platform
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from edgeprune.data import DIGITS, Dataset, TrainingData, open_dataset, open_training_data
from edgeprune.data.augment import Augmentation
from edgeprune.errors import EdgepruneWarning, InputError
from edgeprune.models.checkpoint import Checkpoint, load_checkpoint
from edgeprune.models.config import ViTConfig
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import Method, Stage, StageRequest, parse_stages
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import ADAPTERS, Setup
from edgeprune.training.distributed import PRECISIONS, is_main_process, processes, start
from edgeprune.training.init import init_from_scratch
from edgeprune.training.logs import KINDS, open_log
from edgeprune.training.loop import STAGE_PREFIX, Progress, Settings, shard_rows, top1, train
from edgeprune.training.output import check_output, record_path, write_output
from edgeprune.training.recipes import PRESETS, Recipe, default_recipe
from edgeprune.training.state import EVERY_SECONDS, StateFile, folder_of
from edgeprune.version import __version__

HEADS = ("head.", "head_dist.")
PACKAGES = ("torch", "accelerate", "kornia", "numpy", "scikit-learn", "pillow")
MOST_WORKERS = 8


@dataclass(frozen=True)
class FinetuneRequest:
    """Everything `edgeprune finetune` can be told; None takes the recipe's value.

    Attributes:
        out: the `.safetensors` file to write; its `.json` stands beside it.
        data: "digits" or "imagefolder:PATH".
        stages: "3,6,9", or "3:0.7,6:0.5" with a keep rate for each; None for the method's own places.
        checkpoint: weights to start from, path or `hf-hub:owner/name`; None trains from nothing.
        teacher: weights of the dense model to learn from; None takes `checkpoint`.
        teacher_model: architecture of the teacher; None for the model's own.
        recipe: a name of `edgeprune.training.recipes.PRESETS`; None chooses by method, model and data.
        recipe_options: fields of the recipe to set, as texts.
        batch_size: images per step, of all processes together.
        lr: peak learning rate as it is, not rescaled with the batch.
        max_steps: stop after so many steps.
        mixed_precision: "no", "fp16" or "bf16".
        device: "auto" or "cpu".
        workers: processes that load images; None for none on a CPU, up to eight for a GPU.
        save_every: steps between two states to resume from, or "epoch"; None for every two minutes. The end of an
            epoch always counts.
        resume: go on from the state of a training that was killed, if there is one.
        log: "csv", "tensorboard" or "none".
        threads: of torch on the CPU; 0 leaves torch's choice.
    """

    model: str
    out: Path
    method: str = "dense"
    keep_rate: float = 1.0
    stages: str | None = None
    method_options: Mapping[str, str] = field(default_factory=dict)
    data: str = DIGITS
    checkpoint: str | None = None
    teacher: str | None = None
    teacher_model: str | None = None
    recipe: str | None = None
    recipe_options: Mapping[str, str] = field(default_factory=dict)
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    threads: int = 0
    max_steps: int | None = None
    mixed_precision: str = "no"
    device: str = "auto"
    workers: int | None = None
    save_every: str | None = None
    resume: bool = False
    log: str = "csv"
    log_every: int = 50
    overwrite: bool = False

    def command(self) -> str:
        """Return the command line that does the same."""
        words = ["edgeprune", "finetune", "--model", self.model, "--method", self.method]
        options = {
            "--keep-rate": self.keep_rate if self.method != "dense" else None,
            "--stages": self.stages,
            "--data": self.data,
            "--checkpoint": self.checkpoint,
            "--teacher": self.teacher,
            "--teacher-model": self.teacher_model,
            "--recipe": self.recipe,
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--lr": self.lr,
            "--seed": self.seed,
            "--threads": self.threads or None,
            "--max-steps": self.max_steps,
            "--mixed-precision": None if self.mixed_precision == "no" else self.mixed_precision,
            "--device": None if self.device == "auto" else self.device,
        }
        for name, value in options.items():
            words += [] if value is None else [name, f"{value:g}" if isinstance(value, float) else str(value)]
        for name, value in self.method_options.items():
            words += ["--method-option", f"{name}={value}"]
        for name, value in self.recipe_options.items():
            words += ["--recipe-option", f"{name}={value}"]
        return shlex.join([*words, "--output", str(self.out)])


@dataclass(frozen=True)
class FinetuneResult:
    """What training gave.

    Attributes:
        path: the weights; `record_path` the JSON beside them, `record` its content.
        top1: share of the evaluation images the final weights get right, pruned as asked.
        top1_before: the same of the starting weights before training, None when there were none.
    """

    path: Path
    record_path: Path
    top1: float
    top1_before: float | None
    seconds: float
    record: dict[str, Any]


def finetune(request: FinetuneRequest, progress: Progress | None = None) -> FinetuneResult:
    """Train and write the weights and the record; until then only the log and the state to resume from are there.

    Started by `accelerate launch` or `torchrun` it trains with the other processes; the first one writes.

    Args:
        request: what to train.
        progress: called with (what is being done, share that is done).

    Raises:
        InputError: when the request, the data or a checkpoint does not fit; `output-exists`, `state-exists`,
            `state-mismatch`, `state-unreadable`, `batch-size`.
        EnvironmentLackError: `package-missing`, `disk-full`, `mixed-precision`.
        BuildError: `training-diverged`, `training-no-gradient`.
    """
    check_numbers(request)
    main = is_main_process()
    state = StateFile(folder_of(request.out), writes=main)
    if not (request.resume or request.overwrite):
        state.refuse_existing()
    ema_out = request.out.with_suffix(f".ema{request.out.suffix}")
    for out in (request.out, ema_out):
        check_output(out, request.overwrite)
    job = resolve(request)
    kind = ADAPTERS[job.method.name]
    log = open_log(request.log if main else "none", request.out)
    report, every = progress or (lambda what, share: None), request.save_every or ""
    cpu = request.device == "cpu"
    with (
        start(request.mixed_precision, cpu=cpu, find_unused=bool(kind.without_gradient)) as accelerator,
        _threads(request.threads),
    ):
        model, started_from = build_model(job)
        teacher, taught_by = build_teacher(job)
        model.to(accelerator.device)
        if teacher is not None:
            teacher.to(accelerator.device)
        state = replace(
            state,
            request=_identity(job, started_from, taught_by),
            every_steps=int(every) if every.isdigit() else 0,
            every_seconds=EVERY_SECONDS if request.save_every is None else 0.0,
        )
        resumed = state.load() if request.resume else None
        shard_rows(min(job.recipe.batch_size, len(job.data)), job.recipe.mixes)
        accelerator.wait_for_everyone()
        if resumed is None:
            state.remove()
        if main and job.recipe.note:
            warnings.warn(job.recipe.note, EdgepruneWarning, stacklevel=2)
        before = None
        if started_from is not None:
            report("evaluating the starting weights", 0.0)
            before = resumed["before"] if resumed else top1(model, job.judged, job.preprocessing)
        state = replace(state, always={"before": before})
        adapter = kind(Setup(job.config, job.method, job.where, job.options, job.recipe, teacher))
        settings = Settings(
            workers=_workers(request, accelerator.device.type),
            max_steps=request.max_steps or 0,
            log=log,
            log_every=request.log_every,
            state=state,
        )
        epochs, ema = train(
            model,
            adapter,
            job.data,
            job.recipe,
            job.preprocessing,
            seed=request.seed,
            progress=progress,
            accelerator=accelerator,
            settings=settings,
            resumed=resumed,
        )
        report("evaluating", 1.0)
        after = top1(model, job.judged, job.preprocessing)
        tensors, averaged, after_ema = official_tensors(model, job.method), None, None
        if ema is not None:
            with ema.applied(model):
                after_ema = top1(model, job.judged, job.preprocessing)
                averaged = official_tensors(model, job.method)
        seconds = round(sum(entry.seconds for entry in epochs), 1)
        record = {
            **describe(job, model),
            "started_from": started_from,
            "teacher": taught_by,
            "processes": processes(),
            "device": accelerator.device.type,
            "top1": after,
            "top1_before": before,
            "output": "model",
            "ema": None if ema is None else {"file": ema_out.name, "decay": ema.decay, "top1": after_ema},
            "seconds": seconds,
            "epochs": [asdict(entry) for entry in epochs],
        }
        if main:
            if averaged is not None and after_ema is not None:
                write_output(ema_out, averaged, _metadata(request, after_ema), {**record, "output": "ema"})
            write_output(request.out, tensors, _metadata(request, after), record)
            state.remove()
    return FinetuneResult(request.out, record_path(request.out), after, before, seconds, record)


def _identity(job: Job, started_from: dict[str, Any] | None, taught_by: dict[str, Any] | None) -> dict[str, Any]:
    """Return everything the weights depend on; how many processes and threads compute them is not part of it."""
    request = job.request
    return {
        "model": request.model,
        "method": request.method,
        "keep_rate": request.keep_rate,
        "stages": request.stages,
        "method_options": repr(sorted(job.options.items())),
        "data": request.data,
        "images": len(job.data),
        "classes": list(job.data.labels),
        "checkpoint": started_from and started_from["sha256"],
        "teacher": taught_by and taught_by["sha256"],
        "teacher_model": request.teacher_model,
        "recipe": repr(job.recipe),
        "max_steps": request.max_steps,
        "mixed_precision": request.mixed_precision,
        "seed": request.seed,
    }


def _workers(request: FinetuneRequest, device: str) -> int:
    if request.workers is not None:
        return request.workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if device == "cpu" else min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // here))


@dataclass(frozen=True)
class Job:
    """A request with every name looked up and the data opened; no weights yet."""

    request: FinetuneRequest
    config: ViTConfig
    method: Method
    where: StageRequest
    options: dict[str, Any]
    stages: tuple[Stage, ...]
    recipe: Recipe
    data: TrainingData
    judged: Dataset
    preprocessing: PreprocessInfo


def resolve(request: FinetuneRequest) -> Job:
    """Look up and check everything that can be checked without weights.

    Raises:
        InputError: with the code of whatever is wrong.
        EnvironmentLackError: `package-missing`.
    """
    method = get_method(request.method)
    where, options = parse_stages(request.stages, request.keep_rate), method.parse_options(request.method_options)
    method.stages(get_model_config(request.model), where, options)  # refuse what does not fit before reading data
    recipe = get_recipe(request)
    augmentation = Augmentation(
        recipe.rand_augment, recipe.color_jitter, recipe.random_erase, recipe.repeated_augmentation
    )
    if request.data != DIGITS:
        augmentation.check()
    data, judged = open_training_data(request.data, augmentation), open_dataset(request.data)
    if data.labels != judged.labels:
        raise InputError(
            f"the training and the evaluation images of '{request.data}' have different classes",
            code="data-split",
            expected="the same class directories in both",
            details={"train": data.labels, "test": judged.labels},
        )
    config = get_model_config(request.model, num_classes=len(data.labels))
    stages = method.stages(config, where, options)
    if method.name != "dense" and not stages:
        raise InputError(
            f"method '{method.name}' prunes nothing at keep rate {request.keep_rate:g}",
            code="keep-rate",
            expected="a keep rate below 1",
            hint="give for example --keep-rate 0.7, or train --method dense",
        )
    preprocessing = PreprocessInfo(
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
    )
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(data))).scaled()
    return Job(request, config, method, where, options, stages, recipe, data, judged, preprocessing)


def recipe_name(request: FinetuneRequest) -> str:
    """Return the name of a request's preset.

    Raises:
        InputError: `recipe-unknown`; `checkpoint-missing` when the method only trains from a dense model's weights.
    """
    digits, checkpoint = request.data == DIGITS, request.checkpoint is not None
    default = default_recipe(request.method, request.model, digits=digits, checkpoint=checkpoint)
    if default is None:
        raise InputError(
            f"method '{request.method}' starts from the weights of a dense model, and none were given",
            code="checkpoint-missing",
            expected="--checkpoint with the weights of the trained dense model",
            hint="train one first: edgeprune finetune --method dense",
        )
    if request.recipe is not None and request.recipe not in PRESETS:
        close = difflib.get_close_matches(request.recipe, PRESETS, n=3, cutoff=0.4)
        raise InputError(
            f"unknown recipe '{request.recipe}'",
            code="recipe-unknown",
            expected="one of the names `edgeprune finetune --list-recipes` prints",
            hint=f"did you mean {', '.join(close)}?" if close else f"without --recipe it is {default}",
        )
    return request.recipe or default


def get_recipe(request: FinetuneRequest) -> Recipe:
    """Return the recipe of a request, with its own values in place of the recipe's.

    Raises:
        InputError: `recipe-unknown`, `checkpoint-missing`; `recipe-option` for an unknown field or a value that does
            not fit.
    """
    recipe = set_options(PRESETS[recipe_name(request)], request.recipe_options)
    given: dict[str, Any] = {"epochs": request.epochs, "batch_size": request.batch_size, "lr": request.lr}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if request.lr is None:
        return recipe
    least = recipe.scaled().min_lr
    return replace(recipe, lr_batch=0, min_lr=min(least, request.lr))


def set_options(recipe: Recipe, options: Mapping[str, str]) -> Recipe:
    """Return a recipe with fields set from texts; lists are written with commas.

    Raises:
        InputError: `recipe-option`.
    """
    hints = get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in hints or name in ("source", "note"):
            fields = ", ".join(other for other in hints if other not in ("source", "note"))
            raise InputError(
                f"--recipe-option {name}={text}: a recipe has no such field",
                code="recipe-option",
                expected=f"one of {fields}",
            )
        try:
            values[name] = _parse(text, hints[name])
        except (KeyError, ValueError):
            raise InputError(
                f"--recipe-option {name}={text} does not fit",
                code="recipe-option",
                expected=f"a value like {getattr(recipe, name)!r}",
            ) from None
    return replace(recipe, **values)


def _parse(text: str, kind: Any) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (int, float):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise ValueError(text)
        return value
    if kind == (str | None):
        return None if text.lower() == "none" else text
    parts = [part for part in text.split(",") if part]
    if kind == tuple[str, ...]:
        return tuple(parts)
    first, second = parts
    return float(first), float(second)


def check_numbers(request: FinetuneRequest) -> None:
    """Raise InputError `option` unless the request's numbers make sense."""
    checks = {
        "--epochs": (request.epochs, 1),
        "--batch-size": (request.batch_size, 1),
        "--seed": (request.seed, 0),
        "--threads": (request.threads, 0),
        "--max-steps": (request.max_steps, 1),
        "--workers": (request.workers, 0),
        "--log-every": (request.log_every, 1),
    }
    for name, (value, least) in checks.items():
        if value is not None and value < least:
            raise InputError(f"{name} {value} is too small", code="option", expected=f"at least {least}")
    if request.lr is not None and not 0 < request.lr < math.inf:
        raise InputError(f"--lr {request.lr} is out of range", code="option", expected="a number above 0")
    choices = {
        "--mixed-precision": (request.mixed_precision, PRECISIONS),
        "--device": (request.device, ("auto", "cpu")),
        "--log": (request.log, KINDS),
    }
    for name, (text, known) in choices.items():
        if text not in known:
            raise InputError(f"{name} {text} is not known", code="option", expected=f"one of {', '.join(known)}")
    every = request.save_every
    if every is not None and every != "epoch" and not (every.isdigit() and int(every) > 0):
        raise InputError(f"--save-every {every} cannot be read", code="option", expected="a number of steps, or epoch")


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
    patterns = [m.training_keys for m in METHODS.values() if m.training_keys]
    load_into(
        model,
        checkpoint,
        key_prefixes=method.key_prefixes,
        ignore_prefixes=ignored,
        fresh_prefixes=fresh,
        ignore_pattern="|".join(patterns),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what was loaded may map the file or belong to another model


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"file": checkpoint.file, "sha256": checkpoint.sha256}


def official_tensors(model: PrunedViT, method: Method) -> dict[str, Tensor]:
    """Return the weights under the keys the method's official code uses, without those only training reads."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if method.training_keys is not None and re.search(method.training_keys, name):
            continue
        for official, ours in method.key_prefixes.items():
            if name.startswith(ours):
                name = official + name.removeprefix(ours)
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors


def describe(job: Job, model: PrunedViT) -> dict[str, Any]:
    """Return what was asked for and with what it was done, JSON-ready."""
    request = job.request
    return {
        "command": request.command(),
        "model": job.config.name,
        "num_classes": job.config.num_classes,
        "method": job.method.name,
        "keep_rate": request.keep_rate,
        "method_options": job.options,
        "stages": [{"block": stage.block, **asdict(stage.counts)} for stage in job.stages],
        "data": request.data,
        "train_images_per_epoch": len(job.data),
        "test_images": len(job.judged),
        "seed": request.seed,
        "threads": request.threads,
        "max_steps": request.max_steps,
        "mixed_precision": request.mixed_precision,
        "recipe": {"name": recipe_name(request), **asdict(job.recipe)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"edgeprune": __version__, "python": platform.python_version(), **_package_versions()},
    }


def _metadata(request: FinetuneRequest, accuracy: float) -> dict[str, str]:
    return {
        "format": "pt",
        "model": request.model,
        "method": request.method,
        "keep_rate": f"{request.keep_rate:g}",
        "seed": str(request.seed),
        "top1": f"{accuracy:.4f}",
    }


def _package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, 0 for its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
