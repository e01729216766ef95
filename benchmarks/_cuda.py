"""The CUDA driver through ctypes: memory, streams, graphs and events, without torch or the CUDA runtime library.

It shares the device's primary context with everything that uses the CUDA runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

LIBRARY = "libcuda.so.1"
MULTIPROCESSORS, L2_BYTES, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 38, 75, 76  # CUdevice_attribute
THREAD_LOCAL_CAPTURE = 1  # CUstreamCaptureMode
NON_BLOCKING = 1  # CUstream_flags
EMPTY_KERNEL = b".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry empty() { ret; }\n"


class CudaError(RuntimeError):
    """There is no device, or the driver reports an error."""


@dataclass(frozen=True)
class Graph:
    """A captured graph: how to launch it on the stream it was captured from, and of how many nodes it is."""

    launch: Callable[[], None]
    nodes: int


class Device:
    """The first CUDA device, its primary context current on this thread."""

    def __init__(self) -> None:
        """Open the device.

        Raises:
            CudaError: there is no driver or no device.
        """
        try:
            self._driver = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CudaError(f"no CUDA device: {LIBRARY} cannot be loaded") from error
        self._call("cuInit", 0)
        count, self._device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise CudaError("no CUDA device: the driver finds none")
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    @property
    def name(self) -> str:
        """As the driver names it."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def architecture(self) -> str:
        """As nvcc names it, such as sm_87."""
        return f"sm_{self._attribute(CAPABILITY_MAJOR)}{self._attribute(CAPABILITY_MINOR)}"

    @property
    def multiprocessors(self) -> int:
        """Their number."""
        return self._attribute(MULTIPROCESSORS)

    @property
    def l2_bytes(self) -> int:
        """Size of the second-level cache."""
        return self._attribute(L2_BYTES)

    @property
    def driver_version(self) -> str:
        """The CUDA version the driver serves, such as 13.0."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    @contextmanager
    def memory(self, size: int) -> Iterator[int]:
        """Return the address of `size` bytes, freed on leaving."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        try:
            yield address.value
        finally:
            self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device and wait: streams of their own do not."""
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, size)
        self.synchronize()

    def download(self, address: int, array: np.ndarray) -> None:
        """Fill a contiguous array from the device, after all work."""
        self.synchronize()
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), size)

    def fill(self, address: int, byte: int, size: int) -> None:
        """Set `size` bytes and wait."""
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))
        self.synchronize()

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy within the device."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            *(ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(stream)),
        )

    def synchronize(self) -> None:
        """Wait for everything; raises what a kernel did wrong."""
        self._call("cuCtxSynchronize")

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Return a stream of its own, destroyed on leaving."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        try:
            yield stream.value or 0
        finally:
            self._call("cuStreamDestroy_v2", stream)

    @contextmanager
    def graph(self, stream: int, work: Callable[[], Any]) -> Iterator[Graph]:
        """Capture what `work` enqueues on the stream."""
        handle, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", handle, THREAD_LOCAL_CAPTURE)
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        nodes = ctypes.c_size_t()
        self._call("cuGraphGetNodes", graph, None, ctypes.byref(nodes))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        try:
            yield Graph(lambda: self._call("cuGraphLaunch", executable, handle), nodes.value)
        finally:
            self._call("cuGraphExecDestroy", executable)

    def empty_kernel(self, stream: int) -> Callable[[], None]:
        """Return a function that launches a kernel of one thread that does nothing."""
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(EMPTY_KERNEL))
        self._call("cuModuleGetFunction", ctypes.byref(kernel), module, ctypes.c_char_p(b"empty"))
        return lambda: self._call("cuLaunchKernel", kernel, *[1] * 6, 0, ctypes.c_void_p(stream), None, None)

    @contextmanager
    def stopwatch(self, stream: int) -> Iterator[Callable[[Callable[[], Any]], float]]:
        """Return a function that runs work on the stream and returns the milliseconds between its two events."""
        start, end, handle = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(stream)
        for event in (start, end):
            self._call("cuEventCreate", ctypes.byref(event), 0)

        def measure(work: Callable[[], Any]) -> float:
            self._call("cuEventRecord", start, handle)
            work()
            self._call("cuEventRecord", end, handle)
            self._call("cuEventSynchronize", end)
            elapsed = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
            return elapsed.value

        try:
            yield measure
        finally:
            for event in (start, end):
                self._call("cuEventDestroy_v2", event)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
