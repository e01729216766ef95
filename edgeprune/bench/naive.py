"""The naive baseline: the same architecture through torch.onnx as anybody would export it.

The one file here that uses torch. Latency does not depend on the values of the weights, so they are random;
nothing else may be read from the result.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.errors import InputError, missing_package
from edgeprune.models.config import ViTConfig

if TYPE_CHECKING:
    from torch import nn

Exporter = Literal["legacy", "dynamo"]


def config_from_manifest(fields: Mapping[str, Any] | None, model: str) -> ViTConfig:
    """Return the architecture a manifest records.

    Raises:
        InputError: `bench-naive` when the bundle was traced and records none.
    """
    if fields is None:
        raise InputError(
            f"the bundle of '{model}' was traced and does not record its architecture",
            code="bench-naive",
            expected="a bundle of a model that `edgeprune models` lists",
            hint="bench without the naive baseline",
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return ViTConfig(**values)


def export_naive_dense(config: ViTConfig, directory: Path, *, batch: int, seed: int = 0) -> Path:
    """Export the dense model with random weights through the legacy exporter; return the ONNX file.

    Raises:
        EnvironmentLackError: `package-missing` without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package("torch", "export", "the naive torch export") from error
    from edgeprune.models.vit import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(config).eval()
    return export_naive(model, directory / "naive.onnx", config, batch=batch)


def export_naive(model: nn.Module, path: Path, config: ViTConfig, *, batch: int, exporter: Exporter = "legacy") -> Path:
    """Export a module with torch.onnx in its defaults, fixed shapes; return the path.

    Args:
        model: in eval mode, images [B, C, H, W] -> logits [B, classes].
        path: of the ONNX file.
        config: gives the size of the images.
        batch: B.
        exporter: torch's TorchScript exporter or the one on torch.export.
    """
    import torch

    images = torch.zeros(batch, config.in_chans, *config.image_size)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with _quiet(), torch.no_grad():
        if exporter == "legacy":
            torch.onnx.export(model, (images,), str(path), dynamo=False, **names)
        else:
            torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False, **names)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporters from talking; what they warn of does not concern a baseline."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
