"""What a user asks for, and the same with every name looked up and every count computed. No weights yet, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import InputError
from edgeprune.export.targets.base import Target
from edgeprune.export.targets.registry import get_target
from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import Method, Stage, parse_stages


@dataclass(frozen=True)
class ExportRequest:
    """Everything `edgeprune export` can be told.

    Attributes:
        stages: "3,6,9", or "3:0.7,6:0.5,9:0.35" with a keep rate for each; None for the method's own places.
        checkpoint: path or `hf-hub:owner/name`; or `random_weights` with `seed`.
        batch: smallest and largest batch; equal for a fixed one.
        token_outputs: also return what each stage kept.
        dead_rows: do not compute rows nobody reads.
        selection: "native" or "plugin".
        verify: compare with PyTorch on fresh inputs before the bundle is finished.
    """

    model: str
    method: str = "dense"
    keep_rate: float = 1.0
    stages: str | None = None
    method_options: Mapping[str, str] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "ort-cpu"
    checkpoint: str | None = None
    ema: bool = False
    random_weights: bool = False
    seed: int = 0
    image_size: tuple[int, int] | None = None
    patch_size: int | None = None
    num_classes: int | None = None
    batch: tuple[int, int] = (1, 1)
    token_outputs: bool = False
    dead_rows: bool = True
    selection: str = "native"
    opset: int | None = None
    labels: list[str] | None = None
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Resolved:
    """A request with every name looked up and every count computed; no weights yet."""

    request: ExportRequest
    config: ViTConfig
    method: Method
    options: dict[str, Any]
    stages: tuple[Stage, ...]
    target: Target
    opset: int


def resolve(request: ExportRequest, config: ViTConfig | None = None) -> Resolved:
    """Look up and check everything that can be checked without weights.

    Args:
        request: what to export.
        config: the architecture, when it is not the registered model of the request's name.

    Raises:
        InputError: with the code of whatever is wrong.
        EnvironmentLackError: `target-unavailable`.
    """
    method = get_method(request.method)
    config = config or resolve_config(request)
    target = get_target(request.target)
    check_batch(request.batch)
    check_selection(request.selection, target)
    opset = target.opset if request.opset is None else request.opset
    if opset not in target.opsets:
        raise InputError(
            f"target '{target.name}' does not write opset {opset}",
            code="opset",
            expected=f"one of {', '.join(map(str, target.opsets))}",
        )
    if request.labels is not None and len(request.labels) != config.num_classes:
        raise InputError(
            f"{len(request.labels)} labels for {config.num_classes} classes",
            code="labels",
            expected="one label per class",
            hint="check the labels file and --num-classes",
        )
    options = method.parse_options(request.method_options)
    stages = method.stages(config, parse_stages(request.stages, request.keep_rate), options)
    return Resolved(request, config, method, options, stages, target, opset)


def resolve_config(request: ExportRequest) -> ViTConfig:
    """Return the architecture a request asks for."""
    patch = None if request.patch_size is None else (request.patch_size, request.patch_size)
    fields = {"image_size": request.image_size, "patch_size": patch, "num_classes": request.num_classes}
    return get_model_config(request.model, **fields, **dict(request.model_options))


def check_selection(selection: str, target: Target) -> None:
    """Raise InputError `selection` unless the target takes this form of the selection."""
    if selection not in target.selections:
        raise InputError(
            f"target '{target.name}' has no selection form '{selection}'",
            code="selection",
            expected=" or ".join(target.selections),
        )


def check_batch(batch: tuple[int, int]) -> None:
    """Raise InputError `batch` unless 1 <= smallest <= largest."""
    if not 1 <= batch[0] <= batch[1]:
        raise InputError(
            f"batch {batch[0]}:{batch[1]} is empty",
            code="batch",
            expected="a fixed size like 1 or a range like 1:8, at least 1",
        )
