"""`edgeprune evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edgeprune.cli.common import BUNDLE, GRAPHS, verb
from edgeprune.cli.ui import Ui, table


@verb("evaluate", "Top-1 and top-5 of a bundle's pruned and dense graphs on labelled images.")
@click.argument("bundle", type=BUNDLE)
@click.option("--data", required=True, metavar="DATA", help="digits, or imagefolder:PATH with a directory per class.")
@click.option("--graph", type=GRAPHS, multiple=True, help="Only this graph; repeatable. By default model and dense.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N images, spread over the data.")
def command(ui: Ui, bundle: Path, data: str, graph: tuple[str, ...], limit: int | None) -> dict[str, Any]:
    """Print the accuracies; of an adaptive method also what its images kept and cost on average."""
    from edgeprune.checks.accuracy import evaluate
    from edgeprune.checks.parity import macs_by_counts
    from edgeprune.data import open_dataset
    from edgeprune.runtime.bundle import load_bundle
    from edgeprune.runtime.session import Session

    loaded = load_bundle(bundle)
    dataset = open_dataset(data, limit=limit)
    names = graph or tuple(name for name in ("dense", "model") if name in loaded.manifest.graphs)
    adaptive = any(stage.adaptive for stage in loaded.manifest.method.stages)
    own_macs = macs_by_counts(loaded.manifest) if adaptive else None
    found = {}
    macs = loaded.manifest.macs
    for name in names:
        session = Session(loaded, graph=name, check_hashes=False)
        with ui.steps() as report:
            accuracy = evaluate(session, dataset, report=report, macs=own_macs)
        found[name] = {
            **asdict(accuracy),
            "macs": None if macs is None else macs.dense if name == "dense" else macs.pruned,
        }
        if accuracy.overflow:
            ui.warn(
                f"{accuracy.overflow} of {accuracy.images} images keep more tokens than the bundle has slots; their "
                "results are not the method's: export with a higher --keep-rate"
            )
    ui.data(accuracy_rows(found, adaptive=adaptive))
    if loaded.manifest.weights.source == "random":
        ui.note("random weights: these accuracies mean nothing")
    return {"bundle": str(bundle), "data": data, "graphs": found}


def accuracy_rows(found: dict[str, dict[str, Any]], *, adaptive: bool) -> Table:
    """Return a row per graph; tokens, overflow and mean operations where a graph tells them."""
    kept = any(row["kept"] is not None for row in found.values())
    columns = ["graph", ">MACs/image, all slots (G)" if adaptive else ">MACs/image (G)"]
    columns += [">on average (G)"] if adaptive else []
    columns += [">top-1 (%)", ">top-5 (%)", ">images"]
    columns += [">tokens kept"] if kept else []
    columns += [">overflowed"] if adaptive else []
    shown = table(*columns)
    for name, row in found.items():
        cells = [name, _giga(row["macs"])]
        cells += [_giga(row["mean_macs"])] if adaptive else []
        cells += [f"{100 * row['top1']:.2f}", "n/a" if row["top5"] is None else f"{100 * row['top5']:.2f}"]
        cells += [str(row["images"])]
        cells += ["-" if row["kept"] is None else ", ".join(f"{mean:.1f}" for mean in row["kept"])] if kept else []
        cells += ["-" if row["mean_macs"] is None else str(row["overflow"])] if adaptive else []
        shown.add_row(*cells)
    return shown


def _giga(macs: float | None) -> str:
    return "" if macs is None else f"{macs / 1e9:.3f}"
