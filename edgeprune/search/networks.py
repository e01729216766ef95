"""Networks on the target: schedules written as graphs of one set of weights, opened and timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.bench import stats
from edgeprune.bench.bench import ratio_clock
from edgeprune.bench.measure import Measurement, MeasurePlan, Runner, measure
from edgeprune.bench.runners import open_session, pass_runner
from edgeprune.export.api import count_macs, preprocessing, stage_infos
from edgeprune.export.graphs import form_options, make_plan
from edgeprune.export.plan import Plan
from edgeprune.export.request import Resolved
from edgeprune.pruning.base import Stage
from edgeprune.pruning.counts import StageCounts
from edgeprune.quantization.scheme import portable
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Manifest, StageInfo
from edgeprune.version import __version__

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

Stages = tuple[Stage, ...]
Report = Callable[[str, float], None]
DENSE = "dense"
OPEN_BYTES = 2 << 30  # of weights of sessions that are open at once; each holds a copy of its own


def plan_of(resolved: Resolved, stages: Stages, counts: Sequence[int] | None = None) -> Plan:
    """Return the plan of a schedule as it is exported; with `counts` of what one image keeps of its slots."""
    if counts is None:
        return make_plan(resolved, stages, **(form_options(resolved) if stages else {}))
    own, tokens = [], resolved.config.num_patches
    for stage, count in zip(stages, counts, strict=True):
        kept = min(int(count), stage.counts.kept, tokens)
        own.append(replace(stage, counts=StageCounts(tokens, kept)))
        tokens = kept
    return make_plan(resolved, tuple(own), **form_options(resolved))


@contextmanager
def networks(resolved: Resolved, model: PrunedViT, schedules: Mapping[str, Stages]) -> Iterator[Bundle]:
    """Yield a bundle that is not to be kept, with a graph for every schedule and a dense one."""
    from edgeprune.export.emit.weights import weight_arrays
    from edgeprune.export.graphs import GraphWriter
    from edgeprune.export.writer import WeightStore

    with tempfile.TemporaryDirectory(prefix="edgeprune-search-") as folder:
        path = Path(folder)
        with WeightStore(path / "model.onnx.data") as store:
            writer = GraphWriter(resolved, weight_arrays(model), store, path)
            if resolved.target.quantizes:  # which ranges and which layers makes next to no difference to the time
                writer.pruned = writer.dense = portable(resolved.config)
            for name, stages in {DENSE: (), **schedules}.items():
                writer.write([name], plan_of(resolved, stages))
        fields: dict[str, Any] = {
            "tool_version": __version__,
            "created": "",
            "files": {},
            "model": {"name": resolved.config.name, "parameters": sum(p.numel() for p in model.parameters())},
            "weights": {"source": "random"},
            "method": {"name": resolved.method.name, "keep_rate": 1.0},
            "target": resolved.target.name,
            "precision": resolved.target.precision,
            "opset": resolved.opset,
            "batch": resolved.request.batch,
            "lowering": "emitted",
            "selection": resolved.selection,
            "dead_rows": resolved.request.dead_rows,
            "macs": count_macs(resolved, ()),
            "graphs": writer.infos,
            "adaptive": None if resolved.form is None else {"form": resolved.form},
            "preprocessing": preprocessing(resolved.config),
        }
        yield Bundle(path, Manifest.model_validate(fields))


def time_networks(
    bundle: Bundle,
    schedules: Mapping[str, Stages],
    images: Mapping[str, Sequence[np.ndarray]],
    plan: MeasurePlan,
    *,
    threads: int,
    report: Report,
) -> dict[str, float]:
    """Return the milliseconds of graphs of a bundle by name, on the clock for so many threads.

    As many take turns as fit into memory; those that do not are measured after them, and the dense graph, which is
    part of every group, says how much faster or slower the machine was then.

    Args:
        bundle: holds the graphs.
        schedules: stages of all but the dense one.
        images: what each graph runs on, one after the other, each [B, C, H, W].
        plan: of every group.
        threads: of every session.
        report: called with (step, share done).
    """
    size = bundle.graph_path(DENSE).with_name("model.onnx.data").stat().st_size
    room = max(4, OPEN_BYTES // max(size, 1))
    names = [name for name in images if name != DENSE]
    groups = [names[i : i + room] for i in range(0, len(names), room)] or [[]]
    found: dict[str, float] = {}
    first = 0.0
    for number, group in enumerate(groups):
        runners: dict[str, Runner] = {}
        for name in (DENSE, *group):
            session = open_session(*_alone(bundle, name, schedules.get(name, ())), threads=threads)
            runners[name] = pass_runner(session, images[name])
        measured = measure(runners, plan, progress=_share(report, number, len(groups)))
        times = {name: ms / len(images[name]) for name, ms in steady_ms(measured, threads).items()}
        first = first or times[DENSE]
        found |= {name: ms * first / times[DENSE] for name, ms in times.items()}
    return found


def steady_ms(measured: Measurement, threads: int) -> dict[str, float]:
    """Return every runner's milliseconds of one call, on the clock for so many threads: the median over blocks.

    Runners that take turns meet the same machine, so what slows all of a block down, by the median over them, is taken
    out of it first.
    """
    cpu = ratio_clock(threads) == "cpu"
    blocks = np.array(
        [
            stats.block_values(samples.cpu_ms if cpu else samples.wall_ms, measured.calls_per_visit)
            for samples in measured.samples.values()
        ]
    )
    pace = np.median(blocks / np.median(blocks, axis=1, keepdims=True), axis=0)
    return dict(zip(measured.samples, np.median(blocks / pace, axis=1).tolist(), strict=True))


def _alone(bundle: Bundle, name: str, stages: Stages) -> tuple[Bundle, str]:
    """Return a bundle and its graph to open: where shapes follow the image the model, which is run image by image."""
    manifest = bundle.manifest
    if manifest.adaptive is None or not stages:
        return bundle, name
    method = manifest.method.model_copy(update={"stages": [StageInfo(**info) for info in stage_infos(stages)]})
    fields = {"graphs": {"model": manifest.graphs[name]}, "method": method}
    return Bundle(bundle.path, manifest.model_copy(update=fields)), "model"


def _share(report: Report, number: int, groups: int) -> Report:
    return lambda phase, share: report(f"measuring the latency table, {phase}", (number + share) / groups)
