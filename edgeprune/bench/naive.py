"""The naive baseline: the same architecture through torch.onnx as anybody would export it.

The one file here that uses torch. Latency does not depend on the values of the weights, so they are random;
nothing else may be read from the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.errors import missing_package
from edgeprune.models.config import ViTConfig

if TYPE_CHECKING:
    from torch import nn

Exporter = Literal["legacy", "dynamo"]


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

    from edgeprune.export.trace import quiet_exporter

    images = torch.zeros(batch, config.in_chans, *config.image_size)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with quiet_exporter(), torch.no_grad():
        if exporter == "legacy":
            torch.onnx.export(model, (images,), str(path), dynamo=False, **names)
        else:
            torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False, **names)
    return path
