"""`edgeprune search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli import parse
from edgeprune.cli.common import verb, write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.ui import Ui, pairs, table
from edgeprune.errors import CheckFailed

if TYPE_CHECKING:
    from rich.table import Table

    from edgeprune.search.run import Row, SearchResult


@verb(
    "search",
    "Find keep rates and stages by measured latency.\n\nMeasures what tokens cost on the target, judges schedules on "
    "labelled images, exports and measures the best, and writes a recipe for `edgeprune export --recipe`. With "
    "--latency-budget the most accurate schedule within it; else the fastest that loses no more than --max-drop.",
)
@click.option("-m", "--model", required=True, metavar="NAME", help="A name `edgeprune models` lists.")
@click.option("--method", required=True, metavar="NAME", help="One that takes keep rates, or cropr or tome.")
@click.option("--method-option", multiple=True, metavar="KEY=VALUE", help="Setting of the method; repeatable.")
@click.option(
    "--model-option", multiple=True, metavar="KEY=VALUE", help="Field of the model, e.g. reg_tokens=4; repeatable."
)
@click.option(
    "--stages", metavar="LIST", help="Blocks of the uniform schedules, and those with trained weights: 3,6,9."
)
@click.option("--fixed-stages", is_flag=True, help="Search keep rates only; stages stay where they are.")
@click.option("--checkpoint", required=True, metavar="PATH", help="A .safetensors, .pth or .bin file, or hf-hub:name.")
@click.option("--ema", is_flag=True, help="Take the checkpoint's averaged weights.")
@click.option("--image-size", type=parse.ImageSize(), help="224, or 224x320 (height x width).")
@click.option("--patch-size", type=click.IntRange(min=1), metavar="PIXELS")
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N")
@click.option("--labels", type=click.Path(path_type=Path), metavar="FILE", help="Class names, to find folders by.")
@click.option("--target", default="ort-cpu", show_default=True, metavar="NAME", help="What is measured.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Images per run.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="0: all cores.")
@click.option("--latency-budget", metavar="TIME", help="Of one run: 8ms, 800us. Without, the whole frontier.")
@click.option(
    "--max-drop", type=float, default=0.5, show_default=True, metavar="POINTS", help="Top-1 that may be lost."
)
@click.option("--data", required=True, metavar="DATA", help="digits, or imagefolder:PATH; its train images choose.")
@click.option(
    "--images", type=click.IntRange(min=2), metavar="N", help="That judge the best; 1024, or 256 with --quick."
)
@click.option("--subset", type=click.IntRange(min=2), metavar="N", help="Of them, that judge every schedule; 256.")
@click.option("--evaluations", type=click.IntRange(min=1), metavar="N", help="Schedules judged; 160, 40 with --quick.")
@click.option("--finalists", type=click.IntRange(min=1), metavar="N", help="Exported and measured; 6, 3 with --quick.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option("--quick", is_flag=True, help="Fewer of everything, marked as such.")
@click.option("--dry-run", is_flag=True, help="Show what would be searched; measure and read nothing.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the frontier.")
@click.option("--overwrite", is_flag=True, help="Replace the files.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The recipe, JSON.")
def command(
    ui: Ui, output: Path | None, svg: Path | None, dry_run: bool, overwrite: bool, **options: Any
) -> dict[str, Any]:
    """Print the frontier and write the recipe."""
    from edgeprune.files import check_free

    request = _request(**options)
    for path in (output, svg):
        if path is not None:
            check_free([path], overwrite)
    from edgeprune.search.plot import as_svg, as_text
    from edgeprune.search.run import plan_search, search_schedules

    if dry_run:
        return _dry_run(ui, plan_search(request))
    with ui.steps() as report:
        result = search_schedules(request, progress=report)
    ui.results = plain(result.to_dict())
    for warning in result.warnings:
        ui.warn(warning)
    ui.data(schedule_rows(result))
    ui.data("")
    ui.data(as_text(result))
    for note in notes(result):
        ui.note(note)
    if svg is not None:
        write_text(ui, svg, as_svg(result))
    if result.recipe is None:
        raise CheckFailed(
            str(result.why_none),
            code="search-budget" if request.budget_ms is not None else "search-drop",
            expected="a schedule within --latency-budget that loses no more than --max-drop",
            hint="allow more of either, search longer with --evaluations, or fine-tune the weights at such a schedule",
        )
    if output is not None:
        write_text(ui, output, result.recipe.to_json())
        ui.note(f"written: {output}\nnext: edgeprune export --recipe {output} --checkpoint FILE -o DIR")
    return plain(result.to_dict())


def _request(
    *,
    method_option: tuple[str, ...],
    model_option: tuple[str, ...],
    labels: Path | None,
    batch: int,
    latency_budget: str | None,
    fixed_stages: bool,
    threads: int,
    max_drop: float,
    data: str,
    seed: int,
    quick: bool,
    images: int | None,
    subset: int | None,
    evaluations: int | None,
    finalists: int | None,
    **export: Any,
) -> Any:
    """Return the SearchRequest of the options."""
    from edgeprune.export import ExportRequest
    from edgeprune.search import request as defaults
    from edgeprune.search.request import SearchRequest, parse_latency

    budget = None if latency_budget is None else parse_latency(latency_budget)
    count = images or (defaults.QUICK_IMAGES if quick else defaults.IMAGES)
    own = defaults.QUICK_SUBSET if quick else defaults.SUBSET
    return SearchRequest(
        ExportRequest(
            **export,
            method_options=parse.key_values(method_option, "--method-option"),
            model_options=parse.model_options(model_option),
            labels=None if labels is None else parse.read_labels(labels),
            batch=(batch, batch),
        ),
        data,
        budget_ms=budget,
        max_drop=max_drop,
        images=count,
        subset=min(own, count) if subset is None else subset,
        evaluations=evaluations or (defaults.QUICK_EVALUATIONS if quick else defaults.EVALUATIONS),
        finalists=finalists or (defaults.QUICK_FINALISTS if quick else defaults.FINALISTS),
        threads=threads,
        seed=seed,
        fixed_places=fixed_stages,
        quick=quick,
    )


def _dry_run(ui: Ui, plan: dict[str, Any]) -> dict[str, Any]:
    ui.data(
        pairs(
            [
                ("model", plan["model"]),
                ("method", plan["method"]),
                ("target", plan["target"]),
                ("places", ", ".join(map(str, plan["places"]))),
                ("measured", f"{plan['networks']} networks for the table, {plan['finalists']} finalists"),
                ("judged", f"{plan['evaluations']} schedules on {plan['subset']} images, the best on {plan['images']}"),
            ]
        )
    )
    shown = table("uniform schedule", "tokens kept")
    for label, kept in plan["uniform"].items():
        shown.add_row(label, ", ".join(map(str, kept)))
    ui.data("")
    ui.data(shown)
    ui.note("dry run: nothing was measured, read or written")
    return {"dry_run": True, **plan}


def schedule_rows(result: SearchResult) -> Table:
    """Return the frontier and the finalists, the fastest first, and the dense model."""
    test = result.test_images is not None
    columns = ["", "schedule", "tokens kept", ">predicted (ms)", ">measured (ms)", ">off (%)", ">top-1 (%)", ">drop"]
    shown = table(*columns, *([">test top-1 (%)"] if test else []))
    listed = {id(row): row for row in (*result.frontier, *result.finalists)}.values()
    for row in (*sorted(listed, key=lambda r: r.predicted_ms), result.dense):
        mark = "->" if row is result.chosen else ""
        cells = [mark, schedule_words(row), ", ".join(map(str, row.kept)) or "all", f"{row.predicted_ms:.3f}"]
        cells += ["" if row.measured_ms is None else f"{row.measured_ms:.3f}"]
        cells += ["" if row.error is None else f"{100 * row.error:+.1f}"]
        cells += [f"{100 * row.top1:.2f}", f"{100 * row.drop:+.2f}"]
        cells += ["" if row.test_top1 is None else f"{100 * row.test_top1:.2f}"] if test else []
        shown.add_row(*cells)
    return shown


def schedule_words(row: Row) -> str:
    """Return a schedule as the command line takes it, and what it is called."""
    parts = [f"--stages {row.stages}"] if row.stages else []
    parts += [f"{name}={value}" for name, value in row.options.items()]
    return " ".join(parts or [row.label or ""]) + (f" ({row.label})" if row.label and parts else "")


def notes(result: SearchResult) -> list[str]:
    """Return what to know of the figures."""
    table, request = result.table, result.request
    off = sorted(abs(e) for e in table.errors)
    clock = "processor time" if table.clock == "cpu" else "wall time"
    found = [
        f"times are {clock} of one run of {request.export.batch[0]} image(s), {request.threads} thread(s); top-1 and "
        f"drop on {result.images} calibration images"
        + ("" if result.test_images is None else f", test top-1 on {result.test_images} others"),
        f"{result.evaluated} schedules judged; table of {result.networks} measured networks, each predicted by the "
        f"others within {100 * off[len(off) // 2]:.1f} % (median), {100 * off[-1]:.1f} % (worst)",
    ]
    if abs(result.drift - 1) > 0.03:
        how = f"{100 * abs(result.drift - 1):.0f} % {'slower' if result.drift > 1 else 'faster'}"
        found.append(
            f"the machine was {how} when the finalists were measured; 'off' and the choice have that taken out, by the "
            "dense graph"
        )
    if request.quick:
        found.append("quick: few networks, schedules and images; do not rely on it")
    return found
