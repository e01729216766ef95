"""`build_engines`: the engines of a bundle for this device, built, measured, chosen, and put into the bundle whole."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from edgeprune.errors import BuildError, EdgepruneError, EdgepruneWarning, EnvironmentLackError
from edgeprune.export.trt import timing_cache
from edgeprune.export.trt.choose import choose
from edgeprune.export.trt.engine_cache import EngineCache, default_folder, key_of
from edgeprune.export.trt.folder import EngineFolder
from edgeprune.export.trt.job import Job, JobProfile, Precision
from edgeprune.export.trt.machine import (
    PREFIX,
    Machine,
    check_capability,
    check_target,
    check_version,
    find_machine,
    with_plugin,
)
from edgeprune.export.trt.measure import Stopwatch, time_profiles
from edgeprune.export.trt.options import BuildOptions
from edgeprune.export.trt.plan import EnginePlan, Profile, Role, bucket_shares, open_shapes, plan_roles
from edgeprune.export.trt.process import run_job
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import (
    ENGINES_FOLDER,
    INDEX_NAME,
    ChoiceInfo,
    EngineIndex,
    EngineInfo,
    ProfileInfo,
    folder_name,
    hash_weights,
)
from edgeprune.runtime.router import SLOTS
from edgeprune.version import __version__

Report = Callable[[str, float], None]
MEASURING = 0.1  # share of the progress


def can_build_here() -> str | None:
    """Return why engines cannot be built on this machine, None when they can."""
    try:
        find_machine()
    except EnvironmentLackError as error:
        return error.message
    return None


def plan_build(bundle: Bundle, options: BuildOptions) -> tuple[Role, ...]:
    """Return what would be built, every candidate, without looking at the machine.

    Raises:
        InputError: `target`; those of `plan_roles`.
    """
    check_target(bundle.manifest)
    return plan_roles(bundle.manifest, options)


def build_engines(
    bundle: Bundle,
    options: BuildOptions,
    report: Report = lambda step, share: None,
    *,
    stopwatch: Stopwatch | None = None,
) -> EngineIndex:
    """Build the engines of a bundle into `engines/<device>-trt<version>/` inside it, replacing earlier ones at the end.

    Args:
        bundle: for a target of TensorRT.
        options: what to build.
        report: called with (step, share done) at least once a second.
        stopwatch: times engines; by default `time_profiles`, on the device.

    Raises:
        InputError: `target`, `output-not-writable`; those of `plan_roles`.
        EnvironmentLackError: `gpu-missing`, `tensorrt-missing`, `tensorrt-version`, `gpu-too-old`, `disk-full`,
            `out-of-memory`; the plugin's.
        BuildError: `parse`, `engine-build`, `worker-crashed`, `worker-failed`.
    """
    roles = plan_build(bundle, options)
    machine = _find_machine(bundle)
    check_version(bundle.manifest, machine.tensorrt)
    check_capability(bundle.manifest, machine.compute_capability)
    machine, roles, notes = with_plugin(machine, roles)
    _warn(notes)
    place = bundle.path / ENGINES_FOLDER / folder_name(machine.device, machine.tensorrt)
    with EngineFolder(place) as folder:
        build = _Build(bundle, options, machine, folder.path, report)
        index = build.run(roles, stopwatch or time_profiles)
        folder.finish()
    report("done", 1.0)
    return index


@dataclass
class _Build:
    """One run; engines are written into `folder`."""

    bundle: Bundle
    options: BuildOptions
    machine: Machine
    folder: Path
    report: Report

    def run(self, roles: Sequence[Role], stopwatch: Stopwatch) -> EngineIndex:
        """Build every candidate, measure, keep the best, describe them and return the index."""
        found: dict[str, EngineInfo] = {}
        total, started = sum(len(list(role.plans())) for role in roles), 0
        buildable: list[Role] = []
        for role in roles:
            buildable.append(self._engines(role, found, started, total))
            started += len(list(role.plans()))
        shares = bucket_shares(self.bundle.manifest)
        kept: dict[str, EngineInfo] = {}  # by the graph its first profile runs
        choices: list[ChoiceInfo] = []
        for number, role in enumerate(buildable):
            self.report(f"measuring {role.name}", 1 - MEASURING * (1 - number / len(buildable)))
            own = [found[plan.source] for plan in role.plans()]
            before = None if role.needs is None else kept[role.needs]
            times = stopwatch(self.bundle, self.folder, self._index(own), before)
            by_source = {(info.source, n): times[info.file, n] for info in own for n in range(len(info.profiles))}
            best, chosen = choose(role, by_source, shares)
            choices += chosen
            for info in own:
                if any(plan.source == info.source for plan in best):
                    kept[info.profiles[0].graph] = _timed(info, times)
        for source in found.keys() - {info.source for info in kept.values()}:
            self._remove(source)
        index = self._index([*kept.values()], choices)
        for info in index.engines:
            self._describe(info)
        (self.folder / INDEX_NAME).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return index

    def _engines(self, role: Role, found: dict[str, EngineInfo], started: int, total: int) -> Role:
        """Build a role's candidates and return those that could be built; `found` gets their engines.

        What fails is left out with a warning where the role does without it.
        """
        failed: set[str] = set()
        for number, plan in enumerate(role.plans(), started):
            error = self._try_engine(plan, number, total, found)
            if error is None:
                continue
            failed.add(plan.source)
            if not role.without(lambda plan: plan.source in failed).ways:
                raise error
            self._remove(plan.source)
            _warn([f"'{plan.source}' is left out of the choice: {error.message.splitlines()[0]}"])
        return role.without(lambda plan: plan.source in failed)

    def _try_engine(
        self, plan: EnginePlan, number: int, total: int, found: dict[str, EngineInfo]
    ) -> EdgepruneError | None:
        """Put an engine into `found`, or return why there is none."""
        try:
            found[plan.source] = self._engine(plan, number, total)
        except (BuildError, EnvironmentLackError) as error:
            return error
        return None

    def _engine(self, plan: EnginePlan, number: int, total: int) -> EngineInfo:
        """Take an engine from the cache or build it; it lies in the folder then."""
        inputs, options = self._inputs(plan), self.options
        key = key_of(inputs)
        cache = EngineCache(default_folder(), reads=options.cache and not options.rebuild, writes=options.cache)
        engine, layers = self.folder / f"{plan.source}.engine", self.folder / f"{plan.source}.layers.json"
        built = cache.take(key, engine, layers)
        build_s = 0.0
        if built is None:
            job = self._job(plan, engine, layers)
            built = run_job(job, f"{number + 1} of {total}: {plan.source}", self._part(number, total))
            build_s = built.build_s
            Path(job.log).unlink()
            _warn([f"{plan.source}: {words}" for words in built.warnings])
            _warn(cache.put(key, inputs, built, engine, layers))
        return EngineInfo(
            file=engine.name,
            sha256=built.sha256,
            bytes=built.bytes,
            source=plan.source,
            source_sha256=self._graph_sha256(plan),
            weights_sha256=hash_weights(self.bundle, plan.source),
            plugin=plan.plugin,
            key=key,
            profiles=[
                ProfileInfo(graph=p.graph, batch=p.batch, slots=None if p.slots is None else list(p.slots))
                for p in plan.profiles
            ],
            scratch_bytes=built.scratch_bytes,
            build_s=build_s,
            proof=built.proof,
        )

    def _part(self, number: int, total: int) -> Report:
        """Return a report for one of several builds."""
        return lambda step, share: self.report(step, (1 - MEASURING) * (number + share) / total)

    def _inputs(self, plan: EnginePlan) -> dict[str, Any]:
        """Return everything the engine depends on."""
        return {
            "graph": self._graph_sha256(plan),
            "weights": hash_weights(self.bundle, plan.source),
            "profiles": [job_profile(profile).model_dump() for profile in plan.profiles],
            "tensorrt": self.machine.tensorrt,
            "device": self.machine.device,
            "compute_capability": self.machine.compute_capability,
            "precision": self.bundle.manifest.precision,
            "workspace": self.options.workspace,
            "tactics": self.options.tactics,
            "optimization_level": self.options.optimization_level,
            "plugin": self.machine.plugin_sha256 if plan.plugin else None,
        }

    def _job(self, plan: EnginePlan, engine: Path, layers: Path) -> Job:
        path = self.options.timing_cache
        if path is None and self.options.cache:
            path = timing_cache.default_path(self.machine.device, self.machine.tensorrt)
        return Job(
            graph=str((self.bundle.path / self.bundle.manifest.graphs[plan.source].file).absolute()),
            engine=str(engine.absolute()),
            layers=str(layers.absolute()),
            log=str((self.folder / f"{plan.source}.log").absolute()),
            profiles=[job_profile(profile) for profile in plan.profiles],
            precision=cast(Precision, self.bundle.manifest.target.removeprefix(PREFIX)),
            workspace=self.options.workspace,
            tactics=self.options.tactics,
            optimization_level=self.options.optimization_level,
            plugin=plan.plugin,
            timing_cache=None if path is None else str(path.absolute()),
        )

    def _graph_sha256(self, plan: EnginePlan) -> str:
        manifest = self.bundle.manifest
        return manifest.files[manifest.graphs[plan.source].file].sha256

    def _index(self, engines: Sequence[EngineInfo], choices: Sequence[ChoiceInfo] = ()) -> EngineIndex:
        return EngineIndex(
            tool_version=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            device=self.machine.device,
            compute_capability=self.machine.compute_capability,
            tensorrt=self.machine.tensorrt,
            plugin_sha256=self.machine.plugin_sha256 if any(info.plugin for info in engines) else None,
            engines=list(engines),
            choices=list(choices),
        )

    def _remove(self, source: str) -> None:
        for suffix in (".engine", ".layers.json", ".log"):
            (self.folder / f"{source}{suffix}").unlink(missing_ok=True)

    def _describe(self, info: EngineInfo) -> None:
        """Write what an engine is beside it, with the commands that time it without us."""
        machine = self.machine
        sidecar = {
            "engine": info.model_dump(mode="json"),
            "environment": {
                "device": machine.device,
                "compute_capability": machine.compute_capability,
                "driver": machine.driver,
                "tensorrt": machine.tensorrt,
                "plugin_sha256": machine.plugin_sha256 if info.plugin else None,
                "python": platform.python_version(),
                "edgeprune": __version__,
                "precision": self.bundle.manifest.precision,
                "workspace": self.options.workspace,
                "tactics": self.options.tactics,
                "optimization_level": self.options.optimization_level,
            },
            "trtexec": trtexec_lines(info, self._shapes_of(info), machine),
        }
        (self.folder / f"{info.file}.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")

    def _shapes_of(self, info: EngineInfo) -> list[dict[str, tuple[int, ...]]]:
        inputs = self.bundle.manifest.graphs[info.source].inputs
        return [open_shapes(inputs, profile.batch) for profile in info.profiles]


def _find_machine(bundle: Bundle) -> Machine:
    """Return this machine; where it has no GPU the hint is to build on one that has."""
    try:
        return find_machine()
    except EnvironmentLackError as error:
        if error.code == "gpu-missing":
            elsewhere = f"copy the bundle to the device that will run it, and there: edgeprune build {bundle.path}"
            error.hint = f"{elsewhere}; if this is that device: {error.hint}"
        raise


def job_profile(profile: Profile) -> JobProfile:
    """Return a profile as the building process is told it."""
    slots = None if profile.slots is None else list(profile.slots)
    return JobProfile(shapes={name: list(shape) for name, shape in profile.shapes.items()}, slots=slots)


def trtexec_lines(info: EngineInfo, shapes: Sequence[Mapping[str, Sequence[int]]], machine: Machine) -> list[str]:
    """Return a command for every profile; the first is TensorRT's own choice, so only others are named."""
    lines = []
    for number, (profile, own) in enumerate(zip(info.profiles, shapes, strict=True)):
        words = [f"trtexec --loadEngine={info.file}"]
        values = {**own, **({} if profile.slots is None else {SLOTS: profile.slots})}
        if values:
            sizes = (f"{name}:{'x'.join(map(str, shape))}" for name, shape in values.items())
            words.append(f"--shapes={','.join(sizes)}")
        if number:
            words.append(f"--useProfile={number}")
        if info.plugin and machine.plugin is not None:
            how = "staticPlugins" if machine.registers_itself else "dynamicPlugins"
            words.append(f"--{how}={machine.plugin.name}")
        lines.append(" ".join(words))
    return lines


def _timed(info: EngineInfo, times: Mapping[tuple[str, int], float]) -> EngineInfo:
    profiles = [p.model_copy(update={"median_ms": times[info.file, n]}) for n, p in enumerate(info.profiles)]
    return info.model_copy(update={"profiles": profiles})


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, EdgepruneWarning, stacklevel=3)
