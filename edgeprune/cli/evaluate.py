"""`edgeprune evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import BUNDLE, GRAPHS, verb
from edgeprune.cli.ui import Ui, table


@verb("evaluate", "Top-1 and top-5 of a bundle's pruned and dense graphs on labelled images.")
@click.argument("bundle", type=BUNDLE)
@click.option("--data", required=True, metavar="DATA", help="digits, or imagefolder:PATH with a directory per class.")
@click.option("--graph", type=GRAPHS, multiple=True, help="Only this graph; repeatable. By default model and dense.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N images, spread over the data.")
def command(ui: Ui, bundle: Path, data: str, graph: tuple[str, ...], limit: int | None) -> dict[str, Any]:
    """Print the accuracies."""
    from edgeprune.checks.accuracy import evaluate
    from edgeprune.data import open_dataset
    from edgeprune.runtime.bundle import load_bundle
    from edgeprune.runtime.session import Session

    loaded = load_bundle(bundle)
    dataset = open_dataset(data, limit=limit)
    names = graph or tuple(name for name in ("dense", "model") if name in loaded.manifest.graphs)
    shown = table("graph", ">MACs/image (G)", ">top-1 (%)", ">top-5 (%)", ">images")
    found = {}
    macs = loaded.manifest.macs
    for name in names:
        session = Session(loaded, graph=name, check_hashes=False)
        with ui.steps() as report:
            accuracy = evaluate(session, dataset, report=report)
        giga = None if macs is None else (macs.dense if name == "dense" else macs.pruned) / 1e9
        top5 = "n/a" if accuracy.top5 is None else f"{100 * accuracy.top5:.2f}"
        shown.add_row(
            name,
            "" if giga is None else f"{giga:.3f}",
            f"{100 * accuracy.top1:.2f}",
            top5,
            str(accuracy.images),
        )
        found[name] = accuracy
    ui.data(shown)
    if loaded.manifest.weights.source == "random":
        ui.note("random weights: these accuracies mean nothing")
    return {"bundle": str(bundle), "data": data, "graphs": found}
