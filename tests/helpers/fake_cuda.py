"""A stand-in for CUDA without a device: libcuda as `ctypes` sees it, pycuda.driver, the driver calls of cuda-python.

Device memory is host memory. A stream runs at once, or, with `lazy`, only when somebody waits for it, as a device might
at worst. While a stream is captured its work is recorded and runs when the graph is launched. Names that the real
packages lack are refused; what a real device would punish raises, and what it would only be slow at is a complaint.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/tensorrt"
LAYOUTS = ("cuda.bindings.driver", "cuda.cuda")
ALIGNMENT = 256
OUT_OF_MEMORY, INVALID_CONTEXT, NO_DEVICE = 2, 201, 100
CAPTURE_MODES = ("GLOBAL", "THREAD_LOCAL", "RELAXED")


@dataclass
class Work:
    """Something a stream does. `about` tells a test what it was."""

    do: Callable[[], None]
    about: tuple[Any, ...] = ()


@dataclass
class FakeStream:
    """Work in order; `captured` takes it down instead, while the stream is captured by a thread."""

    waiting: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    capturing_thread: int | None = None
    broken: str | None = None  # what spoilt the capture


@dataclass
class Memory:
    """A live piece of memory; only a device sees memory that is not mapped."""

    start: int
    size: int
    kind: str  # "device", "pinned" or "mapped"
    buffer: np.ndarray = field(repr=False)


class FakeDevice:
    """One device and all that is on it.

    Args:
        lazy: streams run only when somebody waits for them.
        count: devices; with 0 there is a driver without any, with None there is no driver.
        total_bytes: of device memory.

    Attributes:
        complaints: what works and should not be done: default stream, pageable copies, waiting for a whole stream.
        initialised: somebody has asked the driver for a device.
        events: (name, detail) of what happened, in order, captures and launches too.
    """

    name = "NVIDIA Pretend GPU"
    capability = (8, 7)
    driver_version = 12060

    def __init__(self, *, lazy: bool = False, count: int | None = 1, total_bytes: int = 1 << 30) -> None:
        self.lazy, self.count, self.total_bytes = lazy, count, total_bytes
        self.initialised = False
        self.complaints: list[str] = []
        self.events: list[tuple[str, Any]] = []
        self.memory: dict[int, Memory] = {}
        self.streams: dict[int, FakeStream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.refuse_capture: str | None = None
        self._handles = itertools.count(0x1000, 0x10)
        self._contexts: dict[int, list[Any]] = {}
        self._lock = threading.RLock()

    # memory

    def allocate(self, size: int, kind: str) -> Memory:
        if size <= 0:
            raise CudaFailure("cuMemAlloc", "CUDA_ERROR_INVALID_VALUE")
        if kind == "device" and self.used_bytes() + size > self.total_bytes:
            raise CudaFailure("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")
        buffer = np.full(size + ALIGNMENT, 0xA5, np.uint8)  # so that nothing may count on zeros
        start = buffer.ctypes.data + -buffer.ctypes.data % ALIGNMENT
        held = Memory(start, size, kind, buffer)
        self.memory[start] = held
        return held

    def release(self, start: int) -> None:
        if self.memory.pop(start, None) is None:
            raise CudaFailure("cuMemFree", "CUDA_ERROR_INVALID_VALUE")

    def used_bytes(self) -> int:
        return sum(held.size for held in self.memory.values() if held.kind == "device")

    def find(self, address: int, size: int, *, by: str = "device") -> Memory:
        """Return the live memory a range lies in; refuse what a real device would fault at."""
        for held in list(self.memory.values()):
            if held.start <= address and address + size <= held.start + held.size:
                if by == "device" and held.kind == "pinned":
                    break
                return held
        raise CudaFailure("memory access", f"CUDA_ERROR_ILLEGAL_ADDRESS: {size} bytes at {address:#x}")

    def view(self, address: int, size: int) -> np.ndarray:
        """Return bytes that a kernel may read and write."""
        self.find(address, size)
        return host_view(address, size)

    # streams

    def enqueue(self, handle: int, work: Work) -> None:
        """Give work to a stream, or take it down while the stream is captured."""
        if handle == 0:
            self.complaints.append(f"default stream: {work.about}")
            self.flush()
            work.do()
            return
        stream = self.stream(handle)
        if stream.captured is not None:
            if stream.capturing_thread != threading.get_ident():
                stream.broken = "work from another thread"
            stream.captured.append(work)
            return
        stream.waiting.append(work)
        if not self.lazy:
            self.flush(handle)

    def stream(self, handle: int) -> FakeStream:
        if handle not in self.streams:
            raise CudaFailure("stream", "CUDA_ERROR_INVALID_HANDLE")
        return self.streams[handle]

    def capturing(self, handle: int) -> bool:
        return handle in self.streams and self.streams[handle].captured is not None

    def flush(self, handle: int | None = None) -> None:
        """Run what waits in a stream, or in all."""
        with self._lock:
            for stream in [self.streams[handle]] if handle is not None else list(self.streams.values()):
                while stream.waiting:
                    stream.waiting.pop(0).do()

    def forbid_in_capture(self, what: str) -> None:
        """Spoil captures of this thread, as thread-local capture does for calls that could wait."""
        for stream in self.streams.values():
            if stream.captured is not None and stream.capturing_thread == threading.get_ident():
                stream.broken = what
                raise CudaFailure(what, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    # contexts

    def contexts(self) -> list[Any]:
        return self._contexts.setdefault(threading.get_ident(), [])

    def current(self) -> Any:
        if not self.contexts():
            raise CudaFailure("context", "CUDA_ERROR_INVALID_CONTEXT: no context is current in this thread")
        return self.contexts()[-1]

    def left_pushed(self) -> int:
        """Return how many contexts are pushed in any thread; PyCUDA aborts the process when such a thread ends."""
        return sum(map(len, self._contexts.values()))

    def handle(self) -> int:
        return next(self._handles)


class CudaFailure(Exception):
    """What a driver call answered; becomes the package's own exception or result."""

    def __init__(self, call: str, result: str) -> None:
        super().__init__(f"{call} failed: {result}")
        self.call, self.result = call, result.partition(":")[0]


def host_view(address: int, size: int) -> np.ndarray:
    """Return the bytes at an address of this process."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def surface(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"surface-{name}.json").read_text())


def restricted(implementation: type, names: list[str], name: str, base: type = object) -> type:
    """Return a class with just these public attributes; one that is not implemented says so when it is used."""
    held: dict[str, Any] = {
        key: value
        for one in reversed(implementation.__mro__[:-1])
        for key, value in vars(one).items()
        if key.startswith("_") and key not in ("__dict__", "__weakref__", "__doc__")
    }
    for key in names:
        found = next((vars(one)[key] for one in implementation.__mro__ if key in vars(one)), None)
        held[key] = _Lacking(name, key) if found is None else found

    def set_attribute(self: Any, key: str, value: Any) -> None:
        if type(self) is made and not key.startswith("_") and not hasattr(type(self), key):
            raise AttributeError(f"'{name}' object has no attribute '{key}'")
        object.__setattr__(self, key, value)

    held["__setattr__"] = set_attribute
    made = type(name, (base,), held)
    return made


class _Lacking:
    """An attribute that exists in the real package, and not here."""

    def __init__(self, owner: str, name: str) -> None:
        self.words = f"the stand-in for {owner} lacks '{name}', which the real one has: add it when it is needed"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        raise NotImplementedError(self.words)


# pycuda.driver


def make_pycuda(device: FakeDevice) -> ModuleType:
    """Return a stand-in for pycuda.driver on a device."""
    names = surface("cuda")
    module = ModuleType("pycuda.driver")
    module.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]
    for one in names["exceptions"]:
        if one != "Error":
            setattr(module, one, type(one, (module.Error,), {}))

    def translate(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            try:
                return call(*args, **options)
            except CudaFailure as failure:
                kind = {"CUDA_ERROR_OUT_OF_MEMORY": "MemoryError", "CUDA_ERROR_LAUNCH_FAILED": "LaunchError"}
                kind |= {"CUDA_ERROR_NO_DEVICE": "RuntimeError"}
                raise getattr(module, kind.get(failure.result, "LogicError"))(str(failure)) from None

        return called

    def wrap(implementation: type) -> type:
        held = dict(vars(implementation))
        for key, value in held.items():
            if key in ("__dict__", "__weakref__"):
                continue
            if isinstance(value, staticmethod):
                setattr(implementation, key, staticmethod(translate(value.__func__)))
            elif callable(value):
                setattr(implementation, key, translate(value))
        return implementation

    class Device:
        def __init__(self, ordinal: int) -> None:
            if not device.initialised:
                raise CudaFailure("cuDeviceGet", "CUDA_ERROR_NOT_INITIALIZED")
            if not 0 <= ordinal < (device.count or 0):
                raise CudaFailure("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE")
            self._ordinal = ordinal

        @staticmethod
        def count() -> int:
            return device.count or 0

        def name(self) -> str:
            return device.name

        def compute_capability(self) -> tuple[int, int]:
            return device.capability

        def total_memory(self) -> int:
            return device.total_bytes

        def retain_primary_context(self) -> Any:
            return classes["Context"](self._ordinal)

    class Context:
        def __init__(self, ordinal: int) -> None:
            self._ordinal = ordinal

        def push(self) -> None:
            device.contexts().append(self)

        @staticmethod
        def pop() -> None:
            if not device.contexts():
                raise CudaFailure("context::pop", "CUDA_ERROR_INVALID_CONTEXT")
            device.contexts().pop()

        @staticmethod
        def get_current() -> Any:
            return device.contexts()[-1] if device.contexts() else None

        @staticmethod
        def synchronize() -> None:
            device.current()
            device.forbid_in_capture("cuCtxSynchronize")
            device.complaints.append("waits for the whole device")
            device.flush()

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            self._context = device.current()
            if flags != 1:
                device.complaints.append("a stream that waits for the default stream")
            self._handle = device.handle()
            device.streams[self._handle] = FakeStream()

        handle = property(lambda self: self._handle)

        def synchronize(self) -> None:
            device.current()
            device.forbid_in_capture("cuStreamSynchronize")
            device.events.append(("synchronize", self._handle))
            device.flush(self._handle)

        def is_done(self) -> bool:
            return not device.stream(self._handle).waiting

        def wait_for_event(self, event: Any) -> None:
            device.enqueue(self._handle, Work(lambda: device.flush(event._stream), ("wait", self._handle)))

    class Event:
        def __init__(self, flags: int = 0) -> None:
            device.current()
            self._flags, self._stream, self._done, self._polls = flags, 0, True, 0
            self._marks = 0

        def record(self, stream: Any = None) -> Any:
            device.current()
            handle = _handle_of(stream)
            if device.capturing(handle):
                device.stream(handle).broken = "an event was recorded"
                return self
            self._stream, self._marks = handle, self._marks + 1
            mark, self._done, self._polls = self._marks, False, 0

            def reach() -> None:
                self._done = self._done or mark == self._marks

            device.enqueue(handle, Work(reach, ("event", handle)))
            return self

        def query(self) -> bool:
            device.current()
            self._polls += 1
            if not self._done and self._polls > 1:  # the first answer of a lazy device is always no
                device.flush(self._stream)
            return self._done

        def synchronize(self) -> Any:
            device.current()
            device.forbid_in_capture("cuEventSynchronize")
            device.events.append(("event-synchronize", self._stream))
            if not self._done:
                device.flush(self._stream)
            return self

        def time_since(self, event: Any) -> float:
            return 0.25

        def time_till(self, event: Any) -> float:
            return 0.25

    class DeviceAllocation:
        def __init__(self, size: int) -> None:
            device.current()
            device.forbid_in_capture("cuMemAlloc")
            self._memory = device.allocate(int(size), "device")

        def __int__(self) -> int:
            return self._memory.start

        def __index__(self) -> int:
            return self._memory.start

        def free(self) -> None:
            device.current()
            device.forbid_in_capture("cuMemFree")
            device.flush()
            device.release(self._memory.start)

    class PagelockedHostAllocation:
        def __init__(self, shape: Any, dtype: Any, mem_flags: int) -> None:
            device.current()
            device.forbid_in_capture("cuMemHostAlloc")
            sides = (shape,) if isinstance(shape, int) else tuple(shape)
            size = int(np.prod(sides)) * np.dtype(dtype).itemsize
            mapped = bool(mem_flags & module.host_alloc_flags.DEVICEMAP)
            self._memory = device.allocate(max(size, 1), "mapped" if mapped else "pinned")
            self.__array_interface__ = {
                "shape": sides,
                "typestr": np.dtype(dtype).str,
                "data": (self._memory.start, False),
                "version": 3,
            }

        def get_device_pointer(self) -> int:
            if self._memory.kind != "mapped":
                raise CudaFailure("cuMemHostGetDevicePointer", "CUDA_ERROR_INVALID_VALUE")
            return self._memory.start

        def free(self) -> None:
            device.current()
            device.forbid_in_capture("cuMemFree")
            device.flush()
            device.release(self._memory.start)

    implementations = [Device, Context, Stream, Event, DeviceAllocation, PagelockedHostAllocation]
    classes = {
        one.__name__: restricted(
            wrap(one), names[f"class {one.__name__}"] + ["get_device_pointer"] * (one is PagelockedHostAllocation), name
        )
        for one, name in ((one, one.__name__) for one in implementations)
    }

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        return np.asarray(classes["PagelockedHostAllocation"](shape, dtype, mem_flags))

    def init(flags: int = 0) -> None:
        if not device.count:
            raise CudaFailure("cuInit", "CUDA_ERROR_NO_DEVICE")
        device.initialised = True

    def copy(handle: int, about: tuple[Any, ...], target: np.ndarray, source: np.ndarray) -> None:
        def do() -> None:
            target[:] = source

        device.enqueue(handle, Work(do, about))

    def host_bytes(array: Any, what: str) -> np.ndarray:
        found = np.asarray(array)
        if not (found.flags.c_contiguous or found.flags.f_contiguous):
            raise ValueError("ndarray is not contiguous")
        address = found.__array_interface__["data"][0]
        try:
            device.find(address, found.nbytes, by="host")
        except CudaFailure:
            device.complaints.append(f"pageable memory: {what}")
        return host_view(address, found.nbytes) if found.nbytes else np.empty(0, np.uint8)

    def memcpy_htod_async(dest: Any, src: Any, stream: Any = None) -> None:
        device.current()
        source = host_bytes(src, "host to device")
        about = ("h2d", source.__array_interface__["data"][0], int(dest), source.size)
        copy(_handle_of(stream), about, device.view(int(dest), source.size), source)

    def memcpy_dtoh_async(dest: Any, src: Any, stream: Any = None) -> None:
        device.current()
        target = host_bytes(dest, "device to host")
        about = ("d2h", int(src), target.__array_interface__["data"][0], target.size)
        copy(_handle_of(stream), about, target, device.view(int(src), target.size))

    def memcpy_dtod_async(dest: Any, src: Any, size: int, stream: Any = None) -> None:
        device.current()
        about = ("d2d", int(src), int(dest), size)
        copy(_handle_of(stream), about, device.view(int(dest), size), device.view(int(src), size))

    def memset_d8_async(dest: Any, data: int, size: int, stream: Any = None) -> None:
        device.current()
        copy(_handle_of(stream), ("memset", int(dest), size), device.view(int(dest), size), np.uint8(data))

    def synchronous(what: str, call: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            device.forbid_in_capture(what)
            device.complaints.append(f"a copy that waits: {what}")
            call(*args)
            device.flush()

        return called

    def mem_get_info() -> tuple[int, int]:
        device.current()
        return device.total_bytes - device.used_bytes(), device.total_bytes

    functions: dict[str, Callable[..., Any]] = {
        "init": init,
        "get_version": lambda: (12, 6, 0),
        "get_driver_version": lambda: device.driver_version,
        "mem_alloc": lambda size: classes["DeviceAllocation"](size),
        "mem_get_info": mem_get_info,
        "pagelocked_empty": pagelocked_empty,
        "memcpy_htod_async": memcpy_htod_async,
        "memcpy_dtoh_async": memcpy_dtoh_async,
        "memcpy_dtod_async": memcpy_dtod_async,
        "memset_d8_async": memset_d8_async,
        "memcpy_htod": synchronous("memcpy_htod", lambda *a: memcpy_htod_async(*a)),
        "memcpy_dtoh": synchronous("memcpy_dtoh", lambda *a: memcpy_dtoh_async(*a)),
        "memcpy_dtod": synchronous("memcpy_dtod", lambda *a: memcpy_dtod_async(*a)),
    }
    for one, call in functions.items():
        if one in names["functions"]:
            setattr(module, one, translate(call))
    for one, found in classes.items():
        setattr(module, one, found)
    flags = {
        "host_alloc_flags": {"PORTABLE": 1, "DEVICEMAP": 2, "WRITECOMBINED": 4},
        "event_flags": {"DEFAULT": 0, "BLOCKING_SYNC": 1, "DISABLE_TIMING": 2, "INTERPROCESS": 4},
    }
    for one, values in flags.items():
        assert sorted(values) == names[f"class {one}"]
        setattr(module, one, SimpleNamespace(**values))
    return module


def _handle_of(stream: Any) -> int:
    return 0 if stream is None else stream.handle


# cuda-python


class _Handle:
    """CUstream, CUgraph, CUgraphExec: a number."""

    def __init__(self, init_value: int = 0) -> None:
        self._value = init_value

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


def make_driver(device: FakeDevice, layout: str = LAYOUTS[0]) -> ModuleType:
    """Return a stand-in for the driver module of cuda-python, in the layout of a version."""
    names = surface("cuda")[f"module {layout}"]
    module = ModuleType(layout)
    codes = {"CUDA_SUCCESS": 0, "CUDA_ERROR_INVALID_VALUE": 1, "CUDA_ERROR_OUT_OF_MEMORY": 2}
    codes |= {one: 1000 + i for i, one in enumerate(names["CUresult"]) if one not in codes}
    result = enum.IntEnum("CUresult", codes)  # type: ignore[misc]
    mode = enum.IntEnum("CUstreamCaptureMode", {f"CU_STREAM_CAPTURE_MODE_{m}": i for i, m in enumerate(CAPTURE_MODES)})
    kinds = {one: type(one, (_Handle,), {}) for one in ("CUstream", "CUgraph", "CUgraphExec")}
    ok = result["CUDA_SUCCESS"]
    executables: dict[int, list[Work]] = {}

    def answer(call: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def called(*args: Any) -> tuple[Any, ...]:
            try:
                device.current()
                found = call(*args)
            except CudaFailure as failure:
                return (result[failure.result], None)
            return (ok,) if found is None else (ok, found)

        return called

    def begin(stream: Any, how: Any) -> None:
        if not isinstance(how, mode):
            raise TypeError("Argument 'mode' is not instance of type CUstreamCaptureMode")
        if how != mode["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"]:
            device.complaints.append(f"capture in mode {how.name} disturbs other threads")
        held = device.stream(int(stream))
        if held.captured is not None:
            raise CudaFailure("cuStreamBeginCapture", "CUDA_ERROR_ILLEGAL_STATE")
        held.captured, held.capturing_thread, held.broken = [], threading.get_ident(), device.refuse_capture

    def end(stream: Any) -> Any:
        held = device.stream(int(stream))
        if held.captured is None:
            raise CudaFailure("cuStreamEndCapture", "CUDA_ERROR_ILLEGAL_STATE")
        work, held.captured = held.captured, None
        if held.capturing_thread != threading.get_ident():
            raise CudaFailure("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD")
        if held.broken:
            raise CudaFailure("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        graph = device.handle()
        device.graphs[graph] = work
        device.events.append(("captured", [one.about for one in work]))
        return kinds["CUgraph"](graph)

    def instantiate(graph: Any, flags: int) -> Any:
        if flags:
            raise CudaFailure("cuGraphInstantiate", "CUDA_ERROR_INVALID_VALUE")
        executable = device.handle()
        executables[executable] = device.graphs[int(graph)]
        return kinds["CUgraphExec"](executable)

    def launch(executable: Any, stream: Any) -> None:
        if int(executable) not in executables:
            raise CudaFailure("cuGraphLaunch", "CUDA_ERROR_INVALID_VALUE")
        device.events.append(("launched", int(executable)))
        for work in executables[int(executable)]:
            device.enqueue(int(stream), work)

    def name_of(error: Any) -> tuple[Any, bytes]:
        return ok, result(error).name.encode()

    calls: dict[str, Callable[..., Any]] = {
        "cuStreamBeginCapture": answer(begin),
        "cuStreamEndCapture": answer(end),
        "cuGraphInstantiate": answer(instantiate),
        "cuGraphInstantiateWithFlags": answer(instantiate),
        "cuGraphLaunch": answer(launch),
        "cuGraphUpload": answer(lambda executable, stream: None),
        "cuGraphExecDestroy": answer(lambda executable: executables.pop(int(executable)) and None),
        "cuGraphDestroy": answer(lambda graph: device.graphs.pop(int(graph)) and None),
        "cuGetErrorName": name_of,
        "CUresult": result,
        "CUstreamCaptureMode": mode,
        **kinds,
    }
    if layout == "cuda.cuda":  # cuda-python 11: cuGraphInstantiate(graph, log buffer, its size)
        calls["cuGraphInstantiate"] = answer(lambda graph, buffer, size: instantiate(graph, 0))
    for one, held in calls.items():
        if one in names:
            setattr(module, one, held)
    return module


# libcuda


class FakeLibcuda:
    """The calls of libcuda that find a device, as `ctypes` makes them."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def cuInit(self, flags: int) -> int:
        if not self._device.count:
            return NO_DEVICE
        self._device.initialised = True
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._device.count
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = ordinal
        return 0 if ordinal < (self._device.count or 0) else 101

    def cuDeviceGetName(self, buffer: Any, size: int, handle: Any) -> int:
        buffer.value = self._device.name.encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = dict(zip((75, 76), self._device.capability, strict=True))[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, handle: Any) -> int:
        size._obj.value = self._device.total_bytes
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._device.driver_version
        return 0


def install_cuda(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, *, layout: str | None = LAYOUTS[0]) -> None:
    """Put the stand-ins where `import` and `ctypes.CDLL("libcuda.so.1")` find them.

    Args:
        device: what is there.
        monkeypatch: takes it all back.
        layout: of cuda-python; None leaves it out.
    """
    real = ctypes.CDLL

    def load(name: Any, *args: Any, **options: Any) -> Any:
        if str(name).startswith("libcuda.so"):
            if device.count is None:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return FakeLibcuda(device)
        return real(name, *args, **options)

    monkeypatch.setattr(ctypes, "CDLL", load)
    package, driver = ModuleType("pycuda"), make_pycuda(device)
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr("edgeprune.runtime.cuda._contexts", {})
    for one in ("cuda", "cuda.bindings", *LAYOUTS):
        monkeypatch.setitem(sys.modules, one, None)
    if layout is None:
        return
    parts = layout.split(".")
    parent: ModuleType | None = None
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        module = make_driver(device, layout) if name == layout else ModuleType(name)
        if name != layout:
            module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        if parent is not None:
            setattr(parent, parts[i - 1], module)
        parent = module
