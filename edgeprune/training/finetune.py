"""`finetune`: train a model for a method and write its weights with the story of how they came about."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import EdgepruneWarning
from edgeprune.models.metadata import WeightsInfo
from edgeprune.pruning.base import format_stages
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization.fake import fake_quantized
from edgeprune.training.adapters import ADAPTERS, Setup
from edgeprune.training.distributed import is_main_process, processes, start
from edgeprune.training.logs import open_log
from edgeprune.training.loop import Progress, Settings, shard_rows, top1, train
from edgeprune.training.output import check_output, record_path, write_output
from edgeprune.training.request import FinetuneRequest, Job, check_numbers, recipe_name, resolve
from edgeprune.training.state import EVERY_SECONDS, StateFile, folder_of
from edgeprune.training.weights import build_model, build_teacher, official_tensors
from edgeprune.version import __version__

PACKAGES = ("torch", "accelerate", "kornia", "numpy", "scikit-learn", "pillow")
MOST_WORKERS = 8


@dataclass(frozen=True)
class FinetuneResult:
    """What training gave.

    Attributes:
        path: the weights; `record_path` the JSON beside them, `record` its content.
        top1: share of the evaluation images the final weights get right, pruned as asked.
        top1_before: the same of the starting weights before training, None when there were none.
            Both are of float layers; what quantized ones reach is in the record.
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
        quantized = quantized_model(job, model)
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
        before = before_quantized = None
        if started_from is not None:
            report("evaluating the starting weights", 0.0)
            if resumed:
                before, before_quantized = resumed["before"], resumed.get("before_quantized")
            else:
                before, before_quantized = accuracies(job, model, quantized)
        state = replace(state, always={"before": before, "before_quantized": before_quantized})
        adapter = kind(Setup(job.config, job.method, job.where, job.options, job.recipe, teacher))
        settings = Settings(
            workers=_workers(request, accelerator.device.type),
            max_steps=request.max_steps or 0,
            log=log,
            log_every=request.log_every,
            state=state,
        )
        epochs, ema = train(
            model if quantized is None else quantized,
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
        after, after_quantized = accuracies(job, model, quantized)
        tensors, averaged, after_ema, ema_quantized = official_tensors(model, job.method), None, None, None
        if ema is not None:
            with ema.applied(model):
                after_ema, ema_quantized = accuracies(job, model, quantized)
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
            "quantized": _quantized_record(job, after_quantized, before_quantized),
            "output": "model",
            "ema": None
            if ema is None
            else {"file": ema_out.name, "decay": ema.decay, "top1": after_ema, "top1_quantized": ema_quantized},
            "seconds": seconds,
            "epochs": [asdict(entry) for entry in epochs],
        }
        if main:
            if averaged is not None and after_ema is not None:
                write_output(ema_out, averaged, _metadata(job, after_ema), {**record, "output": "ema"})
            write_output(request.out, tensors, _metadata(job, after), record)
            state.remove()
    return FinetuneResult(request.out, record_path(request.out), after, before, seconds, record)


def quantized_model(job: Job, model: PrunedViT) -> PrunedViT | None:
    """Return the model as it trains when its layers are quantized; it shares all weights. None when they are not.

    Every image has ranges of its own, as on a device that gets one at a time. So the batch and the number of processes
    have no part in them.
    """
    quantization = job.quantization
    return None if quantization is None else fake_quantized(model, quantization, per_image=True)


def accuracies(job: Job, model: PrunedViT, quantized: PrunedViT | None) -> tuple[float, float | None]:
    """Return the top-1 of the float layers and of the quantized ones, when there are any."""
    found = top1(model, job.judged, job.preprocessing)
    return found, None if quantized is None else top1(quantized, job.judged, job.preprocessing)


def _quantized_record(job: Job, after: float | None, before: float | None) -> dict[str, Any] | None:
    """Return how layers were quantized while training, and what the model reaches so; None when they were not."""
    quantization = job.quantization
    if quantization is None:
        return None
    return {
        "precision": quantization.precision,
        "scheme": quantization.scheme,
        "ranges": "per image",
        "weight_bits": quantization.weight_bits,
        "layers": len(quantization.layers),
        "top1": after,
        "top1_before": before,
    }


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
        "quantize": request.quantize,
        "seed": request.seed,
    }


def _workers(request: FinetuneRequest, device: str) -> int:
    if request.workers is not None:
        return request.workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if device == "cpu" else min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // here))


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
        "quantize": request.quantize,
        "recipe": {"name": recipe_name(request), **asdict(job.recipe)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"edgeprune": __version__, "python": platform.python_version(), **_package_versions()},
    }


def _metadata(job: Job, accuracy: float) -> dict[str, str]:
    stages = job.method.every_stage(job.config, job.where, job.options)
    info = WeightsInfo(
        model=job.request.model,
        method=job.method.name,
        keep_rate=job.request.keep_rate,
        stages=format_stages([stage.block for stage in stages], job.where.rates),
        method_options=job.options,
        num_classes=job.config.num_classes,
        image_size=job.config.image_size,
    )
    return {
        **info.to_metadata(),
        "layout": "official",
        "seed": str(job.request.seed),
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
