"""`edgeprune inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from edgeprune.cli.build import engine_rows, findings_of
from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.show import (
    bucket_rows,
    calibration_rows,
    density_rows,
    histogram_rows,
    size_words,
    stage_rows,
    summary,
)
from edgeprune.cli.ui import Ui, pairs, table
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.engines import engine_folders, read_index

SHOWN_OPS = 8


@verb("inspect", "Show what a bundle holds, and check the hash of every file.")
@click.argument("bundle", type=BUNDLE)
def command(ui: Ui, bundle: Path) -> dict[str, Any]:
    """Print a bundle's manifest for people."""
    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    graphs = {name: _graph(loaded, name) for name in manifest.graphs}
    p = manifest.preprocessing
    ui.data(pairs(summary(loaded)))
    if manifest.method.stages:
        ui.data("")
        ui.data(stage_rows(manifest.method.stages))
    if manifest.densities:
        ui.data("")
        ui.data(density_rows(manifest.densities))
    if manifest.adaptive is not None and manifest.adaptive.buckets:
        ui.data("")
        ui.data(bucket_rows(manifest.adaptive))
        found = manifest.adaptive.calibration
        if found is not None:
            ui.data(pairs(calibration_rows(found)))
            ui.data(histogram_rows(found, manifest.method.stages[0].tokens_in))
    shown = table("graph", "file", "inputs", "outputs", ">nodes", "most frequent")
    for name, info in manifest.graphs.items():
        ops = graphs[name]["ops"]
        frequent = ", ".join(f"{op} {count}" for op, count in list(ops.items())[:SHOWN_OPS]) if ops else "-"
        shown.add_row(
            name,
            info.file,
            "\n".join(f"{t.name} {t.dtype}{t.shape}" for t in info.inputs),
            "\n".join(f"{t.name} {t.dtype}{t.shape}" for t in info.outputs),
            str(sum(ops.values())) if ops else "-",
            frequent,
        )
    ui.data("")
    ui.data(shown)
    built = {folder.name: read_index(loaded, folder) for folder in engine_folders(loaded)}
    for name, index in built.items():
        ui.data(f"\nengines/{name}")
        ui.data(engine_rows(index))
        for finding in findings_of(index):
            ui.data(finding)
    files = table("file", ">size", "sha256")
    for name, file in manifest.files.items():
        files.add_row(name, size_words(file.bytes), file.sha256)
    ui.data("")
    ui.data(files)
    ui.data("")
    ui.data(
        pairs(
            [
                ("images", f"{p.image_size[0]}x{p.image_size[1]}, {p.interpolation}, crop {p.crop_pct:g}"),
                ("mean, std", f"{_numbers(p.mean)}; {_numbers(p.std)}"),
                ("labels", None if manifest.labels is None else len(manifest.labels)),
                ("made by", f"{manifest.tool} {manifest.tool_version}, {manifest.created}"),
                ("notes", "\n".join(manifest.method.notes) or None),
                ("warnings", "; ".join(manifest.warnings) or None),
                ("hashes", "all files as the manifest lists them"),
            ]
        )
    )
    if not all(graph["ops"] for graph in graphs.values()):
        ui.note("node counts need the package onnx: pip install 'edgeprune[export]'")
    engines = {name: index.model_dump(mode="json") for name, index in built.items()}
    fields = {"manifest": manifest.model_dump(mode="json"), "graphs": graphs, "engines": engines}
    return {"bundle": str(bundle), "hashes": "ok", **fields}


def _graph(bundle: Bundle, name: str) -> dict[str, Any]:
    """Return the operators of a graph with their counts, most frequent first; None without onnx."""
    path = bundle.graph_path(name)
    try:
        import onnx
    except ImportError:
        return {"file": path.name, "nodes": None, "ops": None}
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return {"file": path.name, "nodes": len(nodes), "ops": dict(Counter(n.op_type for n in nodes).most_common())}


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
