"""Which engines a bundle needs: a list of roles, each with its candidates. Pure; no device is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.errors import InputError
from edgeprune.export.trt.options import BuildOptions
from edgeprune.runtime.manifest import AdaptiveInfo, BucketInfo, GraphInfo, Manifest, TensorInfo
from edgeprune.runtime.router import SLOTS

BASELINES = ("dense", "random")
WHOLE, PROFILES, PER_BUCKET = "whole", "profiles", "per-bucket"
NATIVE, PLUGIN = "native", "plugin"
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # engines are named after their graphs


@dataclass(frozen=True)
class Profile:
    """One shape of an engine: min = opt = max.

    Attributes:
        graph: the manifest's graph that runs with it.
        batch: images.
        slots: value of the input `slots`, None where there is none.
        shapes: of the inputs whose batch is open, by name.
    """

    graph: str
    batch: int
    slots: tuple[int, ...] | None
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class EnginePlan:
    """One engine: the graph it is built of, and what it can run."""

    source: str
    plugin: bool
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class Unit:
    """A graph, or the graph that is told, in each form of its selection.

    Attributes:
        graph: the manifest's.
        forms: "native" and "plugin", or one of them.
    """

    graph: str
    forms: Mapping[str, EnginePlan]


@dataclass(frozen=True)
class Role:
    """What the bundle runs as one thing.

    Attributes:
        name: "model", "dense", "stem"; "rest" for all buckets together.
        ways: "whole", or "profiles" and "per-bucket" for the buckets: each a list of units.
        needs: the role that makes its inputs.
    """

    name: str
    ways: Mapping[str, tuple[Unit, ...]]
    needs: str | None = None

    def plans(self) -> Iterator[EnginePlan]:
        """Yield every candidate."""
        for units in self.ways.values():
            for unit in units:
                yield from unit.forms.values()

    def without(self, unfit: Callable[[EnginePlan], bool]) -> Role:
        """Return the role with fewer candidates, and without the ways that are incomplete then; none may be left."""
        ways: dict[str, tuple[Unit, ...]] = {}
        for way, units in self.ways.items():
            fit = [{form: plan for form, plan in unit.forms.items() if not unfit(plan)} for unit in units]
            if all(fit):
                ways[way] = tuple(replace(unit, forms=forms) for unit, forms in zip(units, fit, strict=True))
        return replace(self, ways=ways)


def plan_roles(manifest: Manifest, options: BuildOptions) -> tuple[Role, ...]:
    """Return what is to be built, the stem before its rests.

    Raises:
        InputError: `batches`, `selection`, `engines`, `graph-missing` when the bundle does not have what was asked for,
            `graph-dynamic` for a graph of which more than the batch is open.
    """
    planner = _Planner(manifest, options)
    buckets = _buckets(manifest.adaptive)
    rests = list(dict.fromkeys(bucket.graph for bucket in buckets))
    told = manifest.adaptive.told if manifest.adaptive is not None else None
    roots = [name for name, info in manifest.graphs.items() if info.variant_of is None]
    roles = [Role(name, {WHOLE: (planner.unit(name),)}) for name in roots if name not in (*rests, told)]
    if buckets:
        roles.append(Role("rest", planner.rest_ways(rests, told), needs="stem"))
    elif options.engines != "auto":
        raise InputError(
            f"--engines {options.engines}: this bundle has no buckets",
            code="engines",
            expected="a bundle exported with --buckets",
            hint="leave --engines out",
        )
    wanted = _wanted_roles(manifest, options.graphs, [role.name for role in roles])
    return tuple(role for role in roles if role.name in wanted)


def batches_of(batch: tuple[int, int]) -> tuple[int, ...]:
    """Return the batches of profiles for a range: both ends and the powers of two between."""
    low, high = batch
    powers = [1 << n for n in range(high.bit_length()) if low < 1 << n < high]
    return tuple(dict.fromkeys((low, *powers, high)))


def bucket_shares(manifest: Manifest) -> dict[tuple[str, tuple[int, ...] | None], float]:
    """Return the share of images in each bucket by (graph, slots), equal ones where the manifest does not know."""
    buckets = _buckets(manifest.adaptive)
    known = all(bucket.share is not None for bucket in buckets) and sum(bucket.share or 0 for bucket in buckets) > 0
    found: dict[tuple[str, tuple[int, ...] | None], float] = {}
    for bucket in buckets:
        share = (bucket.share or 0.0) if known else 1 / len(buckets)
        for key in ((bucket.graph, None), (bucket.graph, tuple(bucket.capacities))):
            found[key] = found.get(key, 0.0) + share
    return found


def _buckets(adaptive: AdaptiveInfo | None) -> Sequence[BucketInfo]:
    return adaptive.buckets if adaptive is not None and adaptive.form == "buckets" else []


def _wanted_roles(manifest: Manifest, graphs: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the roles that --graphs names; "model" is all that running the bundle takes."""
    if not graphs:
        return set(names)
    split = {"stem", "rest"} if _buckets(manifest.adaptive) else set()  # neither is of use alone
    model = split or {d.graph for d in manifest.densities} or {"model"}
    wanted: set[str] = set()
    for graph in graphs:
        if graph != "model" and graph not in names:
            known = ["model", *(name for name in names if name != "model")]
            raise InputError(
                f"--graphs {graph}: this bundle has no such graph",
                code="graph-missing",
                expected=f"some of {', '.join(known)}",
                details={"graph": graph, "graphs": known},
            )
        wanted |= model if graph in {"model", *split} else {graph}
    return wanted


class _Planner:
    def __init__(self, manifest: Manifest, options: BuildOptions) -> None:
        self.manifest, self.options = manifest, options
        self.variants: dict[str, dict[str, str]] = {}
        for name, info in manifest.graphs.items():
            form = PLUGIN if info.plugin else NATIVE
            self.variants.setdefault(info.variant_of or name, {})[form] = name
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"graph {name!r} has a name that is no file's",
                    code="bundle-invalid",
                    expected="letters, digits, '_', '-' and '.'",
                    hint="export the bundle again",
                )
        self._check_selection()
        low, high = manifest.batch
        if wrong := [b for b in options.batches if not low <= b <= high]:
            raise InputError(
                f"--batches {wrong[0]} is not a batch of this bundle",
                code="batches",
                expected=f"{low}" if low == high else f"numbers from {low} to {high}",
                hint=f"leave --batches out, or export with --batch {min(low, *wrong)}:{max(high, *wrong)}",
            )

    def _check_selection(self) -> None:
        asked = self.options.selection
        forms = {form for own in self.variants.values() for form in own}
        without = [root for root, own in self.variants.items() if asked == NATIVE and NATIVE not in own]
        if without or (asked == PLUGIN and PLUGIN not in forms):
            what = f"'{without[0]}' only with plugin nodes" if without else "no graph with plugin nodes"
            raise InputError(
                f"--selection {asked}: this bundle has {what}",
                code="selection",
                expected="a form the bundle was exported with",
                hint=f"export with --selection auto, which writes both; this one has '{self.manifest.selection}'",
            )

    def unit(self, graph: str) -> Unit:
        """Return a graph's engines, one for each form of its selection that is wanted."""
        own = self.variants[graph]
        asked = self.options.selection
        forms = {asked: own[asked]} if asked in own else own
        return Unit(graph, {form: self._engine(name, graph) for form, name in sorted(forms.items())})

    def rest_ways(self, rests: Sequence[str], told: str | None) -> dict[str, tuple[Unit, ...]]:
        """Return the buckets as one engine with profiles and as an engine each, as far as they are there and wanted."""
        ways: dict[str, tuple[Unit, ...]] = {}
        if told is not None or is_told(self.manifest.graphs[rests[0]]):
            ways[PROFILES] = (self.unit(told or rests[0]),)
        if not is_told(self.manifest.graphs[rests[0]]):
            ways[PER_BUCKET] = tuple(self.unit(rest) for rest in rests)
        asked = self.options.engines
        if asked != "auto" and asked not in ways:
            raise InputError(
                f"--engines {asked}: this bundle has no graphs for that",
                code="engines",
                expected=" or ".join(["auto", *ways]),
                hint="leave --engines out, or export the bundle again",
            )
        return ways if asked == "auto" else {asked: ways[asked]}

    def _engine(self, source: str, graph: str) -> EnginePlan:
        info = self.manifest.graphs[source]
        _check_static(source, info.inputs)
        runs = list(self._runs(graph, info))
        profiles = tuple(
            Profile(run, batch, slots, open_shapes(info.inputs, batch))
            for run, slots in runs
            for batch in self._batches(graph, info)
        )
        return EnginePlan(source, info.plugin, profiles)

    def _runs(self, graph: str, info: GraphInfo) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Yield (graph, slots) of everything an engine of this graph can run."""
        if not is_told(info):
            yield graph, None
            return
        manifest = self.manifest
        if buckets := _buckets(manifest.adaptive):
            yield from ((bucket.graph, tuple(bucket.capacities)) for bucket in buckets)
        elif found := [d for d in manifest.densities if d.graph == graph]:
            yield from dict.fromkeys((graph, tuple(stage.kept for stage in density.stages)) for density in found)
        else:
            yield graph, tuple(stage.kept for stage in manifest.method.stages)

    def _batches(self, graph: str, info: GraphInfo) -> tuple[int, ...]:
        """Return the batches of an engine: the graph's own, or those of the bundle; a bucket may get a single image."""
        own = next(tensor.shape[0] for tensor in info.inputs if tensor.name != SLOTS)
        if own != -1:
            return (own,)
        low, high = self.manifest.batch
        whole = (1, high) if _buckets(self.manifest.adaptive) and graph not in BASELINES else (low, high)
        return tuple(sorted(set(self.options.batches))) or batches_of(whole)


def is_told(info: GraphInfo) -> bool:
    """Return whether a graph takes `slots`."""
    return any(tensor.name == SLOTS for tensor in info.inputs)


def open_shapes(inputs: Sequence[TensorInfo], batch: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs whose batch is open."""
    return {
        tensor.name: (batch, *tensor.shape[1:]) for tensor in inputs if tensor.name != SLOTS and tensor.shape[0] == -1
    }


def _check_static(source: str, inputs: Sequence[TensorInfo]) -> None:
    """Raise InputError `graph-dynamic` when more than the batch is open."""
    for tensor in inputs:
        if -1 in tensor.shape[1:]:
            raise InputError(
                f"graph '{source}': input '{tensor.name}' {tensor.shape} leaves more open than the batch",
                code="graph-dynamic",
                expected="static shapes but for the batch",
                hint="export for a trt- target",
            )
