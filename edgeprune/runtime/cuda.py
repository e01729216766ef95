"""The GPU behind the run time: finding one, and its memory, streams, events and graphs.

The only module of the run time that imports pycuda and cuda-python. Everything happens in the device's primary context,
which PyTorch uses too, and in streams that never wait for the default stream. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from edgeprune.errors import EdgepruneError, EnvironmentLackError, missing_package

EXTRA = "trt"
_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_SPIN_S = 0.002  # how long the host asks for an event before it sleeps on it


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        index: as CUDA counts.
        name: "Orin", "NVIDIA H100 80GB HBM3".
        compute_capability: (major, minor).
        total_bytes: of its memory.
        driver: newest CUDA the driver serves, "12.6"; None when it does not say.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    driver: str | None


def find_device(index: int = 0) -> Device:
    """Return a GPU as the driver describes it; needs no package.

    To be called before TensorRT is touched: without a device TensorRT 8.6 ends the process instead of raising.

    Raises:
        EnvironmentLackError: `gpu-missing` without a driver or such a device.
    """
    driver = _open_driver()
    answer = driver.cuInit(0)
    if answer:
        raise _gpu_missing(f"the CUDA driver finds no device: cuInit answers {answer}")
    count, handle = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if not 0 <= index < count.value or driver.cuDeviceGet(ctypes.byref(handle), index):
        raise _gpu_missing(f"there is no GPU {index}, but {count.value} in all")
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    capability = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(value.value)
    version = ctypes.c_int()
    unknown = driver.cuDriverGetVersion(ctypes.byref(version))
    served = None if unknown else f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Device(index, name.value.decode(errors="replace"), (capability[0], capability[1]), total.value, served)


def _open_driver() -> Any:
    for name in _LIBRARIES:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise _gpu_missing("there is no CUDA driver: libcuda.so.1 does not load")


def _gpu_missing(message: str) -> EnvironmentLackError:
    return EnvironmentLackError(
        message,
        code="gpu-missing",
        expected="an NVIDIA GPU with its driver",
        hint="nvidia-smi lists the GPUs; in a container: docker run --gpus all, on a Jetson --runtime nvidia",
    )


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of the device, freed with the object."""

    address: int
    nbytes: int


@dataclass(frozen=True)
class Stream:
    """A non-blocking stream; `raw` is PyCUDA's."""

    handle: int
    raw: Any


@dataclass(frozen=True)
class Mapped:
    """Host memory that the device writes into directly.

    Attributes:
        array: as the host sees it.
        address: as the device sees it.
    """

    array: np.ndarray
    address: int


class Graph:
    """Captured work, ready to be launched again at the same addresses."""

    def __init__(self, calls: _GraphCalls, executable: Any) -> None:
        self._calls, self._executable = calls, executable
        weakref.finalize(self, calls.destroy, executable)

    def launch(self, stream: Stream) -> None:
        """Launch it into a stream.

        Raises:
            EnvironmentLackError: `gpu-failed`.
        """
        self._calls.launch(self._executable, stream)


class CaptureFailed(Exception):
    """Work cannot be captured; it runs all the same when it is enqueued one by one."""


class Cuda:
    """A GPU through PyCUDA. Everything but making one stands in a `with` block, in any thread, also nested.

    Leaving the block turns what CUDA raises into errors that tell what to do.

    Args:
        index: of the device.

    Raises:
        EnvironmentLackError: `gpu-missing`; `package-missing` without PyCUDA.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = find_device(index)
        self._driver = _import_pycuda()
        self._driver.init()
        self._context = _primary_context(self._driver, index)
        self._graph_calls = _find_graph_calls()

    def __enter__(self) -> Cuda:
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.pop()
        if isinstance(error, self._driver.Error):
            raise _explain(error, self._driver) from error

    def stream(self) -> Stream:
        """Return a new stream."""
        raw = self._driver.Stream(_NON_BLOCKING)
        return Stream(int(raw.handle), raw)

    def event(self, *, timing: bool = False) -> Any:
        """Return an event for `record` and `wait`."""
        return self._driver.Event(0 if timing else self._driver.event_flags.DISABLE_TIMING)

    def record(self, event: Any, stream: Stream) -> None:
        """Mark the work a stream has been given so far."""
        event.record(stream.raw)

    def wait(self, event: Any) -> None:
        """Return when the work an event marks is done: asked in a loop at first, asleep when it takes longer."""
        until = perf_counter() + _SPIN_S
        while not event.query():
            if perf_counter() > until:
                event.synchronize()
                return

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two events with timing that are both done."""
        return float(start.time_till(end))

    def device_buffer(self, nbytes: int) -> Buffer:
        """Return memory of the device, at least one byte, aligned to 256.

        Raises:
            EnvironmentLackError: `gpu-out-of-memory`.
        """
        size = max(int(nbytes), 1)
        try:
            held = self._driver.mem_alloc(size)
        except self._driver.MemoryError as error:
            free, total = self._driver.mem_get_info()
            raise out_of_memory(
                f"no {size} bytes of memory on {self.device.name}: {free} of {total} are free", bytes=size, free=free
            ) from error
        buffer = Buffer(int(held), size)
        weakref.finalize(buffer, _free, self._context, held)
        return buffer

    def pinned(self, nbytes: int) -> np.ndarray:
        """Return page-locked bytes of the host, which copies need to be asynchronous."""
        return self._page_locked(nbytes, 0)

    def mapped(self, nbytes: int) -> Mapped:
        """Return page-locked bytes that the device can write into."""
        array = self._page_locked(nbytes, self._driver.host_alloc_flags.DEVICEMAP)
        return Mapped(array, int(array.base.get_device_pointer()))

    def _page_locked(self, nbytes: int, flags: int) -> Any:
        array = self._driver.pagelocked_empty(max(nbytes, 1), np.uint8, mem_flags=flags)
        weakref.finalize(array, _free, self._context, array.base)
        return array

    def to_device(self, address: int, array: np.ndarray, stream: Stream) -> None:
        """Copy a page-locked array to the device, when the stream gets there."""
        self._driver.memcpy_htod_async(address, array, stream.raw)

    def to_host(self, array: np.ndarray, address: int, stream: Stream) -> None:
        """Copy from the device into a page-locked array."""
        self._driver.memcpy_dtoh_async(array, address, stream.raw)

    def on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy from one place of the device to another."""
        self._driver.memcpy_dtod_async(target, source, nbytes, stream.raw)

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        """Write zeros."""
        self._driver.memset_d8_async(address, 0, nbytes, stream.raw)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """Return what `work` gives to a stream as a graph; nothing of it runs now.

        Other threads are not disturbed, whatever they do with the device meanwhile.

        Args:
            stream: has to be the only one that `work` uses.
            work: must not allocate or wait, and has to have run before.

        Raises:
            CaptureFailed: with the reason, an error of edgeprune or CUDA in `work` too, or that cuda-python is not
                installed.
        """
        calls = self._graph_calls
        if calls is None:
            raise CaptureFailed(f"the package 'cuda-python' is not installed: pip install 'edgeprune[{EXTRA}]'")
        with _no_collection():
            calls.begin(stream)
            try:
                work()
            except BaseException as error:
                with suppress(CaptureFailed):
                    calls.end(stream)
                if isinstance(error, (EdgepruneError, self._driver.Error)):
                    raise CaptureFailed(getattr(error, "message", str(error))) from error
                raise
            graph = calls.end(stream)
        return Graph(calls, calls.instantiate(graph))


class _GraphCalls:
    """The calls of cuda-python that PyCUDA lacks. They return a result and, after it, what they made."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        # cuGraphInstantiate had other arguments before CUDA 12, and cuGraphInstantiateWithFlags went with them
        self._instantiate = getattr(driver, "cuGraphInstantiateWithFlags", None) or driver.cuGraphInstantiate

    def begin(self, stream: Stream) -> None:
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._made(self._driver.cuStreamBeginCapture(self._driver.CUstream(stream.handle), mode))

    def end(self, stream: Stream) -> Any:
        return self._made(self._driver.cuStreamEndCapture(self._driver.CUstream(stream.handle)))

    def instantiate(self, graph: Any) -> Any:
        try:
            return self._made(self._instantiate(graph, 0))
        finally:
            self._driver.cuGraphDestroy(graph)

    def launch(self, executable: Any, stream: Stream) -> None:
        (result, *_) = self._driver.cuGraphLaunch(executable, self._driver.CUstream(stream.handle))
        if int(result):
            raise _failed(f"a CUDA graph does not start: {self._name(result)}")

    def destroy(self, executable: Any) -> None:
        self._driver.cuGraphExecDestroy(executable)

    def _made(self, answer: tuple[Any, ...]) -> Any:
        result, *made = answer
        if int(result):
            raise CaptureFailed(self._name(result))
        return made[0] if made else None

    def _name(self, result: Any) -> str:
        return getattr(result, "name", str(result))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running: memory of the device freed in the middle of a capture spoils it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_graph_calls() -> _GraphCalls | None:
    """Return the graph calls of cuda-python, whose modules moved in version 12.6; None without it."""
    try:
        from cuda.bindings import driver
    except ImportError:
        try:
            from cuda import cuda as driver
        except ImportError:
            return None
    return _GraphCalls(driver)


def _import_pycuda() -> Any:
    try:
        import pycuda.driver
    except ImportError as error:
        raise missing_package("pycuda", EXTRA, "running a TensorRT engine") from error
    return pycuda.driver


_lock = threading.Lock()
_contexts: dict[int, Any] = {}


def _primary_context(driver: Any, index: int) -> Any:
    """Return the primary context of a device, retained once and kept as long as the process lives."""
    with _lock:
        if index not in _contexts:
            _contexts[index] = driver.Device(index).retain_primary_context()
        return _contexts[index]


def _free(context: Any, held: Any) -> None:
    """Give memory back, from whatever thread the last reference went away in: PyCUDA itself would not."""
    context.push()
    try:
        held.free()
    finally:
        context.pop()


def out_of_memory(message: str, **details: Any) -> EnvironmentLackError:
    """Return the error `gpu-out-of-memory`."""
    return EnvironmentLackError(
        message,
        code="gpu-out-of-memory",
        hint="end other programs that use the GPU, or build for smaller batches: edgeprune build --batches 1",
        details=details,
    )


def _explain(error: BaseException, driver: Any) -> EnvironmentLackError:
    if isinstance(error, driver.MemoryError):
        return out_of_memory(f"the GPU has no memory left: {error}")
    return _failed(f"CUDA failed: {error}")


def _failed(message: str) -> EnvironmentLackError:
    return EnvironmentLackError(
        message, code="gpu-failed", hint="run it again in a new process; dmesg and nvidia-smi tell of a faulty device"
    )
