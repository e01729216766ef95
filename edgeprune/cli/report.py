"""`edgeprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.common import verb, write_text
from edgeprune.cli.ui import Ui
from edgeprune.errors import InputError


@verb(
    "report",
    "Write results as one HTML file that needs no network.\n\nRESULTS are files of `bench -o`, files of `evaluate "
    "--json`, bundles and images, in any order. With a bundle that has token outputs and images (--images, --data, or "
    "among RESULTS) the report shows what every stage keeps.",
)
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--images", type=click.Path(path_type=Path), multiple=True, metavar="FILE", help="Repeatable.")
@click.option("--data", metavar="DATA", help="Images of digits, or of imagefolder:PATH.")
@click.option(
    "--count", type=click.IntRange(1, 12), default=6, show_default=True, metavar="N", help="Images of --data."
)
@click.option("--title", metavar="TEXT", help="Of the page.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="Replaced when it exists.",
)
def command(
    ui: Ui,
    results: tuple[Path, ...],
    images: tuple[Path, ...],
    data: str | None,
    count: int,
    title: str | None,
    output: Path,
) -> dict[str, Any]:
    """Read everything, draw, and write the file whole."""
    from edgeprune.bench.html import draw_overlays, read_inputs, render

    if output.is_dir():
        raise InputError(
            f"'{output}' is a directory", code="output-exists", expected="-o FILE, for example -o report.html"
        )
    report = read_inputs(results, images)
    if data is not None and not report.bundles:
        raise InputError(
            "--data without a bundle to run on it",
            code="report-images",
            expected="a bundle exported with --token-outputs beside the results",
            hint="edgeprune report bench.json BUNDLE --data digits -o report.html",
        )
    overlays = []
    if report.images or data is not None:
        with ui.steps() as steps:
            overlays = [
                draw_overlays(bundle, report.images, data=data, count=count, progress=steps)
                for bundle in report.bundles
            ]
    page = render(report, overlays, title=title)
    write_text(ui, output, page)
    ui.note(f"written: {output} ({len(page.encode()) / 1024:.0f} KiB)")
    return {
        "report": str(output),
        "bytes": len(page.encode()),
        "results": len(report.results),
        "evaluations": len(report.accuracies),
        "overlays": [len(o.pictures) for o in overlays],
    }
