"""`convert`: any checkpoint in, one file of weights with a known layout and a description out."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import InputError, missing_package
from edgeprune.files import check_free, check_suffix, write_whole
from edgeprune.models.adapters import never_read
from edgeprune.models.checkpoint import Checkpoint, load_checkpoint
from edgeprune.models.config import ViTConfig
from edgeprune.models.fit import load_into
from edgeprune.models.metadata import WeightsInfo, changed_fields, read_metadata
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Method, StageRequest, format_stages, parse_stages
from edgeprune.pruning.model import PrunedViT

OFFICIAL, OURS = "official", "edgeprune"
LAYOUTS = (OFFICIAL, OURS)
SAFETENSORS, PTH = "safetensors", "pth"
FORMATS = (SAFETENSORS, PTH)


@dataclass(frozen=True)
class ConvertRequest:
    """Everything `edgeprune convert` can be told; None takes what the file says of itself, else the default.

    Attributes:
        source: path or `hf-hub:owner/name`.
        out: the file to write; its suffix is that of the format.
        stages: "3,6,9", or "3:0.7,6:0.5,9:0.35" with a keep rate for each; None for the method's own places.
        ema: take the averaged weights.
        layout: "official" names a stage's weights as the method's code does, "edgeprune" as this tool does.
        format: "safetensors", with metadata; "pth" for `{"model": state_dict}` of torch.save, without.
        keep_training: keep what only training reads, where the model can hold it.
    """

    source: str
    out: Path
    model: str | None = None
    method: str | None = None
    keep_rate: float | None = None
    stages: str | None = None
    method_options: Mapping[str, str] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    ema: bool = False
    layout: str = OFFICIAL
    format: str = SAFETENSORS
    keep_training: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertResult:
    """What was read and written.

    Attributes:
        read: tensors of the source.
        matched: weights of the model that came from it.
        written: tensors of the file.
        resized: what was interpolated.
        cast: changes of the number format, with their counts.
        left_out: reason -> keys of the source that are not in the file.
        metadata: of the file; of a `pth` file it is only returned.
    """

    path: Path
    sha256: str
    bytes: int
    read: int
    matched: int
    written: int
    resized: tuple[str, ...]
    cast: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str]


def convert(request: ConvertRequest) -> ConvertResult:
    """Read a checkpoint, check it strictly against the model and the method, and write it whole or not at all.

    Raises:
        InputError: `output-suffix`, `output-exists`, `output-not-writable`, `option`, `model-missing`,
            `metadata-disagrees`; those of reading and fitting a checkpoint, of the model and of the method.
        EnvironmentLackError: `disk-full`, `package-missing`, those of the hub.
    """
    check_request(request)
    checkpoint = load_checkpoint(request.source, ema=request.ema)
    config, method, where, options = settle(request, read_metadata(checkpoint.metadata, checkpoint.file))
    stages = method.every_stage(config, where, options)
    pattern = method.training_keys
    if request.keep_training and pattern and any(re.search(pattern, key) for key in checkpoint.tensors):
        stages = tuple(replace(stage, scorer=stage.scorer.with_training_parts()) for stage in stages)
    with torch.device("meta"):
        model = PrunedViT(config, stages)
    report = load_into(model, checkpoint, key_prefixes=method.key_prefixes, ignore_pattern=pattern)
    tensors = rename(model.state_dict(), method, request.layout)
    rated = request.keep_rate is not None or where.keep_rate != 1
    info = WeightsInfo(
        model=config.name,
        method=method.name,
        keep_rate=where.keep_rate if rated else None,
        stages=format_stages([stage.block for stage in stages], where.rates),
        method_options=options,
        model_options=changed_fields(config),
        num_classes=config.num_classes,
        image_size=config.image_size,
    )
    kept = sum(bool(pattern and re.search(pattern, key)) for key in tensors)
    metadata = {
        **info.to_metadata(),
        "layout": request.layout,
        "training_tensors": str(kept),
        "ema": str(request.ema).lower(),
        **_origin(checkpoint),
    }
    content = _encode(tensors, metadata, request.format)
    write_whole({request.out: content})
    left_out = {
        "read by training only": report.unused,
        "read by no classifier": tuple(never_read(checkpoint.tensors)),
    }
    return ConvertResult(
        path=request.out,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        read=len(checkpoint.tensors),
        matched=report.matched,
        written=len(tensors),
        resized=report.resized,
        cast=report.cast,
        left_out={reason: keys for reason, keys in left_out.items() if keys},
        metadata=metadata,
    )


def check_request(request: ConvertRequest) -> None:
    """Raise what can be found out before the source is read.

    Raises:
        InputError: `option`, `output-suffix`, `output-exists`, `output-not-writable`.
    """
    for name, value, known in (("--layout", request.layout, LAYOUTS), ("--format", request.format, FORMATS)):
        if value not in known:
            raise InputError(f"{name} {value} is not known", code="option", expected=f"one of {', '.join(known)}")
    other = PTH if request.format == SAFETENSORS else SAFETENSORS
    hint = f", or --format {other}" if request.out.suffix == f".{other}" else ""
    check_suffix(request.out, f".{request.format}", hint)
    check_free([request.out], request.overwrite)


def settle(request: ConvertRequest, said: WeightsInfo | None) -> tuple[ViTConfig, Method, StageRequest, dict[str, Any]]:
    """Return model, method, places and options: what was asked for, else what the file says, else the defaults.

    The image size alone may be another one: the position embedding is resized.

    Raises:
        InputError: `model-missing`; `metadata-disagrees` when request and file contradict each other; those of names,
            stages and options.
    """
    model, name = request.model, request.method
    if said is not None:
        for option, asked, known in (("--model", model, said.model), ("--method", name, said.method)):
            _check_agrees(option, asked, known)
        model, name = said.model, said.method
    if model is None:
        raise InputError(
            f"no model was given, and '{request.source}' does not say",
            code="model-missing",
            expected="--model with a name `edgeprune models` lists",
            hint="add --model, and the --method the weights were trained with",
        )
    method = get_method(name or "dense")
    fields = {**dict(request.model_options), "num_classes": request.num_classes, "image_size": request.image_size}
    options = {k: v for k, v in method.parse_options(request.method_options).items() if k in request.method_options}
    rate, stages = request.keep_rate, request.stages
    if said is not None:
        base = {**said.model_options, "num_classes": said.num_classes, "image_size": said.image_size}
        _check_agrees("--num-classes", request.num_classes, said.num_classes)
        registered = get_model_config(model, **said.model_options)
        for key, value in request.model_options.items():
            _check_agrees(f"--model-option {key}", value, getattr(registered, key))
        fields = {**base, **{key: value for key, value in fields.items() if value is not None}}
        for key, value in options.items():
            _check_agrees(f"--method-option {key}", value, said.method_options.get(key, value))
        options = {**said.method_options, **options}
        _check_agrees("--keep-rate", rate, said.keep_rate)
        _check_agrees("--stages", *(text and _canonical(text) for text in (stages, said.stages)))
        rate = said.keep_rate if rate is None else rate
        stages = stages or said.stages
    config = get_model_config(model, **fields)
    return config, method, parse_stages(stages, 1.0 if rate is None else rate), method.parse_options(options)


def _canonical(stages: str) -> str | None:
    where = parse_stages(stages, 1.0)
    return format_stages(where.blocks or (), where.rates)


def _check_agrees(option: str, asked: Any, known: Any) -> None:
    """Raise InputError `metadata-disagrees` when both say something and not the same."""
    if asked is not None and known is not None and asked != known:
        raise InputError(
            f"{option} {asked} was asked for, and the file says {known}",
            code="metadata-disagrees",
            expected=f"{option} {known}, which the file was written for",
            hint=f"leave out {option}; if the file is wrong, start from the original checkpoint",
        )


def rename(state: Mapping[str, Tensor], method: Method, layout: str) -> dict[str, Tensor]:
    """Return copies of a model's weights under the keys of a layout."""
    names = {key: method.official_key(key) if layout == OFFICIAL else key for key in state}
    return {names[key]: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}


def _origin(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where the weights came from, as metadata."""
    found = {"source": checkpoint.file, "source_sha256": checkpoint.sha256, "source_wrapper": checkpoint.wrapper}
    return {name: text for name, text in found.items() if text is not None}


def _encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], format: str) -> bytes:
    """Return the content of the file."""
    if format == PTH:
        buffer = io.BytesIO()
        torch.save({"model": dict(tensors)}, buffer)
        return buffer.getvalue()
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing_package("safetensors", "export", "writing weights") from error
    return save(dict(tensors), dict(metadata))
