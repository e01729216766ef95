"""`edgeprune bench`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.common import BUNDLE, verb, write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.parse import Batches
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.bench.report import Rows


@verb(
    "bench",
    "Measure a bundle's pruned graph against its baselines, interleaved in one process.\n\nBaselines: dense, the best "
    "dense graph of the same target; random, the same token counts without scoring; naive, the dense model through "
    "torch.onnx (needs torch).\n\nScenarios: single-stream, a run when the one before is done; multi-stream:N, queries "
    "of N images; fixed-fps:F, a frame is due F times a second, and late or dropped ones are counted; sustained:10m, "
    "the first minute against the last.\n\nSeveral bundles or batches, or --sweep, are benched one after the other.",
)
@click.argument("bundles", type=BUNDLE, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--batch", type=Batches(), help="Images per run, or several sizes; by default the bundle's smallest.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="0: all cores.")
@click.option(
    "--scenario",
    default="single-stream",
    show_default=True,
    metavar="NAME[:VALUE]",
    help="Or multi-stream:8, fixed-fps:30, sustained:10m.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="An exact number instead of a duration.")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Of measuring.")
@click.option("--quick", is_flag=True, help="A short run, marked as such.")
@click.option(
    "--against",
    default="dense,random,float",
    show_default=True,
    metavar="LIST",
    help="Of dense, random, float (of int8), naive.",
)
@click.option("--data", metavar="DATA", help="Run on digits or imagefolder:PATH instead of noise.")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="M",
    help="Different images for adaptive bundles and for --callers; by default 16, or 8 with --quick.",
)
@click.option("--callers", type=click.IntRange(min=2), metavar="N", help="Also let N threads call one session at once.")
@click.option("--layers", is_flag=True, help="Also tell where the time goes, by part of the network.")
@click.option("--sweep", metavar="keep-rate=LIST", help="Measure these keep rates, of several bundles or of one.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the result with all samples as JSON."
)
def command(
    ui: Ui,
    bundles: tuple[Path, ...],
    against: str,
    batch: tuple[int, ...] | None,
    sweep: str | None,
    output: Path | None,
    **options: Any,
) -> dict[str, Any]:
    """Print the tables."""
    from edgeprune.bench import (
        bench_bundle,
        parse_sweep,
        report_notes,
        report_tables,
        sweep_bundles,
        sweep_notes,
        sweep_table,
    )
    from edgeprune.runtime.bundle import load_bundle

    if output is not None and output.is_dir():
        raise InputError(
            f"'{output}' is a directory", code="output-exists", expected="-o FILE, for example -o bench.json"
        )
    rates = [] if sweep is None else parse_sweep(sweep)
    loaded = [load_bundle(bundle) for bundle in bundles]
    options["against"] = [name.strip() for name in against.split(",") if name.strip()]
    several = sweep is not None or len(loaded) > 1 or len(batch or ()) > 1
    with ui.steps() as report:
        if several:
            swept = sweep_bundles(loaded, keep_rates=rates, batches=batch or (), progress=report, **options)
        else:
            result = bench_bundle(loaded[0], batch=batch[0] if batch else None, progress=report, **options)
    if several:
        _show(ui, [(None, sweep_table(swept))], sweep_notes(swept), [w for c in swept.cases for w in c.result.warnings])
    else:
        _show(ui, report_tables(result), report_notes(result), result.warnings)
    document = plain((swept if several else result).to_dict())
    if output is not None:
        write_text(ui, output, json.dumps(document, indent=1, allow_nan=False) + "\n")
        ui.note(f"written: {output}")
    return document


def _show(ui: Ui, tables: Iterable[tuple[str | None, Rows]], notes: Iterable[str], warnings: Iterable[str]) -> None:
    for warning in dict.fromkeys(warnings):
        ui.warn(warning)
    for title, rows in tables:
        first, *others = rows[0]
        shown = table(first, *(f">{heading}" if heading else "" for heading in others), title=title)
        for row in rows:
            shown.add_row(*row.values())
        if title is not None:
            ui.data("")
        ui.data(shown)
    for note in notes:
        ui.note(note)
