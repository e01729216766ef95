"""ONNX Runtime's CUDA provider behind `Session`: fixed buffers on the device, CUDA graphs, nothing copied in between.

A run whose shapes are known beforehand is planned once: its inputs and outputs get buffers of their own, and later runs
of the same shapes replay a CUDA graph where the provider can record one. Everything else is bound anew each time.
Not run on a GPU yet.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime.cuda import find_device
from edgeprune.runtime.manifest import TensorInfo
from edgeprune.runtime.ort import OrtBackend, import_onnxruntime
from edgeprune.runtime.router import SLOTS

PROVIDER, DEVICE = "CUDAExecutionProvider", "cuda"
MAX_PLANS = 32  # shapes and addresses with buffers and a CUDA graph of their own
GRAPH_KEY, NO_GRAPH = "gpu_graph_id", "-1"


class DeviceRows:
    """Rows of a tensor that lies on the device; a slice is made without copying.

    The rows hold as long as anybody has them, or a slice of them.

    Args:
        value: ONNX Runtime's value that holds the whole tensor.
        dtype: of its elements.
        lease: as long as it lives, the value is not written again.
        start, stop: the rows; all by default.
    """

    def __init__(
        self, value: Any, dtype: np.dtype[Any], lease: object, start: int = 0, stop: int | None = None
    ) -> None:
        self.value, self.dtype, self.lease, self.start = value, dtype, lease, start
        whole = [int(side) for side in value.shape()]
        self.stop = whole[0] if stop is None else stop
        self.shape = (self.stop - start, *whole[1:])

    @property
    def address(self) -> int:
        """Where the first row lies."""
        return int(self.value.data_ptr()) + self.start * math.prod(self.shape[1:]) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceRows:
        start, stop, _ = rows.indices(len(self))
        return DeviceRows(self.value, self.dtype, self.lease, self.start + start, self.start + max(start, stop))

    def __len__(self) -> int:
        return self.shape[0]

    def numpy(self) -> np.ndarray:
        """Return a copy on the host."""
        return np.array(self.value.numpy()[self.start : self.stop])


class _Lease:
    """Lives as long as the rows of one run."""


@dataclass
class _Plan:
    """What a run of known shapes uses again: the binding, the buffers of its arrays and outputs, and its graph."""

    binding: Any
    options: Any
    arrays: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    lease: weakref.ref[_Lease] | None = None

    @property
    def is_free(self) -> bool:
        """Nobody has rows of its last run."""
        return self.lease is None or self.lease() is None


class OrtCudaBackend(OrtBackend):
    """One graph in ONNX Runtime on a device; one run at a time.

    Args:
        model_path: the .onnx file; its weights lie beside it.
        graphs: record CUDA graphs. Not for a graph whose inner shapes follow the image: a replay would not see that.
        provider: the execution provider.
        device: ONNX Runtime's name of where its memory is; "cpu" needs no GPU.

    Raises:
        EnvironmentLackError: `provider-missing` when ONNX Runtime has no such provider or cannot load it,
            `gpu-missing`, `package-missing`.
        InputError: `graph-invalid` when ONNX Runtime refuses the graph.
    """

    def __init__(
        self, model_path: Path, *, graphs: bool = True, provider: str = PROVIDER, device: str = DEVICE
    ) -> None:
        self._ort = import_onnxruntime()
        _require(self._ort.get_available_providers(), provider)
        if device == DEVICE:
            find_device()
        self._model_path, self._provider, self._device = model_path, provider, device
        self._lock = threading.RLock()
        self._open(graphs and device == DEVICE)

    def _open(self, graphs: bool) -> None:
        """Open the session; without CUDA graphs where the provider cannot record this one."""
        self.graphs = graphs
        self._plans: dict[tuple[Any, ...], list[_Plan]] = defaultdict(list)
        options = {"device_id": "0", "enable_cuda_graph": "1"} if graphs else {}
        try:
            super().__init__(self._model_path, threads=1, spinning=False, providers=[(self._provider, options)])
        except InputError:
            if not graphs:
                raise
            return self._open(graphs=False)
        _require_running(self._session.get_providers(), self._provider, self._model_path)
        self._planned = _is_static(self.inputs, self.outputs)
        if graphs and not self._planned:
            self._open(graphs=False)

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Return every output by name: arrays, and of the outputs in `keep` rows on the device.

        Args:
            feeds: every input by name: arrays, or `DeviceRows`.
            keep: outputs that are only handed on.

        Raises:
            InputError: `graph-invalid` when the graph fails while it runs.
        """
        with self._lock:
            try:
                return self._run(feeds, keep)
            except Exception as error:  # the binding's exceptions share no public base
                if not self.graphs:
                    raise self._refusal("cannot run", error) from error
            self._open(graphs=False)  # what the provider accepted may still not be recordable
            return self.run(feeds, keep)

    def join(self, parts: Sequence[Any]) -> Any:
        """Return some parts as one feed; rows that do not lie one behind the other go through the host."""
        if not all(isinstance(part, DeviceRows) for part in parts):
            return np.concatenate(parts)
        first, last = parts[0], parts[-1]
        if all(a.value is b.value and a.stop == b.start for a, b in pairwise(parts)):
            return DeviceRows(first.value, first.dtype, first.lease, first.start, last.stop)
        return np.concatenate([part.numpy() for part in parts])

    def _run(self, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        plan = self._plan(feeds) if self._planned else None
        if plan is None:
            return self._run_unplanned(feeds, keep)
        for name, buffer in plan.arrays.items():
            buffer.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(plan.binding, plan.options)
        lease = _Lease()
        plan.lease = weakref.ref(lease)
        return {info.name: _result(info, plan.outputs[info.name], keep, lease) for info in self.outputs}

    def _plan(self, feeds: Mapping[str, Any]) -> _Plan | None:
        """Return a plan for such feeds that nobody has rows of, a new one if need be; None when there are too many."""
        key = tuple(
            (info.name, tuple(feed.shape), str(feed.dtype), feed.address if isinstance(feed, DeviceRows) else None)
            for info, feed in ((info, feeds[info.name]) for info in self.inputs)
        )
        free = next((plan for plan in self._plans[key] if plan.is_free), None)
        made = sum(map(len, self._plans.values()))
        if free is None and made < MAX_PLANS:
            free = self._make_plan(feeds, str(made + 1))
            self._plans[key].append(free)
        return free

    def _make_plan(self, feeds: Mapping[str, Any], graph: str) -> _Plan:
        plan = _Plan(self._session.io_binding(), self._options(graph))
        for info in self.inputs:
            feed = feeds[info.name]
            if isinstance(feed, DeviceRows):
                self._bind_rows(plan.binding, info.name, feed)
            else:
                plan.arrays[info.name] = self._allocate(feed.shape, feed.dtype)
                plan.binding.bind_ortvalue_input(info.name, plan.arrays[info.name])
        batch = len(feeds[self.inputs[0].name])
        for info in self.outputs:
            plan.outputs[info.name] = self._allocate((batch, *info.shape[1:]), np.dtype(info.dtype))
            plan.binding.bind_ortvalue_output(info.name, plan.outputs[info.name])
        return plan

    def _run_unplanned(self, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """Run with whatever shapes; ONNX Runtime allocates what comes out."""
        binding = self._session.io_binding()
        for info in self.inputs:
            feed = feeds[info.name]
            if isinstance(feed, DeviceRows):
                self._bind_rows(binding, info.name, feed)
            else:
                binding.bind_cpu_input(info.name, np.ascontiguousarray(feed))
        for info in self.outputs:
            binding.bind_output(info.name, self._device if info.name in keep else "cpu", 0)
        self._session.run_with_iobinding(binding, self._options(NO_GRAPH))
        values = binding.get_outputs()
        pairs = zip(self.outputs, values, strict=True)
        return {info.name: _result(info, value, keep, _Lease()) for info, value in pairs}

    def _bind_rows(self, binding: Any, name: str, rows: DeviceRows) -> None:
        binding.bind_input(name, self._device, 0, rows.dtype, list(rows.shape), rows.address)

    def _allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)

    def _options(self, graph: str) -> Any:
        """Return the options of a run; each plan replays the graph of its number."""
        if not self.graphs:
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry(GRAPH_KEY, graph)
        return options


def _result(info: TensorInfo, value: Any, keep: Collection[str], lease: _Lease) -> Any:
    return DeviceRows(value, np.dtype(info.dtype), lease) if info.name in keep else np.array(value.numpy())


def _is_static(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> bool:
    """Tell whether all shapes follow from the batch; a graph that is told its slots computes other shapes each time."""
    tensors = [*inputs, *outputs]
    batches = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    inner = [side for tensor in tensors for side in tensor.shape[1:]]
    return len(batches) == 1 and None not in batches and -1 not in inner and SLOTS not in {i.name for i in inputs}


def _require(available: Sequence[str], provider: str) -> None:
    if provider not in available:
        raise EnvironmentLackError(
            f"the installed onnxruntime has no {provider}, only {', '.join(available)}",
            code="provider-missing",
            expected="onnxruntime-gpu, built for this machine's CUDA",
            hint="pip uninstall onnxruntime, then pip install 'edgeprune[cuda]'; on a Jetson: NVIDIA's own wheel",
            details={"provider": provider, "available": list(available)},
        )


def _require_running(running: Sequence[str], provider: str, path: Path) -> None:
    """Refuse a session that fell back to another provider: ONNX Runtime only logs that."""
    if not running or running[0] != provider:
        raise EnvironmentLackError(
            f"ONNX Runtime could not load {provider} and would run {path} on {', '.join(running) or 'nothing'}",
            code="provider-missing",
            expected="the CUDA and cuDNN libraries that this onnxruntime-gpu was built for",
            hint="install the CUDA 12 or 13 and cuDNN 9 its release notes name, and look for what `ldd` misses in "
            "libonnxruntime_providers_cuda.so",
            details={"provider": provider, "running": list(running)},
        )
