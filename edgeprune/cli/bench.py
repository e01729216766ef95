"""`edgeprune bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import BUNDLE, verb, write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import InputError


@verb(
    "bench",
    "Measure a bundle's pruned graph against its baselines, interleaved in one process.\n\nBaselines: dense, the best "
    "dense graph of the same target; random, the same token counts without scoring; naive, the dense model through "
    "torch.onnx (needs torch).",
)
@click.argument("bundle", type=BUNDLE)
@click.option("--batch", type=click.IntRange(min=1), help="Images per run; by default the bundle's smallest.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="0: all cores.")
@click.option("--rounds", type=click.IntRange(min=1), help="An exact number instead of a duration.")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Of measuring.")
@click.option("--quick", is_flag=True, help="A short run, marked as such.")
@click.option("--against", default="dense,random", show_default=True, metavar="LIST", help="Of dense, random, naive.")
@click.option("--data", metavar="DATA", help="Run on digits or imagefolder:PATH instead of noise.")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="M",
    help="Different images for adaptive bundles and for --callers; by default 16, or 8 with --quick.",
)
@click.option("--callers", type=click.IntRange(min=2), metavar="N", help="Also let N threads call one session at once.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the result with all samples as JSON."
)
def command(
    ui: Ui, bundle: Path, against: str, batch: int | None, output: Path | None, **options: Any
) -> dict[str, Any]:
    """Print the table."""
    from edgeprune.bench import bench_bundle, report_notes, report_tables
    from edgeprune.runtime.bundle import load_bundle

    if output is not None and output.is_dir():
        raise InputError(
            f"'{output}' is a directory", code="output-exists", expected="-o FILE, for example -o bench.json"
        )
    loaded = load_bundle(bundle)
    baselines = [name.strip() for name in against.split(",") if name.strip()]
    with ui.steps() as report:
        result = bench_bundle(
            loaded, batch=batch or loaded.manifest.batch[0], against=baselines, progress=report, **options
        )
    for warning in result.warnings:
        ui.warn(warning)
    for title, rows in report_tables(result):
        first, *others = rows[0]
        shown = table(first, *(f">{heading}" for heading in others), title=title)
        for row in rows:
            shown.add_row(*row.values())
        if title is not None:
            ui.data("")
        ui.data(shown)
    for note in report_notes(result):
        ui.note(note)
    document = plain(result.to_dict())
    if output is not None:
        write_text(ui, output, json.dumps(document, indent=1, allow_nan=False) + "\n")
        ui.note(f"written: {output}")
    return document
