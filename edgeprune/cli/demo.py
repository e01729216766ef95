"""`edgeprune demo`: the whole way on the model that ships with the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.common import verb, write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.ui import Ui, table

if TYPE_CHECKING:
    from edgeprune.cli.demo_steps import Demo


@verb(
    "demo",
    "Export the shipped DynamicViT checkpoint, verify it, evaluate and measure it against dense.\n\n"
    "The task is digits on cluttered canvases, the images are ones no training saw. Takes about a minute and needs "
    "neither GPU nor network.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out/demo", show_default=True, metavar="DIR")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Another one that `finetune` wrote."
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left at --output.")
def command(ui: Ui, output: Path, checkpoint: Path | None, overwrite: bool) -> dict[str, Any]:
    """Run every step and print one table."""
    from edgeprune.cli.demo_steps import check_output, draw_overlays, find_checkpoint, run_steps, write_report

    check_output(output, overwrite)
    source = find_checkpoint(checkpoint)
    with ui.steps() as report:
        demo = run_steps(ui, source, output, report)
        report("drawing what was kept", 0.95)
        overlays = draw_overlays(ui, demo.bundle, output)
        page = write_report(ui, demo, output)
    results = {"checkpoint": source.name, "overlays": [str(path) for path in overlays], **plain(vars(demo))}
    results |= {"bundle": str(demo.bundle.path), "report": None if page is None else str(page)}
    write_text(ui, output / "results.json", json.dumps(results, indent=1) + "\n")
    show(ui, demo)
    ui.note(f"bundle: {demo.bundle.path}   images with dropped patches dimmed: {output / 'overlays'}")
    if page is not None:
        ui.note(f"report: {page}")
    ui.note(f"next: edgeprune inspect {demo.bundle.path}")
    return results


def show(ui: Ui, demo: Demo) -> None:
    """Print the table and what belongs under it."""
    from edgeprune.bench.report import format_ratio, report_notes

    macs = demo.bundle.manifest.macs
    assert macs is not None
    shown = table("", ">accuracy (%)", ">MACs (M)", ">median latency (ms)", ">speed-up [95 % CI]")
    rows = (("dense", demo.dense or demo.unpruned, macs.dense), ("pruned", demo.pruned, macs.pruned))
    for name, accuracy, count in rows:
        runner = demo.bench.runner(name)
        assert runner is not None
        speedup = "1.00" if runner.speedup is None else format_ratio(runner.speedup)
        values = (f"{100 * accuracy.top1:.2f}", f"{count / 1e6:.1f}", f"{runner.median_wall_ms:.3f}", speedup)
        shown.add_row(name, *values)
    ui.data(shown)
    ui.note(f"accuracy: top-1 on {demo.pruned.images} cluttered digits no training saw")
    if demo.dense is None:
        ui.note("there is no dense checkpoint beside it: dense is the same weights without pruning")
    else:
        ui.note(
            f"dense has its own checkpoint; the pruned one's weights reach {100 * demo.unpruned.top1:.2f} % unpruned"
        )
    ui.note(f"against PyTorch: max relative error {demo.parity.max_rel_error:.1e}, kept tokens the same")
    for note in report_notes(demo.bench):
        ui.note(note)
