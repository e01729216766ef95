"""The result of a bench for people: tables as rows of text, and the sentences that belong under them."""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.bench.adaptive import AdaptiveResult, RunGroup
from edgeprune.bench.callers import CallersResult
from edgeprune.bench.images import NOISE
from edgeprune.bench.result import BenchResult, MacsResult
from edgeprune.bench.stats import Percentile, Ratio

MAX_REASONS = 4  # in the notes; the result holds all
Rows = list[dict[str, str]]


def report_tables(result: BenchResult) -> Iterator[tuple[str | None, Rows]]:
    """Yield (title, rows) of all tables, the one of the graphs first; the keys of a row are the headings."""
    yield None, report_table(result)
    if result.adaptive is not None and result.adaptive.groups:
        what = "bucket" if result.adaptive.form == "buckets" else "quartile of the tokens kept at the first stage"
        yield f"{result.adaptive.runner}, by {what}", adaptive_table(result.adaptive)
    if result.callers is not None:
        yield "callers of one session at once", callers_table(result.callers, result.batch)


def report_table(result: BenchResult) -> Rows:
    """Return the rows of the table of the graphs, dense first; the keys are the headings."""
    own = {d.runner: d.macs for d in result.densities} or {"pruned": result.macs}
    known = next((macs for macs in own.values() if macs is not None), None)
    rows = []
    for runner in result.runners:
        giga, ratio, ideal = _macs_cells(own.get(runner.name))
        if runner.name == "dense" and known is not None:
            giga, ratio, ideal = f"{known.dense_g:.2f}", "1.00", "1.00"
        rows.append(
            {
                "graph": runner.name,
                "MACs/image (G)": giga,
                f"median (ms, batch {result.batch})": f"{runner.median_wall_ms:.3f}",
                "p90 (ms)": format_percentile(runner.percentiles["p90"]),
                "p99 (ms)": format_percentile(runner.percentiles["p99"]),
                "n": str(runner.n),
                "MACs ratio (x)": ratio,
                "ideal (x)": ideal,
                "measured (x) [95 % CI]": format_ratio(runner.speedup) if runner.speedup else "1.00",
            }
        )
    return rows


def adaptive_table(adaptive: AdaptiveResult) -> Rows:
    """Return a row per bucket or quartile; the keys are the headings."""
    return [_group_cells(group, buckets=adaptive.form == "buckets") for group in adaptive.groups]


def callers_table(callers: CallersResult, batch: int) -> Rows:
    """Return the rows of one and of several callers; the keys are the headings."""
    return [
        {
            "callers": str(result.callers),
            "images/s": f"{result.images_per_s:.1f}",
            f"median (ms, batch {batch})": f"{result.median_ms:.3f}",
            "images/s (x) [95 % CI]": scaling,
        }
        for result, scaling in ((callers.one, "1.00"), (callers.many, format_ratio(callers.scaling)))
    ]


def report_notes(result: BenchResult) -> list[str]:
    """Return the sentences that belong under the tables."""
    clock = "processor time of one thread" if result.clock == "cpu" else "wall time"
    notes = [
        f"measured: dense time / this graph's time, paired over {result.blocks} interleaved blocks, {clock}; "
        f"medians are wall time; {result.threads or 'all'} thread(s)"
    ]
    if result.runs_per_sample > 1:
        notes.append(
            f"a sample is a pass over {result.images} images ({result.data}), divided by its "
            f"{result.runs_per_sample} runs"
        )
    notes += _efficiency_notes(result)
    if result.selection_overhead:
        share = format_ratio(result.selection_overhead, percent=True)
        notes.append(f"selection and scoring take {share} of the pruned run{_at(result)}")
    if result.naive_over_pruned:
        times = format_ratio(result.naive_over_pruned)
        notes.append(f"pruned{_at(result)} against the naive torch export: {times} times faster")
    if result.adaptive is not None:
        notes += _adaptive_notes(result.adaptive, noise=result.data == NOISE)
    notes += _session_notes(result)
    if result.random_weights:
        notes.append("random weights: the speed is real, accuracy is not measured")
    if result.quick:
        notes.append("quick run: fewer samples than a full one")
    shown, more = result.unstable[:MAX_REASONS], len(result.unstable) - MAX_REASONS
    notes += [f"unstable: {reason}" for reason in shown]
    return [*notes, f"unstable: {more} more reasons in the JSON result"] if more > 0 else notes


def _efficiency_notes(result: BenchResult) -> Iterator[str]:
    if result.densities:
        for density in result.densities:
            if density.macs is None:
                yield f"density {density.keep_rate:g} is the dense graph"
            if density.efficiency_nominal:
                nominal, own = density.efficiency_nominal, density.efficiency_own
                executed = f", {format_ratio(own)} against the MACs executed" if own else ""
                yield f"efficiency {density.runner}: {format_ratio(nominal)} against the nominal MACs ratio{executed}"
        return
    if result.efficiency_nominal:
        yield f"efficiency against the nominal MACs ratio: {format_ratio(result.efficiency_nominal)}"
    if result.efficiency_own:
        yield f"efficiency against the MACs the graphs execute: {format_ratio(result.efficiency_own)}"


def _adaptive_notes(adaptive: AdaptiveResult, *, noise: bool) -> Iterator[str]:
    kept = ", ".join(f"{mean:.1f} of {slots}" for mean, slots in zip(adaptive.tokens, adaptive.slots, strict=True))
    yield f"tokens kept on average, per stage: {kept} ({adaptive.runner}, form {adaptive.form})"
    if noise:
        yield "noise keeps other numbers of tokens than photographs: give --data imagefolder:PATH, or digits"
    if adaptive.expected_ms is not None:
        yield f"mean run {adaptive.mean_ms:.3f} ms; {_expected(adaptive)}"
    if adaptive.differs:
        yield f"not compared with the calibration: {'; '.join(adaptive.differs)}"
    if adaptive.router_us is not None and adaptive.router_share is not None:
        yield f"routing takes {adaptive.router_us:.1f} us, {adaptive.router_share:.2%} of a run (medians)"
    if adaptive.ran_again is not None:
        yield f"ran again in a larger bucket: {adaptive.ran_again:.1%} of the images"


def _expected(adaptive: AdaptiveResult) -> str:
    text = f"the calibration expects {adaptive.expected_ms:.3f} ms of its {adaptive.calibrated_on}"
    if adaptive.ratio is None:
        return text
    return f"{text}, and {adaptive.expected_here_ms:.3f} ms of these: measured / expected {adaptive.ratio:.2f}"


def _session_notes(result: BenchResult) -> Iterator[str]:
    if result.switch_us is not None:
        yield f"switching the density takes {result.switch_us:.2f} us (median)"
    opened = [
        f"{m.session} {max(0.0, m.after_mib - m.before_mib):+.1f}"
        for m in result.memory
        if m.before_mib is not None and m.after_mib is not None
    ]
    if opened and (result.adaptive is not None or result.densities):
        yield f"resident memory (Pss, MiB) by opening each session, in this order: {', '.join(opened)}"
    if result.callers is not None:
        cores = result.fingerprint.get("usable_cores")
        if cores is not None and result.callers.many.callers * (result.threads or cores) > cores:
            yield f"callers: their threads are more than the {cores} cores of this process"
        yield (
            f"callers: {result.callers.runs} runs each and turn, in turns; {result.callers.compared} results of "
            f"{result.callers.many.callers} at once are bit-equal to those of a single caller"
        )


def _at(result: BenchResult) -> str:
    """Return which density the whole result's ratios are of, "" when there is a single one."""
    return next((f" at {d.keep_rate:g}" for d in result.densities if d.macs is not None), "")


def _macs_cells(macs: MacsResult | None) -> tuple[str, str, str]:
    if macs is None:
        return "", "", ""
    ideal = "" if macs.ideal_speedup is None else f"{macs.ideal_speedup:.2f}"
    return f"{macs.pruned_g:.2f}", f"{macs.ratio:.2f}", ideal


def _group_cells(group: RunGroup, *, buckets: bool) -> dict[str, str]:
    cells = {"bucket" if buckets else "quartile": group.name}
    if buckets:
        cells["slots"] = " ".join(map(str, group.capacities or ()))
    cells["tokens kept"] = "-" if group.tokens is None else "-".join(map(str, sorted(set(group.tokens))))
    cells["images (%)"] = _percent(group.share)
    if buckets:
        cells["calibration (%)"] = _percent(group.calibration_share)
    cells |= {
        "runs": str(group.runs),
        "median (ms)": _number(group.median_ms, 3),
        "p90 (ms)": format_percentile(group.p90_ms) if group.runs else "-",
        "max (ms)": _number(group.max_ms, 3),
    }
    if buckets:
        cells |= {"expected (ms)": _number(group.expected_ms, 3), "measured / expected": _number(group.ratio, 2)}
    return cells


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def format_ratio(ratio: Ratio, *, percent: bool = False) -> str:
    """Return "1.58 [1.56, 1.60]", or the bare estimate when there is no interval."""
    text = (lambda x: f"{x * 100:.2f} %") if percent else (lambda x: f"{x:.3f}")
    if ratio.low is None or ratio.high is None:
        return text(ratio.estimate)
    return f"{text(ratio.estimate)} [{text(ratio.low)}, {text(ratio.high)}]"


def format_percentile(value: Percentile) -> str:
    """Return milliseconds, or why there is no value."""
    return value.reason or "" if value.value is None else f"{value.value:.3f}"
