"""Two bundles head to head in one process, and one bundle against itself to learn the machine's floor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeprune.bench.bench import IMAGES, device_of, ratio_clock
from edgeprune.bench.gate import Comparison, Gate, Side, learn_floor
from edgeprune.bench.gate_builds import check_builds, fresh_builds, named
from edgeprune.bench.gate_rules import TIMES
from edgeprune.bench.gate_stats import weigh_apart, weigh_paired
from edgeprune.bench.images import make_images
from edgeprune.bench.measure import QUICK, Measurement, MeasurePlan, Progress, Runner, measure
from edgeprune.bench.runners import Contest
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.processor import processor_name

BLOCKS, QUICK_BLOCKS = 40, 16
FLOOR_SCHEMA = "edgeprune-floor/1"


@dataclass(frozen=True)
class PairPlan:
    """How two bundles are measured.

    Attributes:
        blocks: of a run, made even: half with base first, half with head first.
        batch: images per run.
        threads: of every session.
        dense: measure the dense graphs too, for the speed-up.
        quick: short warm-up.
        seed: of the images.
        builds: engines of both sides are built afresh so many times; 0 takes those the bundles hold.
    """

    blocks: int = BLOCKS
    batch: int = 1
    threads: int = 1
    dense: bool = True
    quick: bool = False
    seed: int = 0
    builds: int = 0


class Floor(BaseModel):
    """What measuring the same thing twice showed, as a file.

    Attributes:
        cpu: it was learned on.
        runs: of base against itself.
        head_to_head: stat -> floor of interleaved runs.
        stored: the same for runs one after the other; those of other processes and days may differ by more.
    """

    model_config = ConfigDict(extra="forbid")

    schema_: str = Field(alias="schema", default=FLOOR_SCHEMA)
    cpu: str
    threads: int
    batch: int
    runs: int
    head_to_head: dict[str, float]
    stored: dict[str, float]


def check_pair(base: Bundle, head: Bundle, batch: int) -> None:
    """Refuse bundles that cannot run side by side on the same images.

    Raises:
        InputError: `compare-bundles`, `bench-batch`.
    """
    for what, one, two in (
        ("target", base.manifest.target, head.manifest.target),
        ("image size", base.manifest.preprocessing.image_size, head.manifest.preprocessing.image_size),
    ):
        if one != two:
            raise InputError(
                f"the bundles differ in their {what}: {one} and {two}",
                code="compare-bundles",
                expected=f"two bundles of the same {what}",
            )
    for bundle in (base, head):
        low, high = bundle.manifest.batch
        if not low <= batch <= high:
            raise InputError(
                f"batch {batch} does not fit {bundle.path}",
                code="bench-batch",
                expected=f"{low}" if low == high else f"{low} to {high}",
            )


def compare_bundles(
    base: Bundle,
    head: Bundle,
    gate: Gate,
    plan: PairPlan,
    *,
    confirm: int = 1,
    progress: Progress | None = None,
    base_top1: Mapping[str, float] | None = None,
    head_top1: Mapping[str, float] | None = None,
) -> Comparison:
    """Measure two bundles in turns; what looks slower is measured again, on new builds, before it counts.

    Args:
        base: bundle that is the measure.
        head: bundle in question.
        gate: what a regression is; its blocks are paired.
        plan: how to measure.
        confirm: reruns after a suspicious first run.
        progress: called with (step, share done).
        base_top1: graph -> share of images classified right.
        head_top1: the same of head.

    Raises:
        InputError: those of `check_pair`; those of `check_builds` with builds.
        EnvironmentLackError: those of opening the bundles; with builds those of `build_engines`.
        BuildError: those of `build_engines`, with builds.
    """
    check_pair(base, head, plan.batch)
    device = device_of(base.manifest.target)
    if plan.builds:
        for bundle in (base, head):
            check_builds(bundle)
    names = (str(base.path), str(head.path))
    timed = any(rule.stat in (*TIMES, "speedup") for rule in gate.rules)
    old = Side(names[0], parity=base.manifest.parity, top1=base_top1 or {})
    new = Side(names[1], parity=head.manifest.parity, top1=head_top1 or {})
    if not timed:
        return Comparison(*names, "head to head", None, gate.alpha, gate.judge(old, new))
    first = measure_pair(base, head, plan, progress=progress)
    old, new = old.joined(first[0]), new.joined(first[1])
    reruns = []
    if gate.suspects(old, new):
        reruns = [
            measure_pair(base, head, plan, swapped=i % 2 == 0, progress=named(progress, "confirmation"))
            for i in range(confirm)
        ]
    clock = ratio_clock(plan.threads, device is not None)
    builds = plan.builds or (1 if device == "tensorrt" else None)
    return Comparison(*names, "head to head", clock, gate.alpha, gate.judge(old, new, reruns), builds=builds)


def measure_pair(
    base: Bundle, head: Bundle, plan: PairPlan, *, swapped: bool = False, progress: Progress | None = None
) -> tuple[Side, Side]:
    """Return both sides, measured in turns in sessions opened for it; blocks of equal index belong together.

    With builds, engines are built first, and all of them take turns in one process. Half of the blocks visit base
    first, half head, so that neither gains from its place.

    Args:
        base: bundle that `check_pair` has let through.
        head: the same.
        plan: how to measure.
        swapped: open head first.
        progress: called with (step, share done).

    Raises:
        EnvironmentLackError: those of opening the bundles; with builds those of `build_engines`.
        BuildError: those of `build_engines`, with builds.
    """
    sides, pair = {"base": [base], "head": [head]}, {"base": base, "head": head}
    with ExitStack() as stack:
        if plan.builds:
            for name, bundle in pair.items():
                step = named(progress, name)
                made = fresh_builds(bundle, plan.builds, batch=plan.batch, dense=plan.dense, progress=step)
                sides[name] = stack.enter_context(made)
        found = _measure_sides(sides, plan, swapped=swapped, progress=progress)
    if plan.builds:
        return Side("base", builds=[found["base"]]), Side("head", builds=[found["head"]])
    return found["base"][0], found["head"][0]


def _measure_sides(
    sides: Mapping[str, Sequence[Bundle]], plan: PairPlan, *, swapped: bool, progress: Progress | None
) -> dict[str, list[Side]]:
    """Return what each bundle of each side took, all measured in turns."""
    manifests = [bundle.manifest for bundles in sides.values() for bundle in bundles]
    first = manifests[0]
    images = make_images(None, first.preprocessing, count=IMAGES, batch=plan.batch, seed=plan.seed)
    sample = images if any(manifest.adaptive is not None for manifest in manifests) else images.first()
    orders = [_keys(sides, list(sides)), _keys(sides, list(sides)[::-1])]
    if swapped:
        orders.reverse()
    contests: dict[tuple[str, int], Contest] = {}
    for name, number in orders[0]:
        contests[name, number] = Contest(sample, plan.threads)
        contests[name, number].add_bundle(sides[name][number], ("dense",) if plan.dense else ())
    cpu = ratio_clock(plan.threads, device_of(first.target) is not None) == "cpu"
    rounds = plan.blocks + plan.blocks % 2
    timing = MeasurePlan(rounds=rounds, max_warmup_s=QUICK.max_warmup_s if plan.quick else 10.0)
    found = {name: [Side(name) for _ in bundles] for name, bundles in sides.items()}
    for order in orders:
        measured = measure(_in_turns(contests, order), timing, progress=progress).per_run(len(sample.batches))
        for name, number in order:
            found[name][number].segments.append(_segment(measured, _prefix(name, number), cpu=cpu))
    return found


def _keys(sides: Mapping[str, Sequence[Bundle]], names: Sequence[str]) -> list[tuple[str, int]]:
    """Return (side, number of its bundle): the first of every side, then the second."""
    return [(name, number) for number in range(len(sides[names[0]])) for name in names]


def _prefix(name: str, number: int) -> str:
    return f"{name} {number + 1} "


def calibrate(bundle: Bundle, plan: PairPlan, runs: int, *, progress: Progress | None = None) -> Floor:
    """Measure a bundle against itself, each time in new sessions, and return what its ratios strayed by.

    Raises:
        InputError: `bench-batch`.
    """
    check_pair(bundle, bundle, plan.batch)
    together: list[dict[str, float]] = []
    apart: list[dict[str, float]] = []
    before: Side | None = None
    for i in range(runs):
        step = named(progress, f"run {i + 1} of {runs}")
        base, head = measure_pair(bundle, bundle, plan, swapped=i % 2 == 1, progress=step)
        together.append(_worst(base, head, paired=True))
        if before is not None:
            apart.append(_worst(before, base, paired=False))
        before = base
    return Floor(
        cpu=processor_name(),
        threads=plan.threads,
        batch=plan.batch,
        runs=runs,
        head_to_head=learn_floor(together),
        stored=learn_floor(apart),
    )


def read_floor(path: Path) -> Floor:
    """Return a floor file.

    Raises:
        InputError: `floor-unreadable`.
    """
    try:
        floor = Floor.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"'{path}' is no floor file: {first}",
            code="floor-unreadable",
            expected=f"a file that --calibrate wrote, schema {FLOOR_SCHEMA}",
            hint="edgeprune compare BUNDLE --calibrate 20 --floor FILE",
        ) from error
    return floor


def _worst(base: Side, head: Side, *, paired: bool) -> dict[str, float]:
    """Return stat -> ratio of the graph that strayed most."""
    weigh = weigh_paired if paired else weigh_apart
    found = {}
    for stat in (*TIMES, "speedup"):
        costs = [(base.cost(name, stat), head.cost(name, stat)) for name in base.runners()]
        ratios = [weigh(one, two).ratio for one, two in costs if one is not None and two is not None]
        if ratios:
            found[stat] = max(ratios, key=lambda ratio: abs(np.log(ratio)))
    return found


def _in_turns(contests: Mapping[tuple[str, int], Contest], order: Sequence[tuple[str, int]]) -> dict[str, Runner]:
    """Return all runners, each graph of one bundle beside the same of the others."""
    names = list(dict.fromkeys(name for key in order for name in contests[key].runners))
    return {
        f"{_prefix(*key)}{name}": contests[key].runners[name]
        for name in names
        for key in order
        if name in contests[key].runners
    }


def _segment(measured: Measurement, prefix: str, *, cpu: bool) -> dict[str, Any]:
    shape = (-1, 2, measured.calls_per_visit)
    return {
        name.removeprefix(prefix): np.asarray(s.cpu_ms if cpu else s.wall_ms).reshape(shape)
        for name, s in measured.samples.items()
        if name.startswith(prefix)
    }
