"""One graph of a bundle on TensorRT: a context and CUDA graphs per profile, fixed addresses, nothing waited for twice.

Host arrays go to the device through page-locked memory and come back through it. Small integers, such as the token
count a router reads, are written by the engine into mapped memory, so that no copy stands between them and the host.
What is only handed on stays on the device as `EngineRows`.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EdgepruneWarning, InputError
from edgeprune.runtime.cuda import Buffer, CaptureFailed, Graph, Mapped
from edgeprune.runtime.engine_rows import EngineRows, Lease, Piece, join_rows, storage
from edgeprune.runtime.engines import ProfileInfo
from edgeprune.runtime.manifest import GraphInfo, TensorInfo
from edgeprune.runtime.router import COUNT, IMAGES, SLOTS
from edgeprune.runtime.timing import DeviceTimer, LayerLog

if TYPE_CHECKING:
    from edgeprune.runtime.trt import Gpu

MAPPED_BYTES = 4096  # integers up to this size are written to the host directly
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_FROM_HOST, _ON_DEVICE = "host", "device"  # where an input is before a run: in staging memory, or in its own buffer
_Key = tuple[tuple[str | int, ...], int, frozenset[str]]


@dataclass(frozen=True)
class _Port:
    """An input or output; -1 marks a side that a profile decides, `kind` is the type its elements have in numpy."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: np.dtype[Any]


class EngineProfile:
    """An execution context for one profile of an engine, bound to one shape for good.

    Args:
        gpu: shared with other engines.
        engine: TensorRT's.
        number: of the profile.
        info: what the profile is for.

    Attributes:
        shapes, sizes: of every tensor on the device; sizes in bytes.
        rows: images, as the engine says; None when no side depends on the profile.
        graphs: captured runs, by where inputs and outputs lie.

    Raises:
        EnvironmentLackError: `gpu-out-of-memory`, `engine-run-failed`.
    """

    def __init__(self, gpu: Gpu, engine: Any, number: int, info: ProfileInfo) -> None:
        self.gpu, self.info, self._number = gpu, info, number
        self.graphs: dict[_Key, Graph] = {}
        self.inputs, self.outputs, told = _ports(gpu.trt, engine)
        self._engine, self._context = engine, gpu.context(engine)
        if self._context.active_optimization_profile != number:
            self._want(self._context.set_optimization_profile_async(number, gpu.stream.handle), f"profile {number}")
        self._slots = np.array(info.slots or [], told.dtype if told is not None else np.int64)
        if told is not None:  # read on the host whenever the engine is enqueued
            self._want(self._context.set_tensor_address(told.name, self._slots.ctypes.data), told.name)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rows: int | None = None
        for port in self.inputs:
            self.shapes[port.name] = port.shape
            if -1 in port.shape:
                _, shape, _ = engine.get_tensor_profile_shape(port.name, number)
                self.shapes[port.name] = tuple(shape)
                self.rows = self.shapes[port.name][0]
                self._want(self._context.set_input_shape(port.name, self.shapes[port.name]), port.name)
        lacking = self._context.infer_shapes()
        if lacking:
            raise gpu.failure(f"TensorRT does not know the shapes of {', '.join(lacking)} of '{info.graph}'")
        for port in self.outputs:
            self.shapes[port.name] = tuple(self._context.get_tensor_shape(port.name))
            if -1 in self.shapes[port.name]:
                raise gpu.failure(f"the size of the output {port.name} is not known before a run")
        self.sizes = {
            port.name: math.prod(self.shapes[port.name]) * port.kind.itemsize for port in (*self.inputs, *self.outputs)
        }
        gpu.share_scratch(self, _scratch_bytes(engine))

    def take_scratch(self, scratch: Buffer) -> None:
        """Use another block of scratch memory; graphs know the old one and go."""
        self.graphs.clear()
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(scratch.address, scratch.nbytes)
        else:
            self._context.device_memory = scratch.address

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Give a run to the stream.

        Raises:
            EnvironmentLackError: `engine-run-failed`, `gpu-out-of-memory`.
        """
        for name, address in addresses.items():
            self._want(self._context.set_tensor_address(name, address), f"the address of {name}")
        self.gpu.logger.errors.clear()
        if not self._context.execute_async_v3(self.gpu.stream.handle):
            raise self.gpu.failure(f"TensorRT does not run '{self.info.graph}'", graph=self.info.graph)

    def time_layers(self) -> LayerLog:
        """Return a log that every run adds the times of its layers to, from now on; graphs would not, and go."""
        inspector = self._engine.create_engine_inspector()
        log = LayerLog(str(inspector.get_engine_information(self.gpu.trt.LayerInformationFormat.JSON)), self._number)
        self._profiler = self._context.profiler = self.gpu.profiler(log)
        self.graphs.clear()
        return log

    def _want(self, done: bool, what: str) -> None:
        if not done:
            raise self.gpu.failure(f"TensorRT refuses {what} of '{self.info.graph}'")


@dataclass
class _Outputs:
    """Buffers for the outputs of a run, by name; taken while somebody holds the lease."""

    buffers: dict[str, Buffer]
    lease: weakref.ref[Lease] | None = None

    @property
    def free(self) -> bool:
        return self.lease is None or self.lease() is None


@dataclass
class _HostSide:
    """Page-locked memory of the largest profile by name, made when it is first needed, and parts of it as arrays."""

    staging: dict[str, np.ndarray] = field(default_factory=dict)
    landing: dict[str, np.ndarray] = field(default_factory=dict)
    mapped: dict[str, Mapped] = field(default_factory=dict)
    views: dict[tuple[EngineProfile, str, bool], np.ndarray] = field(default_factory=dict)

    def view(self, profile: EngineProfile, port: _Port, memory: np.ndarray, *, direct: bool = False) -> np.ndarray:
        """Return the memory of an input or output as an array of the profile's shape; `direct` when it is mapped."""
        key = (profile, port.name, direct)
        if key not in self.views:
            part = memory[: profile.sizes[port.name]].view(port.kind)
            self.views[key] = part.reshape(profile.shapes[port.name])
        return self.views[key]


class EngineBackend:
    """A graph on one or several engines, as `Backend` of the router; several threads may call it.

    Args:
        gpu: shared with the other graphs of the bundle, one of which runs at a time.
        graph: its name.
        profiles: for the batches, and slots, it can run.
        info: what the manifest says of it: the order of inputs and outputs, and whether a caller tells the slots.
        kept: outputs that other graphs read, to capture the usual run beforehand.

    Attributes:
        inputs, outputs: as the engine has them; a batch of -1 takes any.
        timer: told what every run takes on the device, copies included, when there is one.

    Raises:
        EnvironmentLackError: `gpu-out-of-memory`, `engine-run-failed`.
    """

    def __init__(
        self, gpu: Gpu, graph: str, profiles: Sequence[EngineProfile], info: GraphInfo, kept: Collection[str] = ()
    ) -> None:
        self._gpu, self._graph = gpu, graph
        self._profiles = sorted(profiles, key=lambda profile: profile.info.batch)
        self._told = any(tensor.name == SLOTS for tensor in info.inputs)
        self._in = _ordered(self._profiles[0].inputs, info.inputs)
        self._out = _ordered(self._profiles[0].outputs, info.outputs)
        self.inputs = [self._describe(port) for port in self._in]
        if self._told:
            stages = len(self._profiles[0].info.slots or [])
            at = [tensor.name for tensor in info.inputs].index(SLOTS)
            self.inputs.insert(at, TensorInfo(name=SLOTS, dtype="int64", shape=[stages]))
        self.outputs = [self._describe(port) for port in self._out]
        integers = [port for port in self._out if port.dtype in ("int32", "int64")]
        self._small = {port.name for port in integers if self._most(port) <= MAPPED_BYTES}
        self._host, self._sets = _HostSide(), list[_Outputs]()
        self._own = {port.name: self._buffer(port) for port in self._in}
        self._done = gpu.cuda.event()
        self.timer: DeviceTimer | None = None
        self._marks: tuple[Any, Any] | None = None
        self._prepare(frozenset(kept))

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Return every output by name: arrays, and `EngineRows` for outputs in `keep`.

        A batch runs in the smallest profile that holds it, filled up with its last image; a larger one than any runs
        in several turns. A bfloat16 array is an array of its bits, uint16.

        Raises:
            InputError: `slots` when no engine was built for them.
            EnvironmentLackError: `engine-run-failed`, `gpu-failed`, `gpu-out-of-memory`.
        """
        slots = tuple(int(n) for n in feeds[SLOTS]) if self._told else None
        profiles = [p for p in self._profiles if slots is None or tuple(p.info.slots or ()) == slots]
        if not profiles:
            built = sorted({str(profile.info.slots) for profile in self._profiles})
            raise InputError(
                f"no engine of '{self._graph}' was built for the slots {list(slots or ())}",
                code="slots",
                expected=f"one of {', '.join(built)}",
                hint="build the engines again: edgeprune build",
            )
        count = len(feeds[self._in[0].name])
        with self._gpu.lock, self._gpu.cuda:
            turns = [self._turn(profile, feeds, at, n, keep) for profile, at, n in self._turns(profiles, count)]
        if len(turns) == 1:
            return turns[0]
        return {name: self.join([turn[name] for turn in turns]) for name in turns[0]}

    def join(self, parts: Sequence[Any]) -> Any:
        """Return some parts as one feed: rows of the device together, or arrays as an array."""
        if isinstance(parts[0], EngineRows):
            return join_rows(parts)
        return np.concatenate(parts)

    def time_layers(self) -> list[LayerLog]:
        """Return a log per profile that runs add the times of their layers to, from now on.

        They wait for every layer then, and no engine of this device's bundle runs as a CUDA graph any more.
        """
        with self._gpu.lock, self._gpu.cuda:
            self._gpu.graphs = False
            return [profile.time_layers() for profile in self._profiles]

    def _turns(self, profiles: Sequence[EngineProfile], count: int) -> Iterator[tuple[EngineProfile, int, int]]:
        """Yield (profile, first image, images) until all have run."""
        largest = profiles[-1].info.batch
        for at in range(0, count, largest):
            n = min(count - at, largest)
            yield next(profile for profile in profiles if profile.info.batch >= n), at, n

    def _turn(
        self, profile: EngineProfile, feeds: Mapping[str, Any], at: int, count: int, keep: Collection[str]
    ) -> dict[str, Any]:
        """Run one profile on some of the images."""
        places = tuple(self._bring(profile, port, feeds[port.name][at : at + count]) for port in self._in)
        number = next((i for i, outputs in enumerate(self._sets) if outputs.free), None)
        number = self._add_outputs() if number is None else number
        key = (places, number, frozenset(port.name for port in self._out if port.name not in keep))
        self._launch(profile, key)
        lease = Lease(self._sets[number].buffers)
        self._sets[number].lease = weakref.ref(lease)
        return {port.name: self._collect(profile, port, key, count, lease) for port in self._out}

    def _launch(self, profile: EngineProfile, key: _Key) -> None:
        """Run what a key says, and wait for it; the second time as a CUDA graph."""
        graph = profile.graphs.get(key)
        cuda, stream, timed = self._gpu.cuda, self._gpu.stream, self.timer is not None
        if timed and self._marks is None:
            self._marks = (cuda.event(timing=True), cuda.event(timing=True))
        begin, end = self._marks if timed and self._marks is not None else (None, self._done)
        start_s = perf_counter()
        if begin is not None:
            cuda.record(begin, stream)
        if graph is None:
            self._enqueue(profile, key)
        else:
            graph.launch(stream)
        cuda.record(end, stream)
        given_s = perf_counter()
        cuda.wait(end)
        if self.timer is not None and begin is not None:
            self.timer.add(cuda.elapsed_ms(begin, end), 1000 * (given_s - start_s))
        if graph is None and self._gpu.graphs:
            try:
                profile.graphs[key] = self._gpu.cuda.capture(self._gpu.stream, lambda: self._enqueue(profile, key))
            except CaptureFailed as error:
                self._gpu.graphs = False
                warnings.warn(
                    f"engines run without CUDA graphs, which costs time at every run: {error}",
                    EdgepruneWarning,
                    stacklevel=2,
                )

    def _enqueue(self, profile: EngineProfile, key: _Key) -> None:
        """Give the copies of a run and the run itself to the stream; also while it is captured."""
        cuda, stream = self._gpu.cuda, self._gpu.stream
        places, number, to_host = key
        addresses = {}
        for port, place in zip(self._in, places, strict=True):
            own = self._own[port.name].address
            addresses[port.name] = place if isinstance(place, int) else own
            if place == _FROM_HOST:
                cuda.to_device(own, self._host.staging[port.name][: profile.sizes[port.name]], stream)
        for port in self._out:
            held: Buffer | Mapped = self._sets[number].buffers[port.name]
            addresses[port.name] = self._mapped(port).address if self._is_mapped(port, key) else held.address
        profile.enqueue(addresses)
        for port in self._out:
            if port.name in to_host and not self._is_mapped(port, key):
                cuda.to_host(self._landing(port)[: profile.sizes[port.name]], addresses[port.name], stream)

    def _bring(self, profile: EngineProfile, port: _Port, feed: Any) -> str | int:
        """Bring a feed to where the run expects it, and say where: staging, own buffer, or the address it has."""
        cuda, stream = self._gpu.cuda, self._gpu.stream
        rows = profile.shapes[port.name][0]
        if not isinstance(feed, EngineRows):
            array = self._host.view(profile, port, self._staging(port))
            np.copyto(array[: len(feed)], feed, casting="same_kind")
            array[len(feed) :] = array[len(feed) - 1]
            return _FROM_HOST
        if len(feed.pieces) == 1 and feed.pieces[0].first == 0 and len(feed) == rows:
            return feed.pieces[0].address
        at = self._own[port.name].address
        for piece in feed.pieces:
            cuda.on_device(at, piece.address, piece.rows * feed.row_bytes, stream)
            at += piece.rows * feed.row_bytes
        last = feed.pieces[-1].address + (feed.pieces[-1].rows - 1) * feed.row_bytes
        for more in range(rows - len(feed)):
            cuda.on_device(at + more * feed.row_bytes, last, feed.row_bytes, stream)
        return _ON_DEVICE

    def _collect(self, profile: EngineProfile, port: _Port, key: _Key, count: int, lease: Lease) -> Any:
        """Return an output of a run that is over, without the images that filled it up."""
        _, number, to_host = key
        if port.name not in to_host:
            address = self._sets[number].buffers[port.name].address
            return EngineRows((Piece(address, 0, count, lease),), profile.shapes[port.name][1:], port.dtype)
        direct = self._is_mapped(port, key)
        memory = self._mapped(port).array if direct else self._landing(port)
        return self._host.view(profile, port, memory, direct=direct)[:count].copy()

    def _prepare(self, kept: frozenset[str]) -> None:
        """Run every profile once on zeros and capture it."""
        number = self._add_outputs()
        places: list[str | int] = []
        for port in self._in:
            own = self._own[port.name]
            self._gpu.cuda.clear(own.address, own.nbytes, self._gpu.stream)
            places.append(_FROM_HOST if port.name in (IMAGES, COUNT) else _ON_DEVICE)
            if places[-1] == _FROM_HOST:
                self._staging(port)[:] = 0
        to_host = frozenset(port.name for port in self._out) - kept
        for profile in self._profiles:
            self._launch(profile, (tuple(places), number, to_host))

    def _add_outputs(self) -> int:
        self._sets.append(_Outputs({port.name: self._buffer(port) for port in self._out}))
        return len(self._sets) - 1

    def _buffer(self, port: _Port) -> Buffer:
        return self._gpu.cuda.device_buffer(self._most(port))

    def _most(self, port: _Port) -> int:
        return max(profile.sizes[port.name] for profile in self._profiles)

    def _is_mapped(self, port: _Port, key: _Key) -> bool:
        return port.name in self._small and port.name in key[2]

    def _mapped(self, port: _Port) -> Mapped:
        if port.name not in self._host.mapped:
            self._host.mapped[port.name] = self._gpu.cuda.mapped(self._most(port))
        return self._host.mapped[port.name]

    def _staging(self, port: _Port) -> np.ndarray:
        if port.name not in self._host.staging:
            self._host.staging[port.name] = self._gpu.cuda.pinned(self._most(port))
        return self._host.staging[port.name]

    def _landing(self, port: _Port) -> np.ndarray:
        if port.name not in self._host.landing:
            self._host.landing[port.name] = self._gpu.cuda.pinned(self._most(port))
        return self._host.landing[port.name]

    def _describe(self, port: _Port) -> TensorInfo:
        """Return a tensor as the manifest would: -1 for a batch that varies, else the side all profiles agree on."""
        seen = [profile.shapes[port.name] for profile in self._profiles]
        sides = [values[0] if len(set(values)) == 1 else -1 for values in zip(*seen, strict=True)]
        if port.shape[:1] == (-1,):
            sides[0] = -1
        return TensorInfo(name=port.name, dtype=port.dtype, shape=sides)


def _ports(trt: Any, engine: Any) -> tuple[list[_Port], list[_Port], _Port | None]:
    """Return inputs and outputs on the device, and the input that is read on the host."""
    inputs, outputs, told = list[_Port](), list[_Port](), None
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        kind = engine.get_tensor_dtype(name).name
        dtype = _DTYPES[kind]
        port = _Port(name, dtype, tuple(engine.get_tensor_shape(name)), storage(dtype))
        if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
            outputs.append(port)
        elif engine.is_shape_inference_io(name):
            told = port
        else:
            inputs.append(port)
    return inputs, outputs, told


def _ordered(ports: Sequence[_Port], listed: Sequence[TensorInfo]) -> list[_Port]:
    """Return ports in the order the manifest lists them, unknown ones last."""
    order = {tensor.name: i for i, tensor in enumerate(listed)}
    return sorted(ports, key=lambda port: order.get(port.name, len(order)))


def _scratch_bytes(engine: Any) -> int:
    """Return the device memory a context needs, of the profile that needs most."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)
