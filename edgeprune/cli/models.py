"""`edgeprune models`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, table
from edgeprune.models.macs import count_parameters, dense_macs
from edgeprune.models.registry import MODELS


@verb("models", "List the models with parameters, multiply-accumulates and tokens.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print the registry."""
    rows: list[dict[str, Any]] = [
        {
            "name": config.name,
            "parameters": count_parameters(config),
            "macs": dense_macs(config),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "patch_tokens": config.num_patches,
            "prefix_tokens": config.num_prefix_tokens,
            "num_classes": config.num_classes,
        }
        for config in MODELS.values()
    ]
    shown = table("model", ">parameters (M)", ">MACs (G)", ">image", ">patch", ">tokens", ">classes")
    for config, row in zip(MODELS.values(), rows, strict=True):
        shown.add_row(
            config.name,
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.2f}",
            "{}x{}".format(*config.image_size),
            "{}x{}".format(*config.patch_size),
            f"{config.num_prefix_tokens}+{config.num_patches}",
            str(config.num_classes),
        )
    ui.data(shown)
    ui.note("tokens: prefix + patches; MACs of one image, dense")
    return rows
