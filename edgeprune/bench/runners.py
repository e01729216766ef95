"""Calls to measure: one batch, or a pass over several, through a session or an ONNX file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from numpy import median

from edgeprune.bench import fingerprint as env
from edgeprune.bench.adaptive import Run
from edgeprune.bench.images import BenchImages
from edgeprune.bench.measure import Runner
from edgeprune.bench.result import MemoryResult
from edgeprune.bench.summary import pruned_runners
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.ort import OrtBackend, import_onnxruntime
from edgeprune.runtime.router import Trace
from edgeprune.runtime.timing import DeviceTimer

T = TypeVar("T")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeprune.runtime.opener import OpenGraph
    from edgeprune.runtime.session import Session

    Batches = Sequence[NDArray[np.float32]]


@dataclass
class LoggedPass:
    """A runner of an adaptive bundle: a call is a pass over some batches, or the next batch, and takes runs down.

    Attributes:
        session: runs them.
        batches: of one pass, each [B, C, H, W].
        density: keep rate, of a bundle that holds several.
        clock: seconds.
        runs: of all calls so far.
        singly: a call runs one batch, the next one.
    """

    session: Session
    batches: Batches
    density: float | None = None
    clock: Callable[[], float] = time.perf_counter
    runs: list[Run] = field(default_factory=list)
    singly: bool = False

    def __post_init__(self) -> None:
        """Get ready for the first call."""
        self._next = in_turn(self.batches, singly=self.singly)

    def __call__(self) -> None:
        """Do one call."""
        take_density(self.session, self.density)
        for images in next(self._next):
            trace = Trace()
            start = self.clock()
            result = self.session.run(images, trace=trace)
            wall_s = self.clock() - start
            assert result.kept_counts is not None  # an adaptive bundle always tells them
            self.runs.append(Run(wall_s, trace, result.kept_counts, result.bucket))

    def measured(self, warmup_calls: int) -> list[Run]:
        """Return the runs without those of the first calls."""
        return self.runs[warmup_calls * (1 if self.singly else len(self.batches)) :]


@dataclass
class Contest:
    """What is measured in turns.

    Attributes:
        images: of one sample.
        threads: of every session.
        runners: by name, dense first.
        logs: those of the pruned runners of an adaptive bundle.
        memory: of the process around the opening of each session.
        warnings: about baselines the bundle lacks.
        singly: a call runs the next batch instead of all.
        timer: what sessions on a device tell its times.
    """

    images: BenchImages
    threads: int
    runners: dict[str, Runner] = field(default_factory=dict)
    logs: dict[str, LoggedPass] = field(default_factory=dict)
    memory: list[MemoryResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    singly: bool = False
    timer: DeviceTimer | None = None

    def add_bundle(self, bundle: Bundle, against: Sequence[str] = ("dense", "random")) -> Session:
        """Add the runners of a bundle's graphs, and a warning about each baseline that it should hold and does not.

        Returns:
            The session of the pruned graph; of the only one in a dense bundle.
        """
        manifest = bundle.manifest
        if not manifest.target.startswith("trt-"):
            import_onnxruntime()  # or its memory would count as the first session's
        if not manifest.method.stages:
            only = self._open(bundle, "model", "dense")
            self.runners["dense"] = pass_runner(only, self.images.batches, singly=self.singly)
            return only
        self._add_baseline(bundle, "dense", against)
        session = self._open(bundle, "model", "pruned")
        for name, density in pruned_runners(manifest).items():
            if manifest.adaptive is None:
                self.runners[name] = pass_runner(session, self.images.batches, density, singly=self.singly)
            else:
                self.runners[name] = self.logs[name] = LoggedPass(
                    session, self.images.batches, density, singly=self.singly
                )
        if manifest.adaptive is None or manifest.adaptive.form == "slots":  # other shapes have no random counterpart
            self._add_baseline(bundle, "random", against)
        return session

    def add_float(self, bundle: Bundle) -> None:
        """Add what a quantized bundle runs first, in float32; needs the `onnx` package, and warns without."""
        try:
            from edgeprune.export.float_twin import open_float_twin
        except ImportError:
            self.warnings.append("without the package onnx the float32 form was not measured")
            return
        before = env.read_pss_mib()
        session = open_session(bundle, "model", threads=self.threads, open_graph=open_float_twin)
        self.runners["float"] = pass_runner(session, self.images.batches, self._first_rate(bundle), singly=self.singly)
        self.memory.append(MemoryResult("float", before, env.read_pss_mib()))

    def _first_rate(self, bundle: Bundle) -> float | None:
        return next(iter(pruned_runners(bundle.manifest).values()))

    def add_onnx(self, name: str, path: Path) -> None:
        """Add an ONNX file in ONNX Runtime's defaults, without spinning between runs."""
        before = env.read_pss_mib()
        self.runners[name] = onnx_runner(path, *self.images.batches, threads=self.threads, singly=self.singly)
        self.memory.append(MemoryResult(name, before, env.read_pss_mib()))

    def _add_baseline(self, bundle: Bundle, graph: str, against: Sequence[str]) -> None:
        if graph not in against:
            return
        if graph in bundle.manifest.graphs:
            opened = self._open(bundle, graph, graph)
            self.runners[graph] = pass_runner(opened, self.images.batches, singly=self.singly)
        else:
            self.warnings.append(f"the bundle holds no {graph} graph; it was not measured")

    def _open(self, bundle: Bundle, graph: str, name: str) -> Session:
        before = env.read_pss_mib()
        session = open_session(bundle, graph, threads=self.threads)
        if self.timer is not None:
            session.time_device(self.timer)
        self.memory.append(MemoryResult(name, before, env.read_pss_mib()))
        return session


def open_session(bundle: Bundle, graph: str, *, threads: int, open_graph: OpenGraph | None = None) -> Session:
    """Return a session of one graph of a bundle that does not spin between runs."""
    from edgeprune.runtime.session import Session

    return Session(bundle, graph=graph, threads=threads, spinning=False, check_hashes=False, open_graph=open_graph)


def session_runner(bundle: Bundle, graph: str, *batches: NDArray[np.float32], threads: int) -> Runner:
    """Return a runner of one graph of a bundle; its session does not spin between runs."""
    return pass_runner(open_session(bundle, graph, threads=threads), batches)


def pass_runner(session: Session, batches: Batches, density: float | None = None, *, singly: bool = False) -> Runner:
    """Return a runner that runs some batches one after the other, or the next one, at one density of the session."""
    turns = in_turn(batches, singly=singly)

    def run() -> None:
        take_density(session, density)
        for images in next(turns):
            session.run(images)

    return run


def in_turn(items: Sequence[T], *, singly: bool) -> Iterator[Sequence[T]]:
    """Return an endless iterator over what each call runs: all items, or one of them in turn."""
    return cycle([[item] for item in items] if singly else [items])


def onnx_runner(path: Path, *batches: NDArray[np.float32], threads: int, singly: bool = False) -> Runner:
    """Return a runner of an ONNX file in ONNX Runtime's defaults, without spinning between runs."""
    backend = OrtBackend(path, threads=threads, spinning=False)
    feeds = [{backend.inputs[0].name: images} for images in batches]
    turns = in_turn(feeds, singly=singly)

    def run() -> None:
        for feed in next(turns):
            backend.run(feed)

    return run


def switch_us(session: Session, *, repeats: int = 200, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Return the median microseconds of setting a session's density, None when it holds a single one.

    Args:
        session: its density is as before afterwards.
        repeats: rounds over all densities.
        clock: seconds.
    """
    if len(session.densities) < 2:
        return None
    before, took = session.density, []
    for _ in range(repeats):
        for rate in session.densities:
            start = clock()
            session.density = rate
            took.append(clock() - start)
    take_density(session, before)
    return 1e6 * float(median(took))


def take_density(session: Session, density: float | None) -> None:
    """Switch a session to a density, if it is one."""
    if density is not None:
        session.density = density
