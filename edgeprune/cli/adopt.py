"""`edgeprune adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.ui import Ui, pairs


@verb(
    "adopt",
    "Take a graph that another tool quantized into a bundle.\n\nBUNDLE is one for trt-fp16 or trt-fp32, GRAPH what the "
    "tool made of a copy of its model.onnx: the same inputs and outputs, QuantizeLinear and DequantizeLinear inside. "
    "It is checked against TensorRT's rules and compared with the original on this machine. The new bundle is for "
    "trt-int8 or trt-fp8; its baselines are those of BUNDLE.",
)
@click.argument("bundle", type=BUNDLE)
@click.argument("graph", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new bundle.")
@click.option("--data", metavar="SPEC", help="digits or imagefolder:DIR: images to compare on, instead of drawn ones.")
@click.option("--images", type=click.IntRange(min=1), default=16, show_default=True, help="How many of --data.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of drawn images.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle at --output.")
def command(
    ui: Ui, bundle: Path, graph: Path, output: Path, data: str | None, images: int, seed: int, overwrite: bool
) -> dict[str, Any]:
    """Check, compare and write."""
    from edgeprune.runtime.bundle import load_bundle

    source = load_bundle(bundle)
    from edgeprune.export import adopt

    shown = None
    if data is not None:
        from edgeprune.data import open_dataset

        found = open_dataset(data, limit=images, labelled=False)
        shown = np.concatenate([batch for batch, _ in found.batches(images, source.manifest.preprocessing)])
    with ui.steps() as report:
        made = adopt(source, graph, output, images=shown, seed=seed, overwrite=overwrite, progress=report)
    ui.written.append(made.path)
    parity = made.manifest.parity
    assert parity is not None
    for warning in made.manifest.warnings[len(source.manifest.warnings) :]:
        ui.warn(warning)
    rows = [
        ("bundle", str(made.path)),
        ("target", made.manifest.target),
        ("images", str(parity.images)),
        ("top-1 agreement", f"{parity.top1_agreement:.1%}"),
        ("max relative error", f"{parity.max_rel_error:.2e}"),
        ("kept tokens the same", None if parity.kept_overlap is None else f"{parity.kept_overlap:.2%}"),
    ]
    ui.data(pairs(rows))
    return {
        "bundle": str(made.path),
        "target": made.manifest.target,
        "parity": parity.model_dump(),
        "warnings": made.manifest.warnings,
    }
