"""Which graphs a bundle gets, and writing them: one for all, one for several keep rates, or a stem and its rests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeprune.export.buckets import Bucket, given_buckets, parse_buckets
from edgeprune.export.calibrate import Rests, calibrate
from edgeprune.export.lint.tensorrt import merge_why_not, why_not
from edgeprune.export.pipeline import lower, run_plan_passes
from edgeprune.export.plan import Counts, Plan, build_plan
from edgeprune.export.request import Resolved
from edgeprune.export.targets.registry import get_target
from edgeprune.export.writer import WeightStore, graph_info
from edgeprune.pruning.adaptive import with_capacities
from edgeprune.pruning.base import Constant, Reducer, Stage, TopK
from edgeprune.pruning.random import NoScorer, constant_selector
from edgeprune.quantization.scheme import Quantization
from edgeprune.runtime.manifest import AdaptiveInfo, BucketInfo, CalibrationInfo, PreprocessInfo
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.router import IMAGES, SLOTS

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

THREADS = 1  # of the runs that measure a curve
PLUGIN = "_plugin"  # ends the name of a variant with plugin nodes
Report = Callable[[str, float], None]


def make_plan(resolved: Resolved, stages: tuple[Stage, ...], **fields: Any) -> Plan:
    """Return the plan for some stages, with the plan passes the request asks for; `fields` go to `build_plan`."""
    request = resolved.request
    fields = {"batch": request.batch, "token_outputs": False, **fields}
    plan = build_plan(resolved.config, stages, **fields)
    return run_plan_passes(plan) if request.dead_rows else plan


def random_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return stages at the same places with the same counts that keep constant positions: the cost without choosing.

    A fused token is replaced by one more kept token. Positions that are constant already stay.
    """
    made = []
    for seed, stage in enumerate(stages):
        if isinstance(stage.selector, Constant):
            made.append(stage)
            continue
        counts = replace(stage.counts, kept=stage.counts.tokens_out, fused=0)
        selector = constant_selector(counts, seed)
        reducer = Reducer.STASH if stage.reducer is Reducer.STASH else Reducer.DROP
        made.append(replace(stage, scorer=NoScorer(), selector=selector, reducer=reducer, counts=counts))
    return tuple(made)


def whole_plans(resolved: Resolved) -> tuple[dict[str, Plan], dict[float, str]]:
    """Return the plans of all graphs but stem and rests by name, and the graph of every density."""
    stages, of_density = resolved.stages, dict[float, str]()
    if not stages:
        return {"model": make_plan(resolved, ())}, dict.fromkeys(resolved.densities, "model")
    options = form_options(resolved)
    plans: dict[str, Plan] = {}
    for rates in group_densities(resolved):
        own, told = resolved.densities[max(rates)], {"counts": Counts.GIVEN} if len(rates) > 1 else {}
        first = stages in [resolved.densities[rate] for rate in rates]
        name = "dense" if not own else "model" if first else f"model_{rates[0]}"
        of_density |= dict.fromkeys(rates, name)
        if own:
            plans[name] = make_plan(resolved, own, **options, **told)
    if not resolved.densities and resolved.form != "buckets":
        plans["model"] = make_plan(resolved, stages, **options)
    plans["dense"] = make_plan(resolved, ())
    if resolved.form in (None, "slots"):
        plans["random"] = make_plan(resolved, random_stages(stages))
    return plans, of_density


def form_options(resolved: Resolved) -> dict[str, Any]:
    """Return what the form asks of a plan."""
    options: dict[str, Any] = {"token_outputs": resolved.request.token_outputs}
    if resolved.form in ("computed", "ragged"):
        options |= {"counts": Counts.COMPUTED, "batch": (1, 1)}
    if resolved.form == "ragged":
        options["packed"] = resolved.request.batch[0]
    return options


def group_densities(resolved: Resolved) -> list[list[float]]:
    """Return the densities in groups of one graph each.

    Those that differ in nothing but their counts share a graph that is told them, where the target has such; so do all
    that keep every token.
    """
    low, high = resolved.request.batch
    groups: dict[Any, list[float]] = {}
    for rate, stages in resolved.densities.items():
        ranked = all(isinstance(stage.selector, TopK) for stage in stages)
        tellable = resolved.target.takes_slots and low == high and ranked
        shape = tuple((stage.index, stage.counts.fused) for stage in stages)
        groups.setdefault(shape if tellable or not stages else rate, []).append(rate)
    return list(groups.values())


def bucket_graphs(resolved: Resolved) -> list[str]:
    """Return the names of stem and rests, as far as they are known before any image was seen."""
    if resolved.form != "buckets":
        return []
    asked = parse_buckets(resolved.request.buckets or "")
    if resolved.target.takes_slots:
        return ["stem", "rest"]
    rests = [f"rest_{size}" for size in asked.sizes] or ["rest_<tokens>"]
    return ["stem", *rests, *(["rest"] if resolved.target.told else [])]


@dataclass
class GraphWriter:
    """Writes the graphs of one bundle.

    Attributes:
        arrays: weights by name.
        store: their file, in `folder`.
        infos: the manifest's `graphs` so far.
        pruned, dense: how graphs with and without stages are quantized, for a target that does.
        refusals: for each graph and version of TensorRT why it is not taken, where the target is TensorRT.
    """

    resolved: Resolved
    arrays: Mapping[str, np.ndarray]
    store: WeightStore
    folder: Path
    pruned: Quantization | None = None
    dense: Quantization | None = None
    infos: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: list[dict[str, list[str]]] = field(default_factory=list)

    @property
    def tensorrt(self) -> dict[str, list[str]] | None:
        """The manifest's `tensorrt`."""
        return merge_why_not(self.refusals) if self.resolved.target.device == "tensorrt" else None

    def write(self, names: Sequence[str | None], plan: Plan) -> None:
        """Write the graph of a plan, or stem and rest of a split one; what is named None is left out."""
        selection = self.resolved.selection
        self._write(names, plan, "native" if selection == "auto" else selection)
        if selection == "auto" and plan.counts is Counts.SLOTS:
            self._write([None if name is None else f"{name}{PLUGIN}" for name in names], plan, "plugin")

    def _write(self, names: Sequence[str | None], plan: Plan, selection: str) -> None:
        """Write graphs in one form of the selection; a plugin variant without plugin nodes is none."""
        paths = [None if name is None else self.folder / f"{name}.onnx" for name in names]
        quantization = self.pruned if plan.stages else self.dense
        options: dict[str, Any] = {
            "opset": self.resolved.opset, "selection": selection, "quantization": quantization
        }  # fmt: skip
        written = lower(plan, self.arrays, self.resolved.target, paths, self.store, **options)
        self.store.flush()
        for path, proto in written.items():
            info = graph_info(proto, path.name)
            if path.stem.endswith(PLUGIN):
                if not info["plugin"]:
                    path.unlink()
                    continue
                info["variant_of"] = path.stem.removesuffix(PLUGIN)
            self.infos[path.stem] = info
            if self.resolved.target.device == "tensorrt":
                self.refusals.append(why_not(proto, plan))

    def write_buckets(self, model: PrunedViT, preprocessing: PreprocessInfo, report: Report) -> AdaptiveInfo:
        """Write stem and rests, for the buckets asked for or those that suit real images best."""
        resolved, request = self.resolved, self.resolved.request
        asked, slots = parse_buckets(request.buckets or ""), tuple(s.counts.kept for s in resolved.stages)
        calibration: CalibrationInfo | None = None
        if resolved.target.takes_slots:  # for one image at a time: its shapes may be anything
            self.write(["stem", "rest"], self.split_plan(slots, counts=Counts.GIVEN, batch=(1, 1)))
        if request.calibration is not None:
            images = np.zeros((self._batch(), resolved.config.in_chans, *resolved.config.image_size), np.float32)
            with self._measurable() as writer, closing(MeasuredRests(writer, slots, images)) as rests:
                infos, calibration = calibrate(
                    model, asked, request.calibration, rests.calls(), preprocessing,
                    fill=request.fill == "next-best", images=request.calibration_images,
                    multiple=resolved.target.bucket_multiple, batch=len(images), threads=THREADS, report=report,
                )  # fmt: skip
        else:
            infos = [BucketInfo(capacities=list(b), graph="rest") for b in given_buckets(asked.sizes, slots)]
        told: str | None = None
        if not resolved.target.takes_slots:
            infos = self._write_rests(infos)
        if resolved.target.told and len(infos) > 1:
            told = "rest"
            self.write([None, told], self.split_plan(slots, counts=Counts.GIVEN))
        fill: Literal["mask", "next-best"] = "next-best" if request.fill == "next-best" else "mask"
        return AdaptiveInfo(form="buckets", fill=fill, buckets=infos, told=told, calibration=calibration)

    @contextmanager
    def _measurable(self) -> Iterator[GraphWriter]:
        """Yield the writer of graphs to measure here; where the target is another device, float32 ones stand in."""
        if self.resolved.target.device is None:
            yield self
            return
        request = replace(self.resolved.request, selection=None)
        resolved = replace(self.resolved, request=request, target=get_target("onnx"))
        with TemporaryDirectory() as folder, WeightStore(Path(folder) / self.store.path.name) as store:
            writer = GraphWriter(resolved, self.arrays, store, Path(folder))
            writer.write(["dense"], make_plan(resolved, ()))
            yield writer

    def _write_rests(self, buckets: Sequence[BucketInfo]) -> list[BucketInfo]:
        """Write a rest for each bucket, the stem with the first, and return the buckets with their graphs."""
        made: list[BucketInfo] = []
        for bucket in buckets:
            name = rest_name(bucket, buckets)
            self.write(["stem" if not made else None, name], self.split_plan(tuple(bucket.capacities)))
            made.append(bucket.model_copy(update={"graph": name}))
        return made

    def split_plan(self, capacities: Bucket, **fields: Any) -> Plan:
        """Return the plan of stem and rest for some slots; `fields` go to `build_plan`."""
        request = self.resolved.request
        stages = with_capacities(self.resolved.stages, capacities, fill=request.fill == "next-best")
        fields = {"batch": (1, request.batch[1]), "token_outputs": request.token_outputs, **fields}
        return make_plan(self.resolved, stages, split=True, **fields)

    def _batch(self) -> int:
        return 1 if self.resolved.target.takes_slots else self.resolved.request.batch[0]


def rest_name(bucket: BucketInfo, buckets: Sequence[BucketInfo]) -> str:
    """Return the name of a bucket's graph: its first capacity, or all where another bucket starts with the same."""
    first = bucket.capacities[0]
    alone = sum(other.capacities[0] == first for other in buckets) == 1
    return f"rest_{first}" if alone else "rest_" + "_".join(map(str, bucket.capacities))


class MeasuredRests:
    """Runs a bundle's stem, and its rest at any size: the one graph there is, or one written to try a size.

    Args:
        writer: of the bundle.
        slots: all a method may need.
        images: what the stem is run on.
    """

    def __init__(self, writer: GraphWriter, slots: Bucket, images: np.ndarray) -> None:
        self.writer, self.images = writer, images
        self._backends: dict[str, OrtBackend] = {}
        self._told = writer.resolved.target.takes_slots
        if not self._told:
            self._write_trial(slots, with_stem=True)
        self._handed: dict[str, np.ndarray] = self._run_stem()

    def calls(self) -> Rests:
        """Return them as `calibrate` takes them."""
        dense = self._open("dense")
        fixed = dense.inputs[0].shape[0]
        images = self.images if fixed == -1 else np.repeat(self.images[:1], fixed, 0)
        return Rests(self._run_stem, self._rest, partial(dense.run, {IMAGES: images}), len(images))

    def close(self) -> None:
        """Delete what was written to try."""
        self._backends.clear()
        for path in self.writer.folder.glob("trial*.onnx"):
            path.unlink()
            self.writer.infos.pop(path.stem)

    def _run_stem(self) -> dict[str, np.ndarray]:
        return self._open("stem" if self._told else "trial").run({IMAGES: self.images})

    def _rest(self, capacities: Bucket) -> Callable[[], object]:
        name = "rest" if self._told else self._write_trial(capacities)
        backend = self._open(name)
        feeds = {info.name: self._handed[info.name] for info in backend.inputs if info.name != SLOTS}
        if self._told:
            feeds[SLOTS] = np.array(capacities, np.int64)
        return partial(backend.run, feeds)

    def _write_trial(self, capacities: Bucket, *, with_stem: bool = False) -> str:
        name = "trial_" + "_".join(map(str, capacities))
        if name not in self.writer.infos:
            self.writer.write(["trial" if with_stem else None, name], self.writer.split_plan(capacities))
        return name

    def _open(self, name: str) -> OrtBackend:
        if name not in self._backends:
            path = self.writer.folder / f"{name}.onnx"
            # many trials are open at once, so they share their weights, as a session of several rests does
            prepack = self._told or name == "dense"
            self._backends[name] = OrtBackend(path, threads=THREADS, spinning=False, prepack=prepack)
        return self._backends[name]
