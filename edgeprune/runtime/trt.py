"""TensorRT engines behind `Session`: finding those of a bundle for this device, and opening them.

The GPU is asked for before TensorRT is touched, since TensorRT 8.6 ends the process without one. What TensorRT can do
is asked of its objects. Not run on a GPU yet.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins.loader import import_tensorrt, load_plugins
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.cuda import Buffer, Cuda, out_of_memory
from edgeprune.runtime.engine_backend import EngineBackend, EngineProfile
from edgeprune.runtime.engines import (
    EngineIndex,
    EngineInfo,
    ProfileInfo,
    build_command,
    check_source,
    engine_missing,
    engine_stale,
    find_engines,
    read_engine,
)
from edgeprune.runtime.router import COUNT
from edgeprune.runtime.timing import LayerLog

_log = logging.getLogger(__name__)
_ERRORS = ("INTERNAL_ERROR", "ERROR")
_MEMORY_WORDS = ("out of memory", "outofmemory", "could not be allocated")


class Gpu:
    """What all engines of a bundle share: TensorRT, a stream, a lock around runs, and scratch memory.

    Attributes:
        cuda: the device.
        trt: the module tensorrt.
        stream: all work goes into it.
        lock: a run holds it from its first copy to its last.
        graphs: CUDA graphs are made; no longer once one could not be, or when layers are timed.
        scratch_bytes: the least scratch memory to take, so that it need not grow.

    Raises:
        EnvironmentLackError: `gpu-missing`, `package-missing`, `tensorrt-missing`, `tensorrt-unusable`.
    """

    def __init__(self) -> None:
        self.cuda = Cuda()
        self.trt = import_tensorrt()
        self.logger = _make_logger(self.trt)
        self.lock = threading.RLock()
        self.graphs, self.scratch_bytes = True, 0
        self._scratch: Buffer | None = None
        self._profiles: weakref.WeakSet[EngineProfile] = weakref.WeakSet()
        with self.cuda:
            self.stream = self.cuda.stream()
            self._runtime = self._start()

    def _start(self) -> Any:
        """Return TensorRT's runtime. Of a device it cannot use, some versions only log an error, and crash later."""
        try:
            runtime = self.trt.Runtime(self.logger)
        except Exception as error:  # the binding's exceptions share no public base
            raise self._unusable() from error
        if self.logger.errors:
            raise self._unusable()
        return runtime

    def _unusable(self) -> EnvironmentLackError:
        device = self.cuda.device
        return EnvironmentLackError(
            f"TensorRT {self.version} cannot use {device.name}: {self.why()}",
            code="tensorrt-unusable",
            expected="a TensorRT for this GPU and its driver",
            hint=f"the driver serves CUDA {device.driver or 'of an unknown version'}: install a TensorRT built for it",
            details={"tensorrt": self.version, "device": device.name, "driver": device.driver},
        )

    @property
    def version(self) -> str:
        """TensorRT's."""
        return str(self.trt.__version__)

    def deserialize(self, plan: bytes) -> Any:
        """Return the engine of a plan, None when TensorRT refuses it; `why` then says what it said."""
        self.logger.errors.clear()
        return self._runtime.deserialize_cuda_engine(plan)

    def context(self, engine: Any) -> Any:
        """Return a new execution context that brings no memory of its own.

        Raises:
            EnvironmentLackError: `gpu-out-of-memory`, `engine-run-failed`.
        """
        self.logger.errors.clear()
        strategy = getattr(self.trt, "ExecutionContextAllocationStrategy", None)
        if strategy is None:
            made = engine.create_execution_context_without_device_memory()
        else:
            made = engine.create_execution_context(strategy.USER_MANAGED)
        if made is None:
            raise self.failure("TensorRT makes no execution context")
        return made

    def share_scratch(self, profile: EngineProfile, nbytes: int) -> None:
        """Give a context its scratch memory: one block, of which all have the whole, since one runs at a time.

        A larger block takes the place of one that is too small, in contexts that exist too.
        """
        self._profiles.add(profile)
        if self._scratch is not None and self._scratch.nbytes >= nbytes:
            profile.take_scratch(self._scratch)
            return
        self._scratch = self.cuda.device_buffer(max(nbytes, self.scratch_bytes))
        for one in self._profiles:
            one.take_scratch(self._scratch)

    def profiler(self, log: LayerLog) -> Any:
        """Return a profiler of TensorRT for a context, which takes down what every layer takes."""
        return _make_profiler(self.trt, log)

    def why(self) -> str:
        """Return what TensorRT last said of an error."""
        return "; ".join(self.logger.errors) or "it does not say why"

    def failure(self, message: str, **details: Any) -> EnvironmentLackError:
        """Return `gpu-out-of-memory` when TensorRT spoke of memory, or `engine-run-failed`."""
        why = self.why()
        if any(words in why.lower() for words in _MEMORY_WORDS):
            return out_of_memory(f"{message}: {why}", **details)
        return EnvironmentLackError(
            f"{message}: {why}",
            code="engine-run-failed",
            hint="run it again; if it fails again, build the engines anew: edgeprune build",
            details=details,
        )


class Engines:
    """The engines of a bundle on this device.

    Args:
        bundle: for a target of TensorRT.
        folder, index: other engines than those the bundle holds, such as candidates.

    Raises:
        EnvironmentLackError: `gpu-missing`, `package-missing`, `tensorrt-missing`, `tensorrt-unusable`,
            `engine-missing`, `engine-stale`, `engine-other-device`.
    """

    def __init__(self, bundle: Bundle, folder: Path | None = None, index: EngineIndex | None = None) -> None:
        self._bundle, self._gpu = bundle, _find_gpu(bundle)
        if folder is None or index is None:
            device = self._gpu.cuda.device
            capability = ".".join(map(str, device.compute_capability))
            folder, index = find_engines(bundle, device.name, capability, self._gpu.version)
        self._folder, self.index = folder, index
        self._gpu.scratch_bytes = max((info.scratch_bytes for info in index.engines), default=0)
        self._loaded: dict[str, Any] = {}

    def backend(self, graph: str) -> EngineBackend:
        """Return a graph ready to run, on the engine that took the least time where several run the same.

        Raises:
            EnvironmentLackError: `engine-missing`, `engine-stale`, `gpu-out-of-memory`, `engine-run-failed`; those of
                `load_plugins`.
        """
        best: dict[tuple[int, tuple[int, ...] | None], tuple[EngineInfo, int, ProfileInfo]] = {}
        for info, number, profile in self.index.serving(graph):
            key = (profile.batch, None if profile.slots is None else tuple(profile.slots))
            if key not in best or _time(profile) < _time(best[key][2]):
                best[key] = (info, number, profile)
        if not best:
            raise engine_missing(self._bundle, f"no engine in {self._folder} runs '{graph}'", graph=graph)
        return self.open(graph, [(info, number) for info, number, _ in best.values()])

    def open(self, graph: str, profiles: Sequence[tuple[EngineInfo, int]]) -> EngineBackend:
        """Return a graph on the profiles of engines named by their numbers. Raises as `backend` does."""
        manifest, gpu = self._bundle.manifest, self._gpu
        info = manifest.graphs[graph]
        read = {tensor.name for name, other in manifest.graphs.items() if name != graph for tensor in other.inputs}
        kept = {tensor.name for tensor in info.outputs} & read - {COUNT}
        with gpu.lock, gpu.cuda:
            made = [EngineProfile(gpu, self._engine(one), n, one.profiles[n]) for one, n in profiles]
            for (one, n), profile in zip(profiles, made, strict=True):
                if profile.rows not in (one.profiles[n].batch, None):
                    raise engine_stale(self._bundle, f"profile {n} of {one.file} is not the one its index describes")
            return EngineBackend(gpu, graph, made, info, kept)

    def _engine(self, info: EngineInfo) -> Any:
        """Return an engine, loaded once: its weights are on the device once, whatever runs on them."""
        if info.file not in self._loaded:
            check_source(self._bundle, info)
            plan = read_engine(self._bundle, self._folder, info)
            if info.plugin:
                load_plugins(self._gpu.trt, self._gpu.logger)
            engine = self._gpu.deserialize(plan)
            if engine is None:
                why = self._gpu.why()
                if any(words in why.lower() for words in _MEMORY_WORDS):
                    raise out_of_memory(f"{info.file} does not fit: {why}")
                version = self._gpu.version
                raise engine_stale(self._bundle, f"TensorRT {version} refuses {info.file}: {why}")
            self._loaded[info.file] = engine
        return self._loaded[info.file]


def _find_gpu(bundle: Bundle) -> Gpu:
    """Return the GPU; where there is none the hint is to run the bundle on its device."""
    try:
        return Gpu()
    except EnvironmentLackError as error:
        if error.code == "gpu-missing":
            there = f"run the bundle on the device it is for, where `{build_command(bundle)}` makes its engines"
            error.hint = f"{there}; if this is that device: {error.hint}"
        raise


def _time(profile: ProfileInfo) -> float:
    return float("inf") if profile.median_ms is None else profile.median_ms


def _make_logger(trt: Any) -> Any:
    """Return a logger that passes on what TensorRT says, and remembers its last errors."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, msg: str) -> None:
            _log.log(logging.INFO if severity.name in (*_ERRORS, "WARNING") else logging.DEBUG, "%s", msg)
            if severity.name in _ERRORS:
                self.errors.append(msg)

    return Log()


def _make_profiler(trt: Any, log: LayerLog) -> Any:
    """Return a profiler that adds to a log. TensorRT calls it in the thread of a run, when the run is over."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            log.add(layer_name, ms)

    return Profiler()
