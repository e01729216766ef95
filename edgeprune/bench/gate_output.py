"""A comparison for people and machines: rows, Markdown, JUnit, github-action-benchmark's array."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from edgeprune.bench.gate import Comparison, Outcome

Rows = list[dict[str, str]]
_MARKS = {
    "ok": "ok",
    "regressed": "REGRESSED",
    "improved": "improved",
    "no-baseline": "no baseline",
    "unstable": "unstable",
}


def gate_rows(comparison: Comparison) -> Rows:
    """Return a row per outcome; the keys are the headings."""
    spread = any(outcome.spread is not None for outcome in comparison.outcomes)
    return [_row(outcome, spread=spread) for outcome in comparison.outcomes]


def gate_notes(comparison: Comparison) -> list[str]:
    """Return the sentences that belong under the table."""
    how = "measured in turns in one process" if comparison.measured == "head to head" else "stored samples"
    clock = {"cpu": ", processor time of one thread", "wall": ", wall time", None: ""}[comparison.clock]
    notes = [
        f"{how}{clock}; change: of time, above 0 is slower; counts beyond its limit and with p < {comparison.alpha:g}"
    ]
    notes += _builds_notes(comparison)
    notes += [f"{o.runner} {o.stat}: {o.reason}" for o in comparison.outcomes if o.reason]
    return notes


def _builds_notes(comparison: Comparison) -> list[str]:
    if comparison.builds is None:
        return []
    if comparison.builds == 1:
        return ["one engine build per side, and no two are alike: --builds 2 builds and measures several"]
    how = f"{comparison.builds} engine builds per side and run, none from a cache; each block counts their median"
    return [f"{how}; no change counts that is within what builds of one side differ by"]


def to_markdown(comparison: Comparison) -> str:
    """Return a comment for a pull request."""
    rows = gate_rows(comparison)
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {note}" for note in [*gate_notes(comparison), *comparison.warnings])
    return f"### edgeprune compare: {_MARKS[comparison.status]}\n\n{table}\n\n{notes}\n"


def to_junit(comparison: Comparison, *, require_baseline: bool = False) -> str:
    """Return JUnit XML: a test case per outcome; what was not compared or not decided is skipped."""
    failed = comparison.failed(require_baseline=require_baseline)
    skipped = [o for o in comparison.outcomes if o.status in ("no-baseline", "unstable") and o not in failed]
    counts = {"tests": len(comparison.outcomes), "failures": len(failed), "errors": 0, "skipped": len(skipped)}
    attributes = {name: str(count) for name, count in counts.items()}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "edgeprune compare", **attributes})
    for outcome in comparison.outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"edgeprune.{_printable(outcome.runner)}", "name": outcome.stat}
        )
        text = "; ".join(f"{name}: {value}" for name, value in _row(outcome, spread=outcome.spread is not None).items())
        if outcome in failed or outcome in skipped:
            kind = "failure" if outcome in failed else "skipped"
            ElementTree.SubElement(
                case, kind, {"message": _printable(outcome.reason or outcome.status)}
            ).text = _printable(text)
        else:
            ElementTree.SubElement(case, "system-out").text = _printable(text)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def to_github_action_benchmark(comparison: Comparison) -> str:
    """Return HEAD's values as the array `customSmallerIsBetter` reads: smaller is better in every entry.

    A speed-up is written as time of pruned / time of dense, a share as its shortfall in percent.
    """
    entries = []
    for o in comparison.outcomes:
        if o.head is None:
            continue
        unit, value = {"ms": ("ms", o.head), "x": ("pruned / dense", 1 / o.head), "share": ("%", 100 * (1 - o.head))}[
            o.unit
        ]
        name = {"x": "time against dense", "share": f"{o.stat} shortfall"}.get(o.unit, o.stat)
        entry = {"name": f"{o.runner} {name}", "unit": unit, "value": round(value, 6), "extra": f"{o.status}"}
        if o.evidence is not None and o.evidence.low is not None and o.evidence.high is not None:
            entry["range"] = f"± {50 * (o.evidence.high - o.evidence.low):.2f} %"
        entries.append(entry)
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def _row(o: Outcome, *, spread: bool) -> dict[str, str]:
    change, p = "", ""
    if o.evidence is not None:
        change, p = f"{100 * (o.evidence.ratio - 1):+.2f} %", f"{o.evidence.worse:.2g}"
        if o.evidence.low is not None and o.evidence.high is not None:
            change += f" [{100 * (o.evidence.low - 1):+.2f}, {100 * (o.evidence.high - 1):+.2f}]"
    elif o.base is not None and o.head is not None and o.unit == "share":
        change = f"{100 * (o.head - o.base):+.2f} points"
    return {
        "graph": o.runner,
        "stat": o.stat,
        "base": _value(o.base, o.unit),
        "head": _value(o.head, o.unit),
        "change [95 % CI]": change,
        "limit": f"{100 * o.limit:.3g} {'points' if o.unit == 'share' else '%'}",
        **({"builds differ by": "" if o.spread is None else f"{100 * o.spread:.2f} %"} if spread else {}),
        "p slower": p,
        "blocks": "" if o.evidence is None else str(o.evidence.blocks),
        "reruns": ", ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in o.reruns),
        "status": _MARKS[o.status],
    }


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return {"ms": f"{value:.3f} ms", "x": f"{value:.3f} x", "share": f"{100 * value:.2f} %"}[unit]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _printable(text: str) -> str:
    """Return a text without what XML 1.0 has no place for."""
    return "".join(c for c in text if c in "\t\n" or c >= " ")
