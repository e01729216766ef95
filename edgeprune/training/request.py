"""What a user asks of a training, and the same with every name looked up and the data opened. No weights yet."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from edgeprune.data import DIGITS, Dataset, TrainingData, open_dataset, open_training_data
from edgeprune.data.augment import Augmentation
from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Method, Stage, StageRequest, parse_stages
from edgeprune.quantization.scheme import Quantization, portable
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.distributed import PRECISIONS
from edgeprune.training.logs import KINDS
from edgeprune.training.recipes import PRESETS, Recipe, default_recipe

QUANTIZED = ("int8",)


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
        quantize: one of `QUANTIZED`, whose linear layers the model trains with; None for floats.
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
    quantize: str | None = None
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
            "--keep-rate": self.keep_rate if self.keep_rate < 1 else None,
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
            "--quantize": self.quantize,
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

    @property
    def quantization(self) -> Quantization | None:
        """How the model's linear layers are quantized while it trains; None when they are not.

        The dynamic scheme: what trains is then free of measured ranges, which would move with the weights.
        """
        return None if self.request.quantize is None else portable(self.config)


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
        takes_rate = method.rule is not None
        raise InputError(
            f"method '{method.name}' prunes nothing"
            + (f" at keep rate {request.keep_rate:g}" if takes_rate else " with these options"),
            code="keep-rate" if takes_rate else "method-option",
            expected="a keep rate below 1" if takes_rate else "options that take tokens away",
            hint="give for example --keep-rate 0.7" if takes_rate else "run `edgeprune methods` for its options",
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
    choices: dict[str, tuple[str | None, tuple[str, ...]]] = {
        "--mixed-precision": (request.mixed_precision, PRECISIONS),
        "--quantize": (request.quantize, QUANTIZED),
        "--device": (request.device, ("auto", "cpu")),
        "--log": (request.log, KINDS),
    }
    for name, (text, known) in choices.items():
        if text is not None and text not in known:
            raise InputError(f"{name} {text} is not known", code="option", expected=f"one of {', '.join(known)}")
    every = request.save_every
    if every is not None and every != "epoch" and not (every.isdigit() and int(every) > 0):
        raise InputError(f"--save-every {every} cannot be read", code="option", expected="a number of steps, or epoch")
