"""The result of a bench for people: tables as rows of text, and the sentences that belong under them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edgeprune.bench.adaptive import AdaptiveResult, RunGroup
from edgeprune.bench.callers import CallersResult
from edgeprune.bench.images import NOISE
from edgeprune.bench.layers import PARTS, LayersResult
from edgeprune.bench.result import BenchResult, MacsResult, RunnerResult, SweepResult
from edgeprune.bench.scenarios import ScenarioResult
from edgeprune.bench.stats import Percentile, Ratio

MAX_REASONS = 4  # in the notes; the result holds all
BAR = 30  # characters of a bar that is all of a graph's time
_EIGHTHS = " ▏▎▍▌▋▊▉"
Rows = list[dict[str, str]]


def report_tables(result: BenchResult) -> Iterator[tuple[str | None, Rows]]:
    """Yield (title, rows) of all tables, the one of the graphs first; the keys of a row are the headings."""
    yield None, report_table(result)
    if result.scenario is not None and result.scenario.kind == "fixed-fps":
        yield f"frames at {result.scenario.fps:g} per second", frames_table(result.scenario)
    if result.scenario is not None and any(runner.windows for runner in result.scenario.runners):
        yield f"windows of {result.scenario.window_s:.3g} s", windows_table(result.scenario)
    if any(runner.median_gpu_ms is not None for runner in result.runners):
        yield "where a run waits (medians)", device_table(result.runners)
    if any(runner.energy is not None for runner in result.runners):
        yield "energy of an image", energy_table(result.runners)
    if result.layers:
        yield "where the time goes", layers_table(result.layers)
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
                f"median (ms, {_sample(result)})": f"{runner.median_wall_ms:.3f}",
                "p90 (ms)": format_percentile(runner.percentiles["p90"]),
                "p99 (ms)": format_percentile(runner.percentiles["p99"]),
                "n": str(runner.n),
                "MACs ratio (x)": ratio,
                "ideal (x)": ideal,
                "measured (x) [95 % CI]": format_ratio(runner.speedup) if runner.speedup else "1.00",
            }
        )
    return rows


def frames_table(scenario: ScenarioResult) -> Rows:
    """Return a row per graph of the frames that came at a fixed rate; the keys are the headings."""
    return [
        {
            "graph": runner.name,
            "frames due": str(runner.frames.due),
            "missed (%)": _percent(runner.frames.missed),
            "dropped": str(runner.frames.dropped),
            "late": str(runner.frames.late),
            "run alone, median (ms)": f"{runner.frames.run_ms:.3f}",
            "due to start, median (ms)": f"{runner.frames.start_delay_ms:.3f}",
        }
        for runner in scenario.runners
        if runner.frames is not None
    ]


def windows_table(scenario: ScenarioResult) -> Rows:
    """Return a row per window and graph of a sustained bench; the keys are the headings."""
    return [
        {
            "graph": runner.name,
            "from (s)": f"{window.start_s:.1f}",
            "median (ms)": f"{window.median_wall_ms:.3f}",
            "against the first": f"{window.median_wall_ms / runner.windows[0].median_wall_ms:.3f}",
            "n": str(window.n),
            "hottest (°C)": _number(window.temperature_c, 1),
            "slowest clock (MHz)": _number(window.mhz, 0),
            "power (W)": _number(window.watts, 2),
            "throttled": "-" if window.throttled is None else "yes" if window.throttled else "no",
        }
        for runner in scenario.runners
        for window in runner.windows
    ]


def device_table(runners: Iterable[RunnerResult]) -> Rows:
    """Return what the backend tells apart, a row per graph that it tells; the keys are the headings."""
    return [
        {
            "graph": runner.name,
            "wall (ms)": f"{runner.median_wall_ms:.3f}",
            "gpu (ms)": _number(runner.median_gpu_ms, 3),
            "enqueue (ms)": _number(runner.median_enqueue_ms, 3),
        }
        for runner in runners
        if runner.median_gpu_ms is not None
    ]


def energy_table(runners: Iterable[RunnerResult]) -> Rows:
    """Return a row per graph whose energy is known; the keys are the headings."""
    return [
        {
            "graph": runner.name,
            "energy (mJ/image)": f"{1000 * runner.energy.joules_per_image:.2f}",
            "above idle (mJ/image)": _number(_milli(runner.energy.net_joules_per_image), 2),
            "power (W)": f"{runner.energy.mean_w:.2f}",
            "idle (W)": _number(runner.energy.idle_w, 2),
            "images": str(runner.energy.images),
        }
        for runner in runners
        if runner.energy is not None
    ]


def layers_table(layers: Iterable[LayersResult]) -> Rows:
    """Return a row per graph and part of the network, with a bar; the keys are the headings."""
    return [
        {
            "graph": one.runner,
            "part": part.part,
            "ms": _number(part.ms, 3),
            "share (%)": _percent(part.share),
            "nodes": str(part.nodes),
            "": format_bar(part.share or 0.0),
        }
        for one in layers
        for part in sorted(one.parts, key=lambda part: PARTS.index(part.part))
    ]


def format_bar(share: float) -> str:
    """Return a share as a bar of text, `BAR` characters for the whole."""
    eighths = round(min(1.0, max(0.0, share)) * BAR * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(BAR)


def sweep_table(sweep: SweepResult) -> Rows:
    """Return a row per case and graph; the keys are the headings."""
    energy = any(runner.energy is not None for case in sweep.cases for runner in case.result.runners)
    rows = []
    for case in sweep.cases:
        for row, runner in zip(report_table(case.result), case.result.runners, strict=True):
            rows.append(
                {
                    "bundle": case.bundle,
                    "batch": str(case.batch),
                    "graph": _sweep_name(runner.name, case.keep_rates),
                    "MACs ratio (x)": row["MACs ratio (x)"],
                    "median (ms)": f"{runner.median_wall_ms:.3f}",
                    "images/s": f"{runner.images_per_s:.1f}",
                    "p90 (ms)": row["p90 (ms)"],
                    "measured (x) [95 % CI]": row["measured (x) [95 % CI]"],
                    **({"mJ/image": _number(_joules(runner), 2)} if energy else {}),
                    "unstable": str(len(case.result.unstable) or ""),
                }
            )
    return rows


def sweep_notes(sweep: SweepResult) -> list[str]:
    """Return the sentences that belong under the table of a sweep."""
    notes = ["measured: dense time / this graph's time of the same bundle and batch, interleaved; cases one by one"]
    notes += [f"scenario {text}" for text in dict.fromkeys(_scenario_text(c.result) for c in sweep.cases) if text]
    if any(case.result.random_weights for case in sweep.cases):
        notes.append("random weights: the speed is real, accuracy is not measured")
    if any(case.result.quick for case in sweep.cases):
        notes.append("quick run: fewer samples than a full one")
    for case in sweep.cases:
        if case.result.unstable:
            more = len(case.result.unstable) - 1
            tail = f", and {more} more reasons in the JSON result" if more else ""
            notes.append(f"unstable: {case.bundle}, batch {case.batch}: {case.result.unstable[0]}{tail}")
    return notes


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
    notes += _scenario_notes(result)
    notes += _efficiency_notes(result)
    if result.selection_overhead:
        share = format_ratio(result.selection_overhead, percent=True)
        notes.append(f"selection and scoring take {share} of the pruned run{_at(result)}")
    if result.quantization_gain:
        precision, gain = result.bundle["precision"], format_ratio(result.quantization_gain)
        notes.append(f"{precision} against float32 of the same graph{_at(result)}: {gain} times faster")
    if result.naive_over_pruned:
        times = format_ratio(result.naive_over_pruned)
        notes.append(f"pruned{_at(result)} against the naive torch export: {times} times faster")
    if result.adaptive is not None:
        notes += _adaptive_notes(result.adaptive, noise=result.data == NOISE)
    notes += _session_notes(result)
    notes += _sensor_notes(result)
    notes += dict.fromkeys(one.note for one in result.layers if one.note)
    if result.random_weights:
        notes.append("random weights: the speed is real, accuracy is not measured")
    if result.quick:
        notes.append("quick run: fewer samples than a full one")
    shown, more = result.unstable[:MAX_REASONS], len(result.unstable) - MAX_REASONS
    notes += [f"unstable: {reason}" for reason in shown]
    return [*notes, f"unstable: {more} more reasons in the JSON result"] if more > 0 else notes


def _scenario_notes(result: BenchResult) -> Iterator[str]:
    scenario = result.scenario
    if scenario is None:
        return
    heads = [f"{one.name} {format_percentile(one.headline_ms)}" for one in scenario.runners]
    yield f"scenario {scenario.text}, headline {scenario.headline} (ms): {', '.join(heads)}"
    if scenario.kind == "fixed-fps":
        yield "times are from the moment a frame was due; missed: dropped, or done after the next one was due"
    if scenario.kind == "sustained":
        yield "the graphs take turns without a pause, so that all meet the same heat"
        for one in scenario.runners:
            if one.last_over_first is not None:
                width = f"{scenario.window_s:.3g} s"
                yield f"{one.name}: median of the last {width} / of the first {width}: {one.last_over_first:.3f}"
    if result.warmup is not None and result.warmup.stable:
        yield f"warm-up: {result.warmup.rounds} rounds, {result.warmup.elapsed_s:.2f} s, until times stood still"


def _sensor_notes(result: BenchResult) -> Iterator[str]:
    for energy in {one.energy.rail: one.energy for one in result.runners if one.energy is not None}.values():
        yield f"energy: {energy.source}, rail {energy.rail}, by {energy.method}; each graph alone, back to back"
    telemetry = result.telemetry
    if telemetry is None or not telemetry.channels:
        return
    hottest = max((c.high for c in telemetry.of("temperature") if c.high is not None), default=None)
    heat = "" if hottest is None else f", hottest sensor {hottest:.1f} °C"
    yield f"telemetry: {len(telemetry.channels)} channels, {telemetry.hz:.1f} readings per second{heat}"


def _scenario_text(result: BenchResult) -> str:
    return "" if result.scenario is None else result.scenario.text


def _sample(result: BenchResult) -> str:
    """Return what a sample of the table is."""
    scenario = result.scenario
    if scenario is not None and scenario.kind == "multi-stream":
        return f"query of {scenario.samples_per_query}, batch {result.batch}"
    return f"batch {result.batch}"


def _sweep_name(name: str, keep_rates: list[float]) -> str:
    """Return a runner's name with the keep rate of a bundle that holds a single one."""
    return f"pruned at {keep_rates[0]:g}" if name == "pruned" and keep_rates else name


def _milli(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _joules(runner: RunnerResult) -> float | None:
    return None if runner.energy is None else 1000 * runner.energy.joules_per_image


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
