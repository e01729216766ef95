"""`finetune`: train a model for a method and write its weights with the story of how they came about."""

from __future__ import annotations

import math
import platform
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.data import DIGITS, Dataset, TrainingData, open_dataset, open_training_data
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
from edgeprune.training.init import init_from_scratch
from edgeprune.training.loop import STAGE_PREFIX, Progress, top1, train
from edgeprune.training.output import check_output, write_output
from edgeprune.training.recipes import DIGITS_RECIPES, FOLDER_RECIPES, Recipe
from edgeprune.version import __version__

HEADS = ("head.", "head_dist.")
PACKAGES = ("torch", "numpy", "scikit-learn", "pillow")


@dataclass(frozen=True)
class FinetuneRequest:
    """Everything `edgeprune finetune` can be told; None takes the recipe's value.

    Attributes:
        out: the `.safetensors` file to write; its `.json` stands beside it.
        data: "digits" or "imagefolder:PATH".
        stages: "3,6,9", or "3:0.7,6:0.5" with a keep rate for each; None for the method's own places.
        checkpoint: weights to start from, path or `hf-hub:owner/name`; None trains from nothing.
        teacher: weights of the dense model to learn from; None takes `checkpoint`.
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
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    threads: int = 0
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
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--lr": self.lr,
            "--seed": self.seed,
            "--threads": self.threads or None,
        }
        for name, value in options.items():
            words += [] if value is None else [name, f"{value:g}" if isinstance(value, float) else str(value)]
        for name, value in self.method_options.items():
            words += ["--method-option", f"{name}={value}"]
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
    """Train and write; nothing is written before the training is over.

    Args:
        request: what to train.
        progress: called with (what is being done, share that is done).

    Raises:
        InputError: when the request, the data or a checkpoint does not fit; `output-exists`.
        EnvironmentLackError: `package-missing`, `disk-full`.
        BuildError: `training-diverged`.
    """
    check_output(request.out, request.overwrite)
    check_numbers(request)
    job = resolve(request)
    report = progress or (lambda what, share: None)
    with _threads(request.threads):
        model, started_from = build_model(job)
        teacher, taught_by = build_teacher(job)
        before = None
        if started_from is not None:
            report("evaluating the starting weights", 0.0)
            before = top1(model, job.judged, job.preprocessing)
        setup = Setup(job.config, job.method, job.where, job.options, job.recipe, teacher)
        adapter = ADAPTERS[job.method.name](setup)
        begin = time.perf_counter()
        log = train(model, adapter, job.data, job.recipe, job.preprocessing, seed=request.seed, progress=progress)
        seconds = round(time.perf_counter() - begin, 1)
        report("evaluating", 1.0)
        after = top1(model, job.judged, job.preprocessing)
    record = {
        **describe(job, model),
        "started_from": started_from,
        "teacher": taught_by,
        "top1": after,
        "top1_before": before,
        "seconds": seconds,
        "epochs": [asdict(entry) for entry in log],
    }
    tensors = official_tensors(model, job.method)
    path, record_path = write_output(request.out, tensors, _metadata(request, after), record)
    return FinetuneResult(path, record_path, after, before, seconds, record)


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
    data, judged = open_training_data(request.data), open_dataset(request.data)
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
    recipe = get_recipe(request)
    return Job(request, config, method, where, options, stages, recipe, data, judged, preprocessing)


def get_recipe(request: FinetuneRequest) -> Recipe:
    """Return the recipe of a request, with its own values in place of the recipe's.

    Raises:
        InputError: `checkpoint-missing` when the method only trains from a dense model's weights.
    """
    recipes = DIGITS_RECIPES if request.data == DIGITS else FOLDER_RECIPES
    recipe = recipes.get((request.method, request.checkpoint is not None))
    if recipe is None:
        raise InputError(
            f"method '{request.method}' starts from the weights of a dense model, and none were given",
            code="checkpoint-missing",
            expected="--checkpoint with the weights of the trained dense model",
            hint="train one first: edgeprune finetune --method dense",
        )
    given: dict[str, Any] = {"epochs": request.epochs, "batch_size": request.batch_size, "lr": request.lr}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def check_numbers(request: FinetuneRequest) -> None:
    """Raise InputError `option` unless the request's numbers make sense."""
    checks = {
        "--epochs": (request.epochs, 1),
        "--batch-size": (request.batch_size, 1),
        "--seed": (request.seed, 0),
        "--threads": (request.threads, 0),
    }
    for name, (value, least) in checks.items():
        if value is not None and value < least:
            raise InputError(f"{name} {value} is too small", code="option", expected=f"at least {least}")
    if request.lr is not None and not 0 < request.lr < math.inf:
        raise InputError(f"--lr {request.lr} is out of range", code="option", expected="a number above 0")


def build_model(job: Job) -> tuple[PrunedViT, dict[str, Any] | None]:
    """Return the model to train and where its weights came from: file name and hash, or None when they are fresh.

    A classifier for another number of classes is replaced by a fresh one, with a warning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.request.seed)
        model = PrunedViT(job.config, job.stages)
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
        if request.teacher is not None:
            raise InputError(
                f"method '{job.method.name}' does not learn from a teacher",
                code="option",
                expected="--teacher only with a method that distils, such as dynamicvit",
                hint="leave out --teacher",
            )
        return None, None
    source = request.teacher or request.checkpoint
    assert source is not None
    checkpoint, teacher = load_checkpoint(source), PrunedViT(job.config)
    _load(teacher, checkpoint, job.method, [])
    return teacher.eval().requires_grad_(False), _origin(checkpoint)


def _load(model: PrunedViT, checkpoint: Checkpoint, method: Method, fresh: Sequence[str]) -> None:
    """Put weights into a model that owns them; weights of stages the model lacks are left."""
    prefixes = {official: ours for m in METHODS.values() for official, ours in m.key_prefixes.items()}
    ignored = [STAGE_PREFIX, *prefixes]
    load_into(model, checkpoint, key_prefixes=method.key_prefixes, ignore_prefixes=ignored, fresh_prefixes=fresh)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what was loaded may map the file or belong to another model


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"file": checkpoint.file, "sha256": checkpoint.sha256}


def official_tensors(model: PrunedViT, method: Method) -> dict[str, Tensor]:
    """Return the weights under the keys the method's official code uses."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for official, ours in method.key_prefixes.items():
            if name.startswith(ours):
                name = official + name.removeprefix(ours)
        tensors[name] = tensor.detach().contiguous()
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
        "recipe": asdict(job.recipe),
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
