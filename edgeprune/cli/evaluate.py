"""`edgeprune evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edgeprune.cli.common import BUNDLE, GRAPHS, verb
from edgeprune.cli.show import emulation_words
from edgeprune.cli.ui import Ui, table
from edgeprune.runtime.bundle import Bundle


@verb("evaluate", "Top-1 and top-5 of a bundle's pruned and dense graphs on labelled images.")
@click.argument("bundle", type=BUNDLE)
@click.option("--data", required=True, metavar="DATA", help="digits, or imagefolder:PATH with a directory per class.")
@click.option("--graph", type=GRAPHS, multiple=True, help="Only this graph; repeatable. By default model and dense.")
@click.option("--density", type=float, metavar="SHARE", help="Keep rate to run, of a bundle that holds several.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N images, spread over the data.")
def command(
    ui: Ui, bundle: Path, data: str, graph: tuple[str, ...], density: float | None, limit: int | None
) -> dict[str, Any]:
    """Print the accuracies; of an adaptive method also what its images kept and cost on average."""
    from edgeprune.bench.summary import bundle_fields
    from edgeprune.checks.accuracy import evaluate
    from edgeprune.checks.parity import macs_by_counts, open_for_checks
    from edgeprune.data import open_dataset
    from edgeprune.runtime.bundle import load_bundle

    loaded = load_bundle(bundle)
    dataset = open_dataset(data, limit=limit)
    found = {}
    emulated: str | None = None
    adaptive = any(stage.adaptive for stage in loaded.manifest.method.stages)
    for name, choice, rate in choose_runs(loaded, graph, density):
        session, emulated = open_for_checks(loaded, graph=choice, density=rate, spinning=True)
        info = next((d for d in loaded.manifest.densities if d.keep_rate == rate), None)
        own_macs = macs_by_counts(loaded.manifest, None if info is None else info.stages) if adaptive else None
        with ui.steps() as report:
            accuracy = evaluate(session, dataset, report=report, macs=own_macs)
        macs = loaded.manifest.macs if info is None else info.macs
        found[name] = {
            **asdict(accuracy),
            "macs": None if macs is None else macs.dense if choice == "dense" else macs.pruned,
        }
        if accuracy.overflow:
            ui.warn(
                f"{accuracy.overflow} of {accuracy.images} images keep more tokens than the bundle has slots; their "
                "results are not the method's: export with a higher --keep-rate"
            )
    ui.data(accuracy_rows(found, adaptive=adaptive))
    if loaded.manifest.weights.source == "random":
        ui.note("random weights: these accuracies mean nothing")
    if emulated is not None:
        ui.note(emulation_words(emulated))
    return {
        "bundle": str(bundle),
        "identity": bundle_fields(loaded.manifest),
        "data": data,
        "emulated": emulated,
        "graphs": found,
    }


def choose_runs(bundle: Bundle, graphs: tuple[str, ...], density: float | None) -> list[tuple[str, str, float | None]]:
    """Return what to evaluate as (name, graph, density): of several densities each, unless one is asked for."""
    densities = bundle.manifest.densities
    runs: list[tuple[str, str, float | None]] = []
    dense = "dense" in bundle.manifest.graphs and all(d.stages for d in densities)
    for graph in graphs or (("dense", "model") if dense else ("model",)):
        if graph == "model" and (densities or density is not None):
            rates = [d.keep_rate for d in densities] if density is None else [density]
            runs += [(f"keep rate {rate:g}", graph, rate) for rate in rates]
        else:
            runs.append((graph, graph, None))
    return runs


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
