"""Where the time of a graph went, by part of the network, told apart by the names of nodes.

ONNX Runtime's profiler times its nodes, TensorRT's the layers of engines; see `engine_layers` for those.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bench import stats
from edgeprune.bench.measure import SystemClock
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.kernels import node_runs
from edgeprune.runtime.ort import OrtBackend

if TYPE_CHECKING:
    from edgeprune.bench.runners import Batches, Contest
    from edgeprune.runtime.session import Session

PARTS = ("embed", "attention", "mlp", "norm", "selection", "head", "reformat", "fused", "other")
RUNS, QUICK_RUNS, WARMUP_RUNS = 20, 5, 2
SLOWEST = 12
SOURCE = "onnxruntime profiler"
NOTE = "the profiler itself adds to every node, most to short ones: shares are worth more than milliseconds"
# first that matches a node's name, as the exporter writes them, or torch's own exporter for the naive graph
_RULES = (
    (
        "selection",
        r"(^|[./_])(select|selection|topk|top_k|kept_|count(_\d+)?$|counts$|over(_|$|flow)|valid|slots|token_|rank|predictor|merge_tokens|restore|score)|stash",
    ),
    ("head", r"^/?(head|fc_norm|logits|norm[./]head|pre_logits)"),
    ("embed", r"^/?(patch_embed|pos_embed|cls_token|prefix|conv_stem|norm_pre)"),
    ("mlp", r"(^|[./])(mlp|ffn)([./]|$)"),
    ("attention", r"(^|[./])(attn|attention)([./]|$)"),
    ("attention", r"^blocks\.\d+\.(tokens|rows|first_rows|k_heads)"),  # the rows it takes, its keys
    ("embed", r"^(rows$|images\.)"),
    ("norm", r"(^|[./])(norm\w*|layer_?norm\w*)([./]|$)"),
    ("norm", r"LayerNormalization"),
)
_KNOWN = [(part, re.compile(pattern)) for part, pattern in _RULES]


@dataclass(frozen=True)
class PartTime:
    """One part of the network.

    Attributes:
        part: of `PARTS`; "selection" is choosing tokens, scoring and gathering them included, "reformat" and "fused"
            are of engines (see `part_of_layer`), and "other" is what belongs to none.
        ms: of one run.
        share: of all parts; None where none took any time.
        nodes: that belong to it.
    """

    part: str
    ms: float
    share: float | None
    nodes: int


@dataclass(frozen=True)
class NodeTime:
    """One node, or one layer of an engine that several nodes were fused to."""

    name: str
    op: str
    part: str
    ms: float


@dataclass(frozen=True)
class LayersResult:
    """Where the time of one graph went.

    Attributes:
        runner: whose.
        graphs: of the bundle that it ran.
        source: "onnxruntime profiler" or "tensorrt profiler".
        runs: profiled; the times are medians over them.
        wall_ms: median of a run while it was profiled.
        parts: in the order of `PARTS`, those that have a node.
        nodes: the slowest ones, slowest first.
        note: what to know about the times.
    """

    runner: str
    graphs: list[str]
    source: str
    runs: int
    wall_ms: float
    parts: list[PartTime]
    nodes: list[NodeTime] = field(default_factory=list)
    note: str | None = None


def part_of(name: str) -> str:
    """Return the part of the network that a node belongs to, by its name."""
    return locate(name)[0]


def locate(name: str) -> tuple[str, str]:
    """Return the part of the network that a node belongs to, and the module of that part: ("mlp", "blocks.0.mlp")."""
    for part, pattern in _KNOWN:
        if match := pattern.search(name.strip()):
            return part, name.strip()[: match.end()].rstrip("./")
    return "other", ""


def profile_layers(bundle: Bundle, contest: Contest, *, quick: bool) -> list[LayersResult]:
    """Return where the time of each runner of a bundle goes; sessions of their own are profiled, one at a time.

    Args:
        bundle: for a target of ONNX Runtime on the processor, or of TensorRT.
        contest: its runners, images and threads.
        quick: fewer runs.

    Raises:
        InputError: `bench-layers` for another target.
    """
    from edgeprune.bench.summary import pruned_runners

    manifest = bundle.manifest
    check_profiled(manifest.target)
    profile = _profile_engines if manifest.target.startswith("trt-") else _profile_nodes
    rates = pruned_runners(manifest)
    results = []
    for runner in contest.runners:
        if runner in ("naive", "float"):  # not of the bundle
            continue
        graph = "model" if runner in rates or not manifest.method.stages else runner
        options = {"graph": graph, "threads": contest.threads, "density": rates.get(runner)}
        results.append(profile(bundle, runner, options, contest.images.batches, QUICK_RUNS if quick else RUNS))
    return results


def _profile_nodes(
    bundle: Bundle, runner: str, options: Mapping[str, Any], batches: Batches, runs: int
) -> LayersResult:
    """Return where the time of a runner goes, as ONNX Runtime's profiler tells."""
    from edgeprune.runtime.session import Session

    with tempfile.TemporaryDirectory(prefix="edgeprune-layers-") as folder:
        opened = partial(OrtBackend, profile=Path(folder) / "profile")
        session = Session(bundle, spinning=False, check_hashes=False, open_graph=opened, **options)
        times = _run_passes(session, batches, WARMUP_RUNS + runs)[WARMUP_RUNS:]
        files = session.end_profiling()
        events = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    per_run = len(batches)
    nodes = [node for document in events.values() for node in node_times(document, WARMUP_RUNS, runs, per_run)]
    graphs = [name for name, document in events.items() if any(node_runs(document))]
    return summarise_layers(runner, graphs, nodes, runs=runs, wall_ms=stats.median(times) / per_run)


def _profile_engines(
    bundle: Bundle, runner: str, options: Mapping[str, Any], batches: Batches, runs: int
) -> LayersResult:
    """Return where the time of a runner goes, as TensorRT's profiler tells."""
    from edgeprune.bench.engine_layers import NOTE as ENGINE_NOTE
    from edgeprune.bench.engine_layers import SOURCE as ENGINE_SOURCE
    from edgeprune.bench.engine_layers import engine_nodes
    from edgeprune.runtime.session import Session

    session = Session(bundle, spinning=False, check_hashes=False, **options)
    logs = session.time_layers()
    _run_passes(session, batches, WARMUP_RUNS)
    for log in (log for own in logs.values() for log in own):
        log.times.clear()
    times = _run_passes(session, batches, runs)
    per_run = len(batches)
    nodes = [node for own in logs.values() for node in engine_nodes(own, runs, per_run)]
    graphs = [name for name, own in logs.items() if any(log.times for log in own)]
    return summarise_layers(
        runner,
        graphs,
        nodes,
        runs=runs,
        wall_ms=stats.median(times) / per_run,
        source=ENGINE_SOURCE,
        note=ENGINE_NOTE,
    )


def _run_passes(session: Session, batches: Batches, count: int) -> list[float]:
    """Run some passes over the batches and return the milliseconds of each."""
    from edgeprune.bench.runners import pass_runner

    run, clock, times = pass_runner(session, batches), SystemClock(), list[float]()
    for _ in range(count):
        start = clock.wall()
        run()
        times.append((clock.wall() - start) * 1000)
    return times


def check_profiled(target: str) -> None:
    """Refuse a target whose layers are not timed.

    Raises:
        InputError: `bench-layers`.
    """
    if target.startswith("ort-cuda"):
        raise InputError(
            f"the layers of a bundle for {target} are not timed: ONNX Runtime's profiler tells how long the host took "
            "to start each of its kernels, not how long the device ran them",
            code="bench-layers",
            expected="a bundle for onnx, ort-cpu or TensorRT",
            hint="bench without --layers, or export for trt-fp16 to see where the time goes on the device",
        )


def node_times(events: Iterable[Mapping[str, Any]], warmup: int, runs: int, per_run: int = 1) -> list[NodeTime]:
    """Return what each node of a graph takes in a run, from the events of ONNX Runtime's profiler.

    Args:
        events: of warm-up and profiled calls, in the order of time.
        warmup: calls that do not count.
        runs: profiled calls.
        per_run: runs of a call, over which the time is spread.
    """
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in node_runs(events):
        took[node.name, node.op].append(node.ms)
    nodes = []
    for (name, op), times in took.items():
        measured = times[len(times) * warmup // (warmup + runs) :]
        calls = len(measured) / runs / per_run  # of one run; several where images run one by one or routed
        nodes.append(NodeTime(name, op, part_of(name), stats.median(measured) * calls))
    return nodes


def summarise_layers(
    runner: str,
    graphs: Sequence[str],
    nodes: Sequence[NodeTime],
    *,
    runs: int,
    wall_ms: float,
    source: str = SOURCE,
    note: str = NOTE,
) -> LayersResult:
    """Return the parts of a runner's nodes."""
    total = sum(node.ms for node in nodes)
    parts = []
    for part in PARTS:
        own = [node.ms for node in nodes if node.part == part]
        if own:
            parts.append(PartTime(part, sum(own), sum(own) / total if total > 0 else None, len(own)))
    slowest = sorted(nodes, key=lambda node: -node.ms)[:SLOWEST]
    return LayersResult(runner, list(graphs), source, runs, wall_ms, parts, slowest, note)
