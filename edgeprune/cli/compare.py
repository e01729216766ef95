"""`edgeprune compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.common import BUNDLE, verb, write_text
from edgeprune.cli.envelope import plain
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from edgeprune.bench.gate import Comparison, Gate

FILE = click.Path(path_type=Path, dir_okay=False)


@verb(
    "compare",
    "Fail when HEAD is slower or worse than BASE, beyond noise.\n\n"
    "BASE and HEAD are result files of `edgeprune bench -o`, "
    "or bundles: those are measured head to head, in turns, and what looks slower is measured again before it counts. "
    "Exit code 1 only for a confirmed regression. Samples of other machines are not compared (status no-baseline).",
)
@click.argument("base", type=BUNDLE)
@click.argument("head", type=BUNDLE, required=False)
@click.option(
    "--fail-on",
    multiple=True,
    metavar="STAT:LIMIT",
    help="median, mean, min, speedup, top1 or parity, and percent or, for times, seconds; repeatable. By default "
    "median:5% and speedup:5%.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.01,
    show_default=True,
    help="Of the rank test.",
)
@click.option(
    "--confirm", type=click.IntRange(0, 9), default=1, show_default=True, help="Reruns of what looks slower (bundles)."
)
@click.option("--require-baseline", is_flag=True, help="Exit 1 when something cannot be compared.")
@click.option("--floor", type=FILE, metavar="FILE", help="Smallest change that counts, by stat; see --calibrate.")
@click.option(
    "--calibrate",
    type=click.IntRange(min=3),
    metavar="N",
    help="Measure the bundle BASE against itself N times and write --floor FILE.",
)
@click.option(
    "--builds",
    type=click.IntRange(min=2),
    metavar="N",
    help="Build the engines of both sides N times, without any cache, and compare all (bundles for TensorRT).",
)
@click.option("--blocks", type=click.IntRange(min=6), help="Of a head-to-head run: 40, or 16 with --quick.")
@click.option("--quick", is_flag=True, help="A short run that finds large changes only.")
@click.option("--batch", type=click.IntRange(min=1), help="Images per run; by default the bundle's smallest.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="0: all cores.")
@click.option(
    "--accuracy",
    nargs=2,
    type=FILE,
    metavar="BASE HEAD",
    help="What `edgeprune evaluate --json` printed of both; for top1.",
)
@click.option("--markdown", type=FILE, metavar="FILE", help="Write the table for a pull request.")
@click.option("--junit", type=FILE, metavar="FILE", help="Write JUnit XML.")
@click.option(
    "--github-action-benchmark", type=FILE, metavar="FILE", help="Write HEAD's values as customSmallerIsBetter."
)
def command(
    ui: Ui, base: Path, head: Path | None, calibrate: int | None, require_baseline: bool, **options: Any
) -> dict[str, Any]:
    """Print the table."""
    if calibrate is not None:
        return _calibrate(ui, base, head, calibrate, options)
    if head is None:
        raise InputError("no HEAD", code="usage", expected="edgeprune compare BASE HEAD", hint="or add --calibrate 20")
    comparison = _compare(ui, base, head, options)
    _show(ui, comparison)
    _write(ui, comparison, require_baseline, options)
    ui.results = plain(comparison.to_dict())
    missing = [o for o in comparison.outcomes if o.status == "no-baseline"]
    for outcome in missing:
        ui.warn(f"not compared: {outcome.runner} {outcome.stat}: {outcome.reason}")
    for warning in comparison.warnings:
        ui.warn(warning)
    if failed := comparison.failed(require_baseline=require_baseline):
        what = ", ".join(f"{o.runner} {o.stat} ({o.status})" for o in failed)
        raise CheckFailed(
            f"the gate failed: {what}",
            code="regression" if any(o.status == "regressed" for o in failed) else "no-baseline",
            expected="no change beyond the limits" + (", and a baseline for each" if require_baseline else ""),
            details={"outcomes": [f"{o.runner} {o.stat}" for o in failed]},
        )
    return ui.results


def _compare(ui: Ui, base: Path, head: Path, options: dict[str, Any]) -> Comparison:
    from edgeprune.bench.gate import Gate, compare_results
    from edgeprune.bench.gate_measure import compare_bundles, read_floor
    from edgeprune.bench.gate_rules import parse_rules

    rules = parse_rules(options["fail_on"])
    floor = None if options["floor"] is None else read_floor(options["floor"])
    files = options["accuracy"]
    top1 = {} if files is None else {"base_top1": read_top1(files[0]), "head_top1": read_top1(files[1])}
    if files is not None and not options["fail_on"]:
        rules = parse_rules(("median:5%", "speedup:5%", "top1:0.5%"))
    bundles = [path.is_dir() for path in (base, head)]
    if all(bundles):
        gate = Gate(rules, options["alpha"], {} if floor is None else floor.head_to_head, paired=True)
        return _head_to_head(ui, base, head, gate, options, top1, compare_bundles)
    if any(bundles):
        raise InputError(
            f"'{base}' and '{head}' are a bundle and a file",
            code="compare-kinds",
            expected="two bundles, or two result files of `edgeprune bench -o FILE`",
            hint="edgeprune bench BUNDLE -o FILE writes the result of a bundle",
        )
    if options["builds"] is not None:
        raise InputError(
            "--builds builds engines, and result files hold none",
            code="compare-builds",
            expected="two bundles for TensorRT",
            hint="edgeprune compare BASE_BUNDLE HEAD_BUNDLE --builds 2",
        )
    gate = Gate(rules, options["alpha"], {} if floor is None else floor.stored)
    return compare_results(read_one(base), read_one(head), gate, (str(base), str(head)), **top1)


def _head_to_head(
    ui: Ui,
    base: Path,
    head: Path,
    gate: Gate,
    options: dict[str, Any],
    top1: dict[str, dict[str, float]],
    compare: Callable[..., Comparison],
) -> Comparison:
    from edgeprune.bench.gate_measure import BLOCKS, QUICK_BLOCKS, PairPlan
    from edgeprune.runtime.bundle import load_bundle

    one, two = load_bundle(base), load_bundle(head)
    quick = options["quick"]
    plan = PairPlan(
        options["blocks"] or (QUICK_BLOCKS if quick else BLOCKS),
        options["batch"] or one.manifest.batch[0],
        options["threads"],
        dense=any(rule.stat == "speedup" for rule in gate.rules),
        quick=quick,
        builds=options["builds"] or 0,
    )
    with ui.steps() as report:
        return compare(one, two, gate, plan, confirm=options["confirm"], progress=report, **top1)


def _calibrate(ui: Ui, base: Path, head: Path | None, runs: int, options: dict[str, Any]) -> dict[str, Any]:
    from edgeprune.bench.gate_measure import BLOCKS, QUICK_BLOCKS, PairPlan, calibrate
    from edgeprune.runtime.bundle import load_bundle

    if head is not None or options["floor"] is None or options["builds"] is not None or not base.is_dir():
        raise InputError(
            "--calibrate measures one bundle as it is and writes its floor",
            code="calibrate",
            expected="one bundle, no HEAD, no --builds, and --floor FILE",
            hint=f"edgeprune compare BUNDLE --calibrate {runs} --floor floor.json",
        )
    bundle = load_bundle(base)
    quick = options["quick"]
    plan = PairPlan(
        options["blocks"] or (QUICK_BLOCKS if quick else BLOCKS),
        options["batch"] or bundle.manifest.batch[0],
        options["threads"],
        quick=quick,
    )
    with ui.steps() as report:
        floor = calibrate(bundle, plan, runs, progress=report)
    document = plain(floor.model_dump(by_alias=True))
    shown = table("stat", ">floor, head to head (%)", ">floor, stored samples (%)")
    for stat, value in floor.head_to_head.items():
        shown.add_row(stat, f"{100 * value:.2f}", f"{100 * floor.stored[stat]:.2f}")
    ui.data(shown)
    write_text(ui, options["floor"], json.dumps(document, indent=1) + "\n")
    ui.note(f"written: {options['floor']}")
    return document


def _show(ui: Ui, comparison: Comparison) -> None:
    from edgeprune.bench.gate_output import gate_notes, gate_rows

    rows = gate_rows(comparison)
    shown = table(*(name if name in ("graph", "stat", "status") else f">{name}" for name in rows[0]))
    for row in rows:
        shown.add_row(*row.values())
    ui.data(shown)
    for note in gate_notes(comparison):
        ui.note(note)
    ui.note(f"status: {comparison.status}")


def _write(ui: Ui, comparison: Comparison, require_baseline: bool, options: dict[str, Any]) -> None:
    from edgeprune.bench.gate_output import to_github_action_benchmark, to_junit, to_markdown

    texts = {
        "markdown": lambda: to_markdown(comparison),
        "junit": lambda: to_junit(comparison, require_baseline=require_baseline),
        "github_action_benchmark": lambda: to_github_action_benchmark(comparison),
    }
    for name, text in texts.items():
        if options[name] is not None:
            write_text(ui, options[name], text())
            ui.note(f"written: {options[name]}")


def read_one(path: Path) -> Any:
    """Return the only result of a file.

    Raises:
        InputError: `result-unreadable`, `compare-sweep`.
    """
    from edgeprune.bench.result import read_results

    results = read_results(path)
    if len(results) != 1:
        raise InputError(
            f"'{path}' holds {len(results)} results",
            code="compare-sweep",
            expected="the result of one bench",
            hint="bench the case to compare alone",
        )
    return results[0]


def read_top1(path: Path) -> dict[str, float]:
    """Return graph -> top-1 of what `edgeprune evaluate --json` printed.

    Raises:
        InputError: `accuracy-unreadable`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        graphs = document.get("results", document)["graphs"]
        return {str(name): float(row["top1"]) for name, row in graphs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' holds no accuracies: {error}",
            code="accuracy-unreadable",
            expected="what `edgeprune evaluate BUNDLE --data DATA --json` printed",
        ) from error
