"""Random weights whose attention is sharpened, so that token counts differ from image to image.

python benchmarks/_sharpened.py MODEL METHOD FILE [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeprune.export import ExportRequest
from edgeprune.export.api import load_reference
from edgeprune.export.request import resolve

SHARPNESS = 3.0


def write_sharpened(model: Any, sharpness: float, path: Path) -> None:
    """Scale the queries and keys of a model up by `sharpness` in all, and write its weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attn.qkv.weight"):
                weight[: 2 * len(weight) // 3] *= sharpness**0.5
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def main() -> None:
    name, method, path, *options = sys.argv[1:]
    request = ExportRequest(
        model=name,
        method=method,
        method_options=dict(option.split("=", 1) for option in options),
        random_weights=True,
        verify=False,
    )
    model, _, _ = load_reference(resolve(request))
    write_sharpened(model, SHARPNESS, Path(path))


if __name__ == "__main__":
    main()
