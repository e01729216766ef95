"""What a report says in words and tables. Every number is one of the result's own, formatted as the terminal does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.bench.html.inputs import Accuracies, GraphAccuracy, ReportInput
from edgeprune.bench.images import NOISE
from edgeprune.bench.layers import PARTS
from edgeprune.bench.report import Rows, format_ratio, layers_table
from edgeprune.bench.result import BenchResult, RunnerResult
from edgeprune.bench.stats import Ratio

Z95 = 1.959964
MACHINE = ("cpu_model", "architecture", "usable_cores", "gpu", "governor", "power_mode", "nvpmodel")
FIELDS = {"memory_mib": "memory (MiB)", "mhz": "clock (MHz)", "load_1min": "load, 1 min", "cpu_model": "processor"}
LINE = 88  # characters of a command before it is continued on the next line
BASELINES = ("dense", "random", "naive", "float")


@dataclass(frozen=True)
class Caveat:
    """Something that must be read with the numbers: a word, and what it means here."""

    name: str
    text: str


@dataclass(frozen=True)
class Summary:
    """The first thing a reader sees of a result.

    Attributes:
        title: model and method.
        setting: target, batch, threads and processor.
        headline: "1.52", the speed-up, or None where there is none; `interval` is "[1.50, 1.54]".
        verdict: "faster", "slower", "no difference shown", or what stands in its place.
        sentences: the whole of it in words.
        of: the graph that the headline is of, where a bundle has several.
        caveats: why to be careful, worst first.
    """

    title: str
    setting: str
    headline: str | None
    interval: str | None
    verdict: str
    sentences: list[str]
    caveats: list[Caveat]
    of: str = ""


def title_of(result: BenchResult) -> str:
    """Return "vit_digits, dynamicvit at keep rate 0.7", or the keep rates of a bundle with several."""
    method, rates = result.bundle["method"], [d.keep_rate for d in result.densities]
    if rates:
        words = f"{method['name']} at keep rates " + ", ".join(f"{rate:g}" for rate in rates)
    elif not method.get("stages"):
        words = "no pruning" if method["name"] == "dense" else method["name"]
    else:
        words = f"{method['name']} at keep rate {method['keep_rate']:g}"
    return f"{result.bundle['model']}, {words}"


def setting_of(result: BenchResult) -> str:
    """Return target, precision, batch, threads, scenario and processor."""
    parts = [
        f"{result.bundle['target']} ({result.bundle['precision']})",
        f"batch {result.batch}",
        f"{result.threads or 'all'} thread{'' if result.threads == 1 else 's'}",
        *([] if result.scenario is None else [result.scenario.text]),
        str(_device(result)),
    ]
    return ", ".join(parts)


def _device(result: BenchResult) -> str:
    gpu = result.fingerprint.get("gpu")
    named = gpu.get("name") if isinstance(gpu, dict) else None
    return named or result.fingerprint.get("cpu_model") or "unknown machine"


def names_of(results: Sequence[BenchResult]) -> list[str]:
    """Return a short name for every result: a letter where there are several, "" for a single one."""
    if len(results) == 1:
        return [""]
    return [chr(ord("A") + i) if len(results) <= 26 else str(i + 1) for i in range(len(results))]


def summarise_result(result: BenchResult, accuracies: Accuracies | None) -> Summary:
    """Return what stands on top of the report for a result."""
    dense = result.runner("dense")
    pruned = [r for r in result.runners if r.name.startswith("pruned")]
    title, setting = title_of(result), setting_of(result)
    caveats = list(caveats_of(result, accuracies))
    if dense is None or not pruned or pruned[0].speedup is None:
        only = result.runners[0]
        sentence = (
            f"{title} takes {only.median_wall_ms:.3f} ms per run (median of {only.n} runs, {setting}). "
            "There is no dense graph and pruned graph to compare."
        )
        return Summary(title, setting, None, None, "not compared", [sentence], caveats)
    first = pruned[0]
    speedup = first.speedup
    assert speedup is not None
    verdict = verdict_of(speedup)
    sentences = [_speed_words(dense, runner) for runner in pruned]
    sentences += _accuracy_words(pruned, accuracies, random=result.random_weights)
    headline, _, interval = format_ratio(speedup).partition(" ")
    of = first.name if len(pruned) > 1 else ""
    return Summary(title, setting, headline, interval or None, verdict, sentences, caveats, of)


def verdict_of(speedup: Ratio) -> str:
    """Return what an interval allows to say."""
    if speedup.low is None or speedup.high is None:
        return "no interval"
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "no difference shown"


def _speed_words(dense: RunnerResult, runner: RunnerResult) -> str:
    speedup = runner.speedup
    assert speedup is not None
    rate = runner.name.partition("pruned at ")[2]
    name = f"The pruned graph at keep rate {rate}" if rate else "The pruned graph"
    medians = (
        f"{runner.median_wall_ms:.3f} ms against {dense.median_wall_ms:.3f} ms, medians of {runner.n} samples each"
    )
    ratio = format_ratio(speedup)
    if speedup.low is None:
        return f"{name} runs {ratio} times as fast as the dense graph, {speedup.note} ({medians})."
    bounds = f"95 % CI over {speedup.blocks} paired blocks"
    if verdict_of(speedup) == "no difference shown":
        return f"{name} shows no difference in speed from the dense graph: {ratio} times as fast, {bounds} ({medians})."
    if verdict_of(speedup) == "slower":
        return f"{name} is slower than the dense graph: {ratio} times as fast, {bounds} ({medians})."
    return f"{name} runs {ratio} times as fast as the dense graph, {bounds} ({medians})."


def _accuracy_words(pruned: Sequence[RunnerResult], accuracies: Accuracies | None, *, random: bool) -> Iterator[str]:
    if accuracies is None or random:
        return
    dense = accuracies.of_runner("dense")
    told = [(r, a) for r in pruned if (a := accuracies.of_runner(r.name)) is not None]
    if not told:
        return
    parts = []
    for runner, accuracy in told:
        rate = runner.name.partition("pruned at ")[2]
        parts.append(f"{100 * accuracy.top1:.2f} %" + (f" at {rate}" if rate else ""))
    against = "" if dense is None else f", {100 * dense.top1:.2f} % dense"
    yield f"Top-1 accuracy is {', '.join(parts)}{against} ({told[0][1].images} images of {accuracies.data})."


def caveats_of(result: BenchResult, accuracies: Accuracies | None) -> Iterator[Caveat]:
    """Yield what must be read with the numbers of a result."""
    if result.unstable:
        more = f", and {len(result.unstable) - 1} more reasons below" if len(result.unstable) > 1 else ""
        yield Caveat("unstable", f"{result.unstable[0]}{more}; measure again before these numbers are used")
    if result.random_weights:
        yield Caveat("random weights", "the speed is real; accuracy was not measured, and outputs mean nothing")
    if accuracies is not None and accuracies.emulated is not None:
        yield Caveat("emulated", f"the accuracy was computed on another processor: {accuracies.emulated}")
    if result.quick:
        yield Caveat("quick", "a short run, with fewer samples than a full one")
    if result.telemetry is not None and result.telemetry.throttled:
        yield Caveat("throttled", "; ".join(result.telemetry.throttled))
    if result.speedup is not None and result.speedup.low is None:
        yield Caveat("no interval", result.speedup.note or "too few blocks")
    if result.data == NOISE and result.adaptive is not None:
        yield Caveat("noise", "the images were noise, which keeps other numbers of tokens than photographs")


def accuracy_rows(result: BenchResult, accuracies: Accuracies) -> Rows:
    """Return a row per graph that has an accuracy."""
    rows = []
    names = [r.name for r in result.runners]
    for name in names:
        found = accuracies.of_runner(name)
        if found is None:
            continue
        low, high = wilson(found)
        rows.append(
            {
                "graph": name,
                "top-1 (%) [95 % CI]": f"{100 * found.top1:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
                "top-5 (%)": "n/a" if found.top5 is None else f"{100 * found.top5:.2f}",
                "n (images)": str(found.images),
                "data": accuracies.data,
            }
        )
    return rows


def wilson(accuracy: GraphAccuracy) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval)."""
    n, p = accuracy.images, accuracy.top1
    centre, spread = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def part_rows(result: BenchResult) -> Rows:
    """Return the table of the layers with a row per part of the network and a column per graph."""
    told = layers_table(result.layers)
    cells = {(row["part"], row["graph"]): f"{row['ms']} ({row['share (%)']} %)" for row in told}
    graphs = list(dict.fromkeys(row["graph"] for row in told))
    return [
        {"part": part, **{f"{graph} (ms)": cells.get((part, graph), "-") for graph in graphs}}
        for part in PARTS
        if any((part, graph) in cells for graph in graphs)
    ]


def fingerprint_rows(results: Sequence[BenchResult], names: Sequence[str]) -> list[tuple[str, list[str], bool]]:
    """Return (field, value of each result, whether they differ) of everything the fingerprints and results tell."""
    columns = []
    for result in results:
        fields = {name: value_words(value) for name, value in _flat(result.fingerprint)}
        fields |= {
            "measured": result.created,
            "other cores busy": value_words(result.machine.other_cores),
            "time taken by the host": value_words(result.machine.steal),
            "load before and after": f"{value_words(result.machine.load_1min_before)}, "
            f"{value_words(result.machine.load_1min_after)}",
            "tool version": str(result.bundle.get("tool_version", "unknown")),
        }
        columns.append(fields)
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, "unknown") for column in columns]
        rows.append((FIELDS.get(name, name.replace("_", " ")), values, len(set(values)) > 1))
    return rows


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} " if name != "packages" else "")
        else:
            yield f"{prefix}{name}", value


def value_words(value: Any) -> str:
    """Return a value of a fingerprint for people."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def mixed_machines(results: Sequence[BenchResult]) -> str | None:
    """Return what differs between the machines of the results, None when it is one machine."""
    differing = []
    for name in MACHINE:
        values = {value_words(r.fingerprint.get(name)) for r in results}
        if len(values) > 1:
            differing.append(f"{name.replace('_', ' ')}: {' / '.join(sorted(values))}")
    return "; ".join(differing) or None


def reproduce(result: BenchResult, *, overlays: bool, accuracies: Accuracies | None) -> list[str]:
    """Return the commands that lead to such a result, in their order; long ones go on behind a backslash.

    The bundle's place is not part of a result; it is called `bundle` here.
    """
    method, weights = result.bundle["method"], result.bundle["weights"]
    words = ["edgeprune", "export", "-m", result.bundle["model"], "--method", method["name"]]
    if result.densities:
        words += ["--keep-rate", ",".join(f"{d.keep_rate:g}" for d in result.densities)]
    elif method["name"] not in ("dense", "cropr"):
        words += ["--keep-rate", f"{method['keep_rate']:g}"]
    for key, value in method.get("options", {}).items():
        words += ["--method-option", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    if weights["source"] == "random":
        words += ["--random-weights", "--seed", str(weights.get("seed") or 0)]
    else:
        words += ["--checkpoint", weights.get("file") or "CHECKPOINT", *(["--ema"] if weights.get("ema") else [])]
    words += ["--target", result.bundle["target"], "--batch", str(result.batch)]
    words += ["--token-outputs"] if overlays else []
    bench = ["edgeprune", "bench", "bundle", "--batch", str(result.batch), "--threads", str(result.threads)]
    bench += ["--rounds", str(result.rounds), *(["--quick"] if result.quick else [])]
    baselines = [r.name for r in result.runners if r.name in BASELINES]
    bench += ["--against", ",".join(baselines)] if baselines else []
    bench += ["--data", result.data] if result.data != NOISE else []
    bench += ["--images", str(result.images)] if result.adaptive is not None else []
    bench += ["--layers"] if result.layers else []
    bench += ["--callers", str(result.callers.many.callers)] if result.callers is not None else []
    if result.scenario is not None and result.scenario.kind != "single-stream":
        bench += ["--scenario", result.scenario.text]
    lines = [[*words, "-o", "bundle"], [*bench, "-o", "bench.json"]]
    report = ["edgeprune", "report", "bench.json"]
    if accuracies is not None:
        limit = str(max(accuracy.images for accuracy in accuracies.graphs.values()))
        lines.append(["edgeprune", "evaluate", "bundle", "--data", accuracies.data, "--limit", limit, "--json"])
        report.append("evaluate.json")
    report += ["bundle", "--data", "digits" if accuracies is None else accuracies.data] if overlays else []
    lines.append([*report, "-o", "report.html"])
    return [_broken(line) + (" > evaluate.json" if line[1] == "evaluate" else "") for line in lines]


def _broken(words: Sequence[str]) -> str:
    """Return a command for a shell, continued on the next line in front of an option where it gets long."""
    lines = [""]
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("-") and len(lines[-1]) + len(quoted) > LINE - 16:
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return " \\\n".join(lines)


def stage_words(result: BenchResult) -> str | None:
    """Return which blocks keep how many tokens, for a reader who reproduces a schedule; None without stages."""
    stages = result.bundle["method"].get("stages") or []
    if not stages:
        return None
    most = "up to " if stages[0].get("adaptive") else ""
    return "; ".join(f"block {s['block']}: {most}{s['kept']} of {s['tokens_in']} patch tokens" for s in stages)


def report_caveats(report: ReportInput) -> list[Caveat]:
    """Return what must be said of the report as a whole."""
    found = []
    mixed = mixed_machines(report.results)
    if mixed is not None:
        text = f"times of different machines must not be compared with each other ({mixed})"
        found.append(Caveat("several machines", text))
    for accuracies in report.unmatched():
        text = f"the accuracy of '{accuracies.name}' belongs to none of these results and is left out"
        found.append(Caveat("not matched", text))
    return found
