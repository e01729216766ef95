"""From a bundle to what runs it: graphs are loaded once, checked against the manifest, and put into runners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import AdaptiveInfo, StageInfo, TensorInfo
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.ort_cuda import OrtCudaBackend
from edgeprune.runtime.router import IMAGES, SLOTS, Backend, OneByOne, Router, Runner, Whole
from edgeprune.runtime.trt import Engines

_FOLLOWING = ("computed", "ragged")  # forms whose shapes follow the image
_ANY_BATCH = ("computed", "buckets")  # forms whose runner takes the bundle's batch apart
_BASELINES = ("dense", "random")
OpenGraph = Callable[..., Backend]


class Opener:
    """Opens graphs of a bundle.

    Args:
        bundle: whose graphs are opened.
        options: of the backend, such as `threads`.
        prepack: see `OrtBackend`; None says no where several rests of the same weights are open.
        open_graph: opens a graph's file in place of what the target runs on, with the options and `prepack`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: dict[str, Any],
        prepack: bool | None = None,
        open_graph: OpenGraph | None = None,
    ) -> None:
        self.bundle, self.options, self.prepack, self.open_graph = bundle, options, prepack, open_graph
        self._open: dict[str, Backend] = {}
        self._engines: Engines | None = None

    def runners(self, graph: str) -> dict[float | None, Runner]:
        """Return what runs "model", by keep rate where the bundle holds several, or what runs a baseline.

        Raises:
            InputError: `graph-missing`, `graph-invalid`, `bundle-tampered`.
            EnvironmentLackError: `package-missing`, `target-not-runnable`; those of `Engines` and its `backend`.
        """
        manifest = self.bundle.manifest
        if graph != "model":
            return {None: Whole(self.backend(graph))}
        if manifest.densities:
            return {d.keep_rate: self._told(d.graph, d.stages, manifest.adaptive) for d in manifest.densities}
        adaptive = manifest.adaptive
        if adaptive is not None and adaptive.form == "buckets":
            return {None: self._router(adaptive)}
        return {None: self._told("model", manifest.method.stages, adaptive)}

    def _told(self, graph: str, stages: list[StageInfo], adaptive: AdaptiveInfo | None) -> Runner:
        """Return the runner of one graph; it is told the slots where it asks for them."""
        backend, slots = self.backend(graph), [stage.kept for stage in stages]
        if adaptive is not None and adaptive.form == "computed" and stages:
            return OneByOne(backend, slots)
        return Whole(backend, slots if any(info.name == SLOTS for info in backend.inputs) else None)

    def _router(self, adaptive: AdaptiveInfo) -> Router:
        graphs = [bucket.graph for bucket in adaptive.buckets]
        prepack = len(set(graphs)) == 1 if self.prepack is None else self.prepack
        rests = [self.backend(graph, prepack=prepack) for graph in graphs]
        buckets = [bucket.capacities for bucket in adaptive.buckets]
        return Router(self.backend("stem"), rests, buckets, fill=adaptive.fill == "next-best")

    def backend(self, graph: str, *, prepack: bool = True) -> Backend:
        """Return a graph ready to run, opened once."""
        if graph not in self._open:
            path = self.bundle.graph_path(graph)
            if self.open_graph is None:
                opened = self._open_here(graph, path, prepack)
            else:
                opened = self.open_graph(path, prepack=prepack, **self.options)
            self._check(graph, path, opened)
            self._open[graph] = opened
        return self._open[graph]

    def backends(self) -> dict[str, Backend]:
        """Return the graphs that are open, by name."""
        return dict(self._open)

    def _open_here(self, graph: str, path: Path, prepack: bool) -> Backend:
        target = self.bundle.manifest.target
        if target not in _OPEN:
            raise EnvironmentLackError(
                f"this version of edgeprune cannot run the target '{target}'",
                code="target-not-runnable",
                expected=f"one of {', '.join(_OPEN)}",
                hint="export for one of these targets, or upgrade edgeprune",
            )
        return _OPEN[target](self, graph, path, prepack)

    def open_on_cpu(self, graph: str, path: Path, prepack: bool) -> Backend:
        """Open a graph in ONNX Runtime on the processor."""
        return OrtBackend(path, prepack=prepack, **self.options)

    def open_on_cuda(self, graph: str, path: Path, prepack: bool) -> Backend:
        """Open a graph in ONNX Runtime's CUDA provider."""
        adaptive = self.bundle.manifest.adaptive
        follows = adaptive is not None and adaptive.form in _FOLLOWING and graph not in _BASELINES
        return OrtCudaBackend(path, graphs=not follows)

    def open_engine(self, graph: str, path: Path, prepack: bool) -> Backend:
        """Open the TensorRT engine that was built of a graph."""
        if self._engines is None:
            self._engines = Engines(self.bundle)
        return self._engines.backend(graph)

    def _check(self, graph: str, path: Path, backend: Backend) -> None:
        """Refuse a graph whose interface is not the one the manifest describes."""
        manifest = self.bundle.manifest
        info = manifest.graphs[graph]
        pairs = [(info.inputs, backend.inputs), (info.outputs, backend.outputs)]
        images = [tensor for tensor in backend.inputs if tensor.name == IMAGES]
        if images or graph in ("model", "dense", "random", "stem"):
            low, high = manifest.batch
            batch = -1 if low < high else low
            form = None if manifest.adaptive is None else manifest.adaptive.form
            if images and form in _ANY_BATCH and graph not in _BASELINES:
                batch = images[0].shape[0]
            wanted = TensorInfo(name=IMAGES, dtype="float32", shape=[batch, -1, *manifest.preprocessing.image_size])
            extra = [tensor for tensor in backend.inputs if tensor.name == SLOTS]
            pairs += [([wanted, *extra], info.inputs), ([wanted, *extra], backend.inputs)]
            if batch == -1 and images and images[0].shape[0] != -1:
                raise _differs(path, backend.inputs, [wanted])
        wide = manifest.target not in ENGINE_TARGETS
        for listed, real in pairs:
            if not _agree(listed, real, wide=wide):
                raise _differs(path, real, listed)
        if graph != "stem" and "logits" not in {tensor.name for tensor in backend.outputs}:
            raise InputError(
                f"{path} has the outputs {_words(backend.outputs)}",
                code="graph-invalid",
                expected="an output named logits",
                hint="export the bundle again",
            )


ENGINE_TARGETS = ("trt-fp32", "trt-fp16", "trt-bf16", "trt-int8", "trt-fp8")
_OPEN: dict[str, Callable[[Opener, str, Path, bool], Backend]] = {
    "onnx": Opener.open_on_cpu,
    "ort-cpu": Opener.open_on_cpu,
    "ort-cpu-int8": Opener.open_on_cpu,
    "ort-cuda-fp16": Opener.open_on_cuda,
    **dict.fromkeys(ENGINE_TARGETS, Opener.open_engine),
}


def _differs(path: Path, real: list[TensorInfo], listed: list[TensorInfo]) -> InputError:
    return InputError(
        f"{path} has {_words(real)} where its manifest describes {_words(listed)}",
        code="bundle-tampered",
        expected="a graph that `edgeprune export` wrote, with its own manifest",
        hint="copy the bundle again, or export it again",
    )


def _agree(listed: list[TensorInfo], real: list[TensorInfo], *, wide: bool = True) -> bool:
    """Tell whether two lists of tensors have the same names, types and sizes; -1 agrees with every size.

    Without `wide`, int64 may be int32: TensorRT before 9 has no other.
    """

    def kind(tensor: TensorInfo) -> str:
        return tensor.dtype if wide or tensor.dtype != "int64" else "int32"

    return len(listed) == len(real) and all(
        (a.name, kind(a), len(a.shape)) == (b.name, kind(b), len(b.shape))
        and all(m == n or -1 in (m, n) for m, n in zip(a.shape, b.shape, strict=True))
        for a, b in zip(listed, real, strict=True)
    )


def _words(tensors: list[TensorInfo]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{t.shape}" for t in tensors) or "none"
