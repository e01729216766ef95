"""The report as a page: sections of figures, tables and sentences, put into the template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune.bench.html import charts, facts
from edgeprune.bench.html.charts import Bar, Point, SpeedRow, kind_of
from edgeprune.bench.html.inputs import ReportInput
from edgeprune.bench.html.overlays import Keep, Overlays
from edgeprune.bench.report import Rows, energy_table, layers_table, report_notes, report_tables
from edgeprune.bench.result import BenchResult
from edgeprune.errors import InternalError, missing_package
from edgeprune.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW = 900.0, 330.0
DOTS = 24_000  # of all distributions of a report together
MAX_BYTES = 2_000_000


@dataclass(frozen=True)
class Figure:
    """A drawing for wide and one for narrow screens, with what stands under it."""

    wide: str
    narrow: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, which are the headings."""

    title: str
    rows: Rows


@dataclass
class Section:
    """A part of the page; a list among its blocks holds sentences, `notes` are those under all of it."""

    key: str
    title: str
    blocks: list[Figure | Table | list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def render(report: ReportInput, overlays: Sequence[Overlays] = (), *, title: str | None = None) -> str:
    """Return the page.

    Args:
        report: results, accuracies and bundles.
        overlays: kept tokens of bundles.
        title: of the page; by default the model and method, or how many results there are.

    Raises:
        EnvironmentLackError: `package-missing` without jinja2.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise missing_package("jinja2", "report", "writing a report") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["drawing"] = lambda block: isinstance(block, Figure)
    environment.tests["string_list"] = lambda block: isinstance(block, list)
    environment.filters["keep_data"] = _keep_data
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    names = facts.names_of(report.results)
    summaries = [facts.summarise_result(r, report.accuracies_of(r)) for r in report.results]
    page = environment.get_template("report.html.j2").render(
        title=title or (summaries[0].title if len(summaries) == 1 else f"{len(summaries)} benches"),
        created=max(r.created for r in report.results),
        version=__version__,
        names=names,
        summaries=summaries,
        medians=[_medians(r) for r in report.results],
        caveats=facts.report_caveats(report),
        sections=list(_sections(report, names)),
        overlays=overlays,
        machines=facts.fingerprint_rows(report.results, names),
        reproduce=_reproduce(report, names, overlaid=bool(overlays)),
        svg=Markup,  # drawings escape what they hold
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    if len(page.encode()) >= MAX_BYTES:
        raise InternalError(
            f"the report has {len(page.encode())} bytes", code="report-size", expected="fewer than 2 MB"
        )
    return page


def _keep_data(keeps: Sequence[Keep]) -> list[dict[str, Any]]:
    """Return what the script tells below a picture, per density."""
    return [
        {"told": k.told, "right": k.right, "overflow": k.overflow, "kept": [stage.kept for stage in k.stages]}
        for k in keeps
    ]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(report: ReportInput, names: Sequence[str]) -> Iterator[Section]:
    """Yield the sections that have something to show; those that people look for and that are empty say why."""
    yield _tables(report, names)
    yield _speed(report, names)
    yield _distributions(report, names)
    yield _frontier(report, names)
    yield _tokens(report, names)
    yield _layers(report, names)
    yield _energy(report, names)


def _tables(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("table", "Dense against pruned")
    for result, name in zip(report.results, names, strict=True):
        elsewhere = [energy_table(result.runners), layers_table(result.layers)]  # in sections of their own
        for title, rows in report_tables(result):
            if rows in elsewhere:
                continue
            section.blocks.append(Table(_titled(name, title or f"{facts.title_of(result)}"), rows))
        accuracies = report.accuracies_of(result)
        if accuracies is not None and (rows := facts.accuracy_rows(result, accuracies)):
            random = " (random weights: these mean nothing)" if result.random_weights else ""
            section.blocks.append(Table(_titled(name, f"accuracy{random}"), rows))
        warnings = [f"warning: {warning}" for warning in result.warnings]
        told = [accuracies.note] if accuracies is not None and accuracies.note else []
        section.blocks.append([_titled(name, note) for note in [*report_notes(result), *told, *warnings]])
    return section


def _speed(report: ReportInput, names: Sequence[str]) -> Section:
    rows = []
    for result, name in zip(report.results, names, strict=True):
        own = {d.runner: d.macs for d in result.densities} or {"pruned": result.macs}
        for runner in result.runners:
            if runner.speedup is not None:
                macs = own.get(runner.name)
                nominal, ideal = (None, None) if macs is None else (macs.ratio, macs.ideal_speedup)
                rows.append(SpeedRow(_titled(name, runner.name), kind_of(runner.name), runner.speedup, nominal, ideal))
    section = Section("speed", "Measured and promised")
    if not rows:
        section.notes.append("There is nothing to compare with the dense graph.")
        return section
    caption = (
        "Filled sign and bar: measured speed-up over the dense graph with its 95 % interval. "
        "Hollow diamond: the ratio of multiply-accumulates as papers count them. "
        "Upright stroke: the ratio of those the two graphs execute. Dashed line: as fast as dense."
    )
    section.blocks.append(_both("speed", caption, partial(charts.speedups, rows)))
    return section


def _distributions(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("latency", "Latency distributions")
    most = max(30, min(240, DOTS // max(1, 2 * sum(len(r.runners) for r in report.results))))
    for i, (result, name) in enumerate(zip(report.results, names, strict=True)):
        runners = result.runners
        counts = max(r.n for r in runners)
        dots = f"{most} of them, evenly spread, as dots" if counts > most else "a dot for each"
        caption = _titled(
            name,
            f"Wall time, all samples: density, quartiles (bar), median (stroke), {dots}. The axis need not begin at 0 "
            f"and ends where {100 * charts.SHARE_SHOWN:.0f} % of the samples do; those above are counted.",
        )
        section.blocks.append(_both(f"latency{i}", caption, partial(charts.distributions, runners, dots=most)))
    return section


def _frontier(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("frontier", "Accuracy against latency")
    drawings: dict[str, list[Point]] = {}
    for result, name in zip(report.results, names, strict=True):
        accuracies = report.accuracies_of(result)
        if accuracies is None or result.random_weights:
            continue
        points = drawings.setdefault(f"{result.bundle['model']} on {accuracies.data}", [])
        for runner in result.runners:
            accuracy = accuracies.of_runner(runner.name)
            if accuracy is not None:
                low, high = facts.wilson(accuracy)
                points.append(
                    Point(
                        _titled(name, _short(runner.name)),
                        kind_of(runner.name),
                        runner.median_wall_ms,
                        100 * accuracy.top1,
                        100 * low,
                        100 * high,
                    )
                )
    for i, (what, points) in enumerate(drawings.items()):
        caption = (
            f"{what}. To the left is faster, up is better. Filled signs lie on the frontier (dashed): nothing "
            "measured is both at least as fast and at least as accurate. Where the bars of two points overlap "
            "much, these images do not tell their accuracies apart."
        )
        section.blocks.append(_both(f"frontier{i}", caption, partial(charts.frontier, points)))
    if drawings:
        return section
    if all(r.random_weights for r in report.results):
        section.notes.append("Random weights have no accuracy worth drawing; the latencies above are real.")
    else:
        section.notes.append(
            "No accuracy was given. edgeprune evaluate BUNDLE --data DATA --json > evaluate.json, then add "
            "evaluate.json to the files of the report."
        )
    return section


def _tokens(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("tokens", "Latency against tokens")
    drawings: dict[str, list[Point]] = {}
    for result, name in zip(report.results, names, strict=True):
        drawings.setdefault(result.bundle["model"], []).extend(_token_points(report, result, name))
    for i, (model, points) in enumerate(drawings.items()):
        if len({p.x for p in points}) < 2:
            section.notes.append(f"{model}: one token count alone was measured.")
            continue
        caption = (
            f"{model}: median time of a run over the patch tokens that are left behind the first stage. "
            "Hollow signs are buckets, or quartiles of the images, of an adaptive bundle; a level bar spans the tokens "
            "their images kept, an upright one goes to the p90."
        )
        section.blocks.append(_both(f"tokens{i}", caption, partial(charts.tokens, points)))
    return section


def _token_points(report: ReportInput, result: BenchResult, name: str) -> Iterator[Point]:
    """Yield what is known of (tokens at the first stage, median latency) for the graphs of a result."""
    stages = result.bundle["method"].get("stages") or []
    dense, pruned = result.runner("dense"), result.runner("pruned")
    if not stages:
        return
    if dense is not None:
        p90 = dense.percentiles["p90"].value
        yield Point(
            _titled(name, "dense"), "dense", stages[0]["tokens_in"], dense.median_wall_ms, high=p90, linked=name
        )
    if result.adaptive is not None:
        for group in result.adaptive.groups:
            if group.median_ms is not None and group.tokens is not None:
                low, high = group.tokens
                what = "bucket" if result.adaptive.form == "buckets" else "quartile"
                label = group.name if group.name.startswith("mixed") else f"{what} {group.name}"
                yield Point(
                    _titled(name, label),
                    "pruned",
                    (low + high) / 2,
                    group.median_ms,
                    high=group.p90_ms.value,
                    x_range=(low, high) if low != high else None,
                    hollow=True,
                )
        return
    bundle = report.bundle_of(result)
    kept = {} if bundle is None else {d.keep_rate: d.stages[0].kept for d in bundle.manifest.densities if d.stages}
    for density in result.densities:
        runner = result.runner(density.runner)
        if runner is not None and density.keep_rate in kept:
            p90 = runner.percentiles["p90"].value
            tokens, label = kept[density.keep_rate], f"keep {density.keep_rate:g}"
            yield Point(_titled(name, label), "pruned", tokens, runner.median_wall_ms, high=p90, linked=name)
    if pruned is not None and not result.densities:
        p90 = pruned.percentiles["p90"].value
        yield Point(_titled(name, "pruned"), "pruned", stages[0]["kept"], pruned.median_wall_ms, high=p90, linked=name)


def _layers(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("layers", "Where the time went")
    for i, (result, name) in enumerate(zip(report.results, names, strict=True)):
        rows = charts.part_bars(result.layers)
        if rows:
            sources = ", ".join(dict.fromkeys(f"{x.source}, {x.runs} runs" for x in result.layers))
            caption = _titled(name, f"Time of one run by part of the network ({sources}; medians).")
            draw = partial(charts.bars, rows, title="Where the time went", unit="ms")
            section.blocks.append(_both(f"layers{i}", caption, draw))
        if result.layers:
            section.blocks.append(Table(_titled(name, "by part of the network"), facts.part_rows(result)))
            section.notes += list(dict.fromkeys(_titled(name, x.note) for x in result.layers if x.note))
    if not section.blocks:
        section.notes.append("These results hold no times of single layers.")
    return section


def _energy(report: ReportInput, names: Sequence[str]) -> Section:
    section = Section("energy", "Energy")
    for i, (result, name) in enumerate(zip(report.results, names, strict=True)):
        told = energy_table(result.runners)
        found = [(r, r.energy) for r in result.runners if r.energy is not None]
        if not found:
            continue
        rows = [
            Bar("", r.name, kind_of(r.name), energy.joules_per_image, f"{row['energy (mJ/image)']} mJ")
            for (r, energy), row in zip(found, told, strict=True)
        ]
        how = "; ".join(dict.fromkeys(f"{e.source}, rail {e.rail}, by {e.method}" for _, e in found))
        caption = _titled(name, f"Energy of one image, what the machine takes when idle included ({how}).")
        draw = partial(charts.bars, rows, title="Energy per image", unit="mJ")
        section.blocks.append(_both(f"energy{i}", caption, draw))
        section.blocks.append(Table(_titled(name, "energy of an image"), told))
    if not section.blocks:
        lacking = dict.fromkeys(x for r in report.results if r.telemetry is not None for x in r.telemetry.lacking)
        why = f": {'; '.join(lacking)}" if lacking else "; the machine told no power, or was not asked"
        section.notes.append(f"No energy was measured{why}.")
    return section


def _reproduce(report: ReportInput, names: Sequence[str], *, overlaid: bool) -> list[tuple[str, list[str]]]:
    """Return (what it is, lines) per result."""
    found = []
    for result, name in zip(report.results, names, strict=True):
        accuracies = report.accuracies_of(result)
        drawn = overlaid and (len(report.results) == 1 or report.bundle_of(result) is not None)
        lines = facts.reproduce(result, overlays=drawn, accuracies=accuracies)
        stages = facts.stage_words(result)
        found.append((_titled(name, facts.title_of(result)), [*([f"# {stages}"] if stages else []), *lines]))
    return found


def _medians(result: BenchResult) -> list[tuple[str, str, str, float]]:
    """Return (name, kind, median, share of the slowest) of dense and pruned, for the picture in the summary."""
    shown = [r for r in result.runners if r.name == "dense" or r.name.startswith("pruned")]
    slowest = max((r.median_wall_ms for r in shown), default=1.0)
    return [(r.name, kind_of(r.name), f"{r.median_wall_ms:.3f} ms", r.median_wall_ms / slowest) for r in shown]


def _both(key: str, caption: str, draw: Callable[..., str]) -> Figure:
    return Figure(draw(key=f"{key}-w", width=WIDE), draw(key=f"{key}-n", width=NARROW), caption)


def _titled(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _short(runner: str) -> str:
    return runner.replace("pruned at", "keep")
