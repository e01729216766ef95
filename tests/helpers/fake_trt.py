"""A stand-in for TensorRT's Python package in the version 8.6.0 or 11.4.0, on a `FakeDevice`.

It has the names of the real one and no others (tests/fixtures/tensorrt). Parsing reads the ONNX file, building gives
bytes that name it, and running computes it with ONNX Runtime on the memory the addresses point to. What the real one
refuses is refused, with the same kind of answer: None, False, or an exception. Tests plant faults and read what
happened in `FakeTensorRT`.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from edgeprune.export.emulate import emulated
from tests.helpers.fake_cuda import (
    ALIGNMENT,
    LAYOUTS,
    CudaFailure,
    FakeDevice,
    Work,
    host_view,
    install_cuda,
    restricted,
    surface,
)
from tests.helpers.tensorrt import Registry10, Registry86

VERSIONS = ("8.6.0", "11.4.0")
LARGEST_K = 3840
KINDS = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.BFLOAT16: ("BF16", np.uint16),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.BOOL: ("BOOL", np.bool_),
    TensorProto.INT8: ("INT8", np.int8),
    TensorProto.UINT8: ("UINT8", np.uint8),
}
NUMPY = dict(KINDS.values())
LATER_OPS = {"Gelu", "Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}  # not in the parser of 8.6
# where an integer tensor becomes a size, as (operator, input), and what it may pass through before
SIZES = {("TopK", 1), ("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0)}
SIZES |= {("Slice", i) for i in range(1, 5)} | {("Range", i) for i in range(3)}
ARITHMETIC = {
    "Add",
    "Sub",
    "Mul",
    "Min",
    "Max",
    "Cast",
    "Concat",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Identity",
}


@dataclass
class Faults:
    """What goes wrong, by a test's wish.

    Attributes:
        parse: the node the parser refuses.
        build, deserialize, context: the call answers None.
        execute: `execute_async_v3` answers False.
        reason: what the logger is told then.
    """

    parse: str | None = None
    build: bool = False
    deserialize: bool = False
    context: bool = False
    execute: bool = False
    reason: str = "a planted fault"


@dataclass
class FakeTensorRT:
    """A stand-in and what it was asked.

    Attributes:
        module: put in the place of `tensorrt`.
        calls: (name, arguments) in order, of the calls that matter.
        log: (severity, message) of all loggers.
        registry: of plugins; its creators are there unless a test removes them.
        inspector: text the engine inspector answers, in place of one made of the graph.
    """

    version: str
    device: FakeDevice
    module: ModuleType = field(default_factory=lambda: ModuleType("tensorrt"))
    calls: list[tuple[str, Any]] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    registry: Any = None
    inspector: str | None = None
    names: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = surface(self.version)
        self.registry = Registry86() if self.old else Registry10()
        self.registry.held += self.registry.brings
        _fill(self)

    @property
    def old(self) -> bool:
        return self.version.startswith("8.")

    def called(self, name: str) -> list[Any]:
        return [arguments for one, arguments in self.calls if one == name]

    def error(self, logger: Any, words: str) -> None:
        self.tell(logger, "ERROR", words)

    def tell(self, logger: Any, severity: str, words: str) -> None:
        self.log.append((severity, words))
        logger.log(self.module.ILogger.Severity[severity], words)

    def kind(self, onnx_type: int) -> str:
        """Return the name of the data type an engine shows for one of ONNX."""
        name = KINDS[onnx_type][0]
        return "INT32" if self.old and name == "INT64" else name


# graphs


@dataclass
class Tensor:
    name: str
    onnx_type: int
    shape: list[int]


@dataclass
class Model:
    """An ONNX file as the parser reads it; weights stay where they are."""

    proto: onnx.ModelProto
    inputs: list[Tensor]
    outputs: list[Tensor]
    shape_inputs: set[str]

    def all(self) -> list[Tensor]:
        return self.inputs + self.outputs


def read_model(data: bytes) -> Model:
    proto = onnx.load_model_from_string(data)
    weights = {one.name for one in proto.graph.initializer}
    inputs = [_tensor(one) for one in proto.graph.input if one.name not in weights]
    return Model(proto, inputs, [_tensor(one) for one in proto.graph.output], _shape_inputs(proto, inputs))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    return Tensor(value.name, kind.elem_type, [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim])


def _shape_inputs(proto: onnx.ModelProto, inputs: Sequence[Tensor]) -> set[str]:
    """Return the integer inputs that become sizes of tensors: TensorRT reads them on the host."""
    found = set()
    for one in inputs:
        if one.onnx_type not in (TensorProto.INT32, TensorProto.INT64) or len(one.shape) > 1:
            continue
        reached = {one.name}
        for node in proto.graph.node:
            for i, name in enumerate(node.input):
                if name in reached:
                    if (node.op_type, i) in SIZES:
                        found.add(one.name)
                    elif node.op_type in ARITHMETIC:
                        reached |= set(node.output)
    return found


@dataclass(frozen=True)
class _Computer:
    """A graph in ONNX Runtime. Typed graphs and nodes of the plugin are emulated: low types are float32 arrays then."""

    session: onnxruntime.InferenceSession
    widened: bool

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Return the outputs as an engine stores them."""
        given = {name: self._widen(array) for name, array in feeds.items()}
        found = self.session.run([one.name for one in outputs], given)
        return {one.name: _stored(array, one.onnx_type) for one, array in zip(outputs, found, strict=True)}

    def _widen(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.uint16:  # the bits of bfloat16
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32) if self.widened and array.dtype == np.float16 else array


def _stored(array: np.ndarray, onnx_type: int) -> np.ndarray:
    if onnx_type == TensorProto.BFLOAT16:  # rounded already
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(KINDS[onnx_type][1])


@lru_cache(maxsize=64)
def _computer(source: Path, stamp: float, data: bytes | None = None) -> _Computer:
    """Return what computes a graph: the one in a file, changed at a time, or the one in some bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.parent))
    proto = onnx.load(source, load_external_data=False) if data is None else onnx.load_model_from_string(data)
    low = {one.data_type for one in proto.graph.initializer} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    widened = bool(low) or any(node.domain == "edgeprune" for node in proto.graph.node)
    model = (emulated(proto) if widened else proto).SerializeToString()
    return _Computer(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), widened)


# plans


def make_plan(
    version: str,
    onnx_file: Path,
    profiles: Sequence[tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]]] = (({}, {}),),
    *,
    scratch: Sequence[int] | None = None,
    plugins: Sequence[str] = (),
) -> bytes:
    """Return an engine as the stand-in of a version builds it.

    Args:
        version: of TensorRT.
        onnx_file: what it runs.
        profiles: per profile the shapes of inputs and the values of shape inputs, each min = opt = max.
        scratch: bytes of device memory by profile.
        plugins: creators it needs.
    """
    return _encode(
        {
            "stand-in": "plan",
            "tensorrt": version,
            "model": str(onnx_file.resolve()),
            "sha256": hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
            "profiles": [
                {
                    "shapes": {name: [list(sides)] * 3 for name, sides in shapes.items()},
                    "values": {name: [list(numbers)] * 3 for name, numbers in values.items()},
                }
                for shapes, values in profiles
            ],
            "flags": [],
            "verbosity": "LAYER_NAMES_ONLY",
            "plugins": [[name, "1", "edgeprune"] for name in plugins],
            "scratch": list(scratch or [4096 * (i + 1) for i in range(len(profiles))]),
        }
    )


def _encode(plan: dict[str, Any]) -> bytes:
    return b"ftrt" + json.dumps(plan, sort_keys=True).encode()


def read_plan(data: Any) -> dict[str, Any]:
    """Return what is in an engine of the stand-in."""
    held = bytes(data)
    if held[:4] != b"ftrt":
        raise ValueError("no engine")
    found: dict[str, Any] = json.loads(held[4:])
    return found


# the package


def _fill(fake: FakeTensorRT) -> None:
    """Put everything into the module: the names of the version, and behind them what is implemented here."""
    module, names = fake.module, fake.names
    module.__version__ = fake.version  # type: ignore[attr-defined]
    for name, members in _sections(names, "enum").items():
        setattr(module, name, _enum(name, members))
    implemented = _implementations(fake)
    for name, attributes in _sections(names, "class").items():
        implementation = implemented.get(name) or _not_implemented(name)
        base = {"IHostMemory": bytes, "Logger": getattr(module, "ILogger", None)}.get(name, object)
        setattr(module, name, restricted(implementation, attributes, name, base))
    severity = _enum(
        "Severity", dict(zip(["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], range(5), strict=True))
    )
    for one in (module.ILogger, module.Logger):
        one.Severity = severity
        for name, member in severity.__members__.items():
            setattr(one, name, member)
    for name, place in names["constants"].items():
        if place is not None:
            setattr(module, name, getattr(module, place[0])[place[1]])
    functions = {
        "get_plugin_registry": lambda: fake.registry,
        "get_builder_plugin_registry": lambda capability: fake.registry,
        "init_libnvinfer_plugins": lambda logger, namespace: fake.calls.append(("init_plugins", namespace)) or True,
        "get_nv_onnx_parser_version": lambda: int("".join(f"{int(p):02d}" for p in fake.version.split("."))),
        "nptype": lambda kind: np.dtype(NUMPY[kind.name]).type,
        "volume": lambda sides: int(np.prod(list(sides))),
    }
    for name, call in functions.items():
        if name in names["functions"]:
            setattr(module, name, call)


def _sections(names: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {key.removeprefix(f"{kind} "): held for key, held in names.items() if key.startswith(f"{kind} ")}


def _enum(name: str, members: Mapping[str, int]) -> Any:
    class Number(enum.Enum):
        def __int__(self) -> int:
            return self.value

        __index__ = __int__

    return enum.Enum(name, dict(members), type=Number)  # type: ignore[misc]


def _not_implemented(name: str) -> type:
    def refuse(self: Any, *args: Any) -> None:
        raise NotImplementedError(f"the stand-in lacks {name}, which the real one has: add it when it is needed")

    return type(name, (), {"__init__": refuse})


def _implementations(fake: FakeTensorRT) -> dict[str, type]:
    return {one.__name__: one for one in (*_common(fake), *_building(fake), *_running(fake))}


def _common(fake: FakeTensorRT) -> list[type]:
    class Dims:
        MAX_DIMS = 8

        def __init__(self, sides: Any = ()) -> None:
            self._sides = tuple(int(side) for side in sides)

        def __len__(self) -> int:
            return len(self._sides)

        def __getitem__(self, at: Any) -> Any:
            return self._sides[at]

        def __eq__(self, other: object) -> bool:
            return self._sides == tuple(other)  # type: ignore[arg-type]

        def __hash__(self) -> int:
            return hash(self._sides)

        def __repr__(self) -> str:
            return str(self._sides)

    class ILogger:
        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError("ILogger.log is pure virtual")

    class Logger:
        def __init__(self, min_severity: Any = None) -> None:
            self._ready, self._least = True, min_severity

        def log(self, severity: Any, msg: str) -> None:
            pass  # the real one prints

        def _set_least(self, severity: Any) -> None:
            self._least = severity

        min_severity = property(lambda self: self._least, _set_least)

    class IHostMemory:
        nbytes = property(len)

    class IProgressMonitor:
        def __init__(self) -> None:
            self._ready = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise NotImplementedError("IProgressMonitor.phase_start is pure virtual")

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError("IProgressMonitor.step_complete is pure virtual")

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError("IProgressMonitor.phase_finish is pure virtual")

    return [Dims, ILogger, Logger, IHostMemory, IProgressMonitor]


def _checked_logger(fake: FakeTensorRT, logger: Any) -> Any:
    if not isinstance(logger, fake.module.ILogger):
        raise TypeError("incompatible constructor arguments: a logger is wanted")
    if not getattr(logger, "_ready", False):
        raise TypeError("ILogger.__init__() must be called when overriding __init__")
    return logger


def _asked_device(fake: FakeTensorRT, what: str) -> None:
    """Refuse what ends a real process: TensorRT 8.6.0 before anybody has asked for a device."""
    if not fake.device.initialised or not fake.device.count:
        raise AssertionError(f"a real {what} may end the process here: no device was found first")


def _properties(**defaults: Any) -> dict[str, property]:
    """Return properties that hold a value."""

    def one(name: str, default: Any) -> property:
        def read(self: Any) -> Any:
            return self._held.get(name, default)

        def write(self: Any, value: Any) -> None:
            self._held[name] = value

        return property(read, write)

    return {name: one(name, default) for name, default in defaults.items()}


def _building(fake: FakeTensorRT) -> list[type]:
    module = fake.module

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = _checked_logger(fake, logger)
            _asked_device(fake, "Builder")

        def create_network(self, flags: int = 0) -> Any:
            fake.calls.append(("create_network", flags))
            return module.INetworkDefinition(self, flags)

        def create_builder_config(self) -> Any:
            return module.IBuilderConfig(self)

        def create_optimization_profile(self) -> Any:
            return module.IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            fake.calls.append(("build_serialized_network", config._summary()))
            wrong = fake.faults.reason if fake.faults.build else _why_not_build(fake, network, config)
            if wrong is None and not _tell_progress(config):
                wrong = "the build was cancelled"
            if wrong is not None:
                fake.error(self._logger, wrong)
                return None
            if config._cache is not None:
                config._cache._entries[network._plan()["sha256"]] = config._summary()["flags"]
            return module.IHostMemory(_encode({**network._plan(), **config._summary()}))

        logger = property(lambda self: self._logger)
        max_threads = property(lambda self: 1)
        platform_has_fast_fp16 = property(lambda self: True)
        platform_has_fast_int8 = property(lambda self: True)
        platform_has_tf32 = property(lambda self: True)

    class IBuilderConfig:
        def __init__(self, builder: Any) -> None:
            self._builder, self._held = builder, {}
            self._flags: set[str] = {"TF32"}
            self._pools: dict[str, int] = {}
            self._profiles: list[Any] = []
            self._previews: dict[str, bool] = {}
            self._cache: Any = None
            self._sources = sum(1 << int(one) for one in module.TacticSource)

        def set_flag(self, flag: Any) -> None:
            self._flags.add(_member(module.BuilderFlag, flag))

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(_member(module.BuilderFlag, flag))

        def get_flag(self, flag: Any) -> bool:
            return _member(module.BuilderFlag, flag) in self._flags

        @property
        def flags(self) -> int:
            return sum(1 << int(module.BuilderFlag[one]) for one in self._flags)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[_member(module.MemoryPoolType, pool)] = int(pool_size)

        def get_memory_pool_limit(self, pool: Any) -> int:
            return self._pools.get(_member(module.MemoryPoolType, pool), fake.device.total_bytes)

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            self._previews[_member(module.PreviewFeature, feature)] = enable

        def get_preview_feature(self, feature: Any) -> bool:
            return self._previews.get(_member(module.PreviewFeature, feature), False)

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self._sources = int(tactic_sources)
            return True

        def get_tactic_sources(self) -> int:
            return self._sources

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        num_optimization_profiles = property(lambda self: len(self._profiles))

        def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
            return module.ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache._stamp != _stamp(fake) and not ignore_mismatch:
                fake.error(self._builder._logger, "the timing cache is of another device or TensorRT")
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

        def _summary(self) -> dict[str, Any]:
            return {
                "profiles": [asdict(one._values) for one in self._profiles] or [{"shapes": {}, "values": {}}],
                "flags": sorted(self._flags),
                "pools": self._pools,
                "previews": self._previews,
                "tactic_sources": self._sources,
                "verbosity": self._held.get("profiling_verbosity", module.ProfilingVerbosity.LAYER_NAMES_ONLY).name,
                "level": self._held.get("builder_optimization_level", 3),
                "scratch": [4096 * (i + 1) for i in range(len(self._profiles) or 1)],
                "timing_cache": self._cache is not None,
                "settings": {key: str(value) for key, value in self._held.items()},
            }

        vars().update(
            _properties(
                avg_timing_iterations=1,
                builder_optimization_level=3,
                engine_capability=None,
                hardware_compatibility_level=None,
                max_aux_streams=-1,
                max_num_tactics=-1,
                plugins_to_serialize=[],
                profile_stream=0,
                profiling_verbosity=module.ProfilingVerbosity.LAYER_NAMES_ONLY,
                progress_monitor=None,
                runtime_platform=None,
                tiling_optimization_level=None,
            )
        )

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._values = _Profile()

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._values.shapes[input] = _ordered(input, min, opt, max)

        def get_shape(self, input: str) -> list[Any]:
            return [module.Dims(one) for one in self._values.shapes[input]]

        def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._values.values[input] = _ordered(input, min, opt, max)

        def get_shape_input(self, input: str) -> list[list[int]]:
            return self._values.values[input]

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            held = json.loads(data) if data else {"stamp": _stamp(fake), "entries": {}}
            self._stamp, self._entries = held["stamp"], held["entries"]

        def serialize(self) -> Any:
            return module.IHostMemory(json.dumps({"stamp": self._stamp, "entries": self._entries}).encode())

        def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
            if input_cache._stamp != self._stamp and not ignore_mismatch:
                return False
            self._entries |= input_cache._entries
            return True

        def reset(self) -> bool:
            self._entries = {}
            return True

    class INetworkDefinition:
        def __init__(self, builder: Any, flags: int) -> None:
            self._builder, self._creation, self._held = builder, flags, {}
            self._model: Model | None = None
            self._source: dict[str, Any] = {}
            self._tensors: dict[str, Any] = {}
            self._layers: list[Any] = []

        def _take(self, model: Model, source: dict[str, Any]) -> None:
            self._model, self._source = model, source
            types = {one.name: one.onnx_type for one in model.all()}
            inferred = onnx.shape_inference.infer_shapes(model.proto)
            types |= {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
            shapes = {one.name: one.shape for one in model.all()}
            for name, kind in types.items():
                if kind in KINDS:
                    shaped = name in model.shape_inputs
                    self._tensors[name] = module.ITensor(name, fake.kind(kind), shapes.get(name, []), shaped)
            self._layers = [module.ILayer(self, node) for node in model.proto.graph.node]

        def _plan(self) -> dict[str, Any]:
            assert self._model is not None
            plugins = {(n.op_type, "1", "edgeprune") for n in self._model.proto.graph.node if n.domain == "edgeprune"}
            wanted = {one.name: one._precision for one in self._layers if one._precision is not None}
            return {
                "stand-in": "plan",
                "tensorrt": fake.version,
                "creation_flags": self._creation,
                "plugins": sorted(map(list, plugins)),
                "precisions": wanted,
                **self._source,
            }

        def _list(self, which: str) -> list[Any]:
            return [self._tensors[one.name] for one in (getattr(self._model, which) if self._model else ())]

        num_inputs = property(lambda self: len(self._list("inputs")))
        num_outputs = property(lambda self: len(self._list("outputs")))
        num_layers = property(lambda self: len(self._layers))
        builder = property(lambda self: self._builder)
        flags = property(lambda self: self._creation)
        has_implicit_batch_dimension = property(lambda self: fake.old and not self._explicit())

        def _explicit(self) -> bool:
            return not fake.old or bool(self._creation & 1 << int(module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))

        def get_flag(self, flag: Any) -> bool:
            return bool(self._creation & 1 << int(flag))

        def get_input(self, index: int) -> Any:
            return self._list("inputs")[index]

        def get_output(self, index: int) -> Any:
            return self._list("outputs")[index]

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

        def __len__(self) -> int:
            return len(self._layers)

        def __getitem__(self, index: int) -> Any:
            return self._layers[index]

        vars().update(_properties(name="Unnamed Network"))

    class ITensor:
        def __init__(self, name: str, kind: str, shape: Sequence[int], shaped: bool) -> None:
            self._held = {"name": name, "dtype": module.DataType[kind]}
            self._shape, self._shaped = shape, shaped

        shape = property(lambda self: module.Dims(self._shape))
        is_shape_tensor = property(lambda self: self._shaped)
        is_execution_tensor = property(lambda self: not self._shaped)
        vars().update(_properties(name="", dtype=None))

    class ILayer:
        """Of 8.6 a layer can be told its precision; 11.4 has no such attribute."""

        def __init__(self, network: Any, node: onnx.NodeProto) -> None:
            self._network, self._node, self._held = network, node, {"name": node.name}
            self._precision: str | None = None
            self._outputs: dict[int, str] = {}

        num_inputs = property(lambda self: len(self._node.input))
        num_outputs = property(lambda self: len(self._node.output))

        def get_input(self, index: int) -> Any:
            return self._network._tensors.get(self._node.input[index])

        def get_output(self, index: int) -> Any:
            return self._network._tensors.get(self._node.output[index])

        @property
        def type(self) -> Any:
            kinds = {"Softmax": "SOFTMAX", "TopK": "TOPK", "MatMul": "MATRIX_MULTIPLY", "Constant": "CONSTANT"}
            kinds |= {
                "Cast": "CAST",
                "Shape": "SHAPE",
                "LayerNormalization": "NORMALIZATION",
                "Concat": "CONCATENATION",
            }
            kinds |= {"Gather": "GATHER", "GatherND": "GATHER", "Slice": "SLICE", "Reshape": "SHUFFLE"}
            kinds |= {"Transpose": "SHUFFLE", "Conv": "CONVOLUTION", "Erf": "UNARY", "Identity": "IDENTITY"}
            kinds |= {"TopKGather": "PLUGIN_V2", "GatherTokens": "PLUGIN_V2"}
            return module.LayerType[kinds.get(self._node.op_type, "ELEMENTWISE")]

        @property
        def precision(self) -> Any:
            return module.DataType[self._precision or "FLOAT"]

        @precision.setter
        def precision(self, kind: Any) -> None:
            self._precision = kind.name

        precision_is_set = property(lambda self: self._precision is not None)

        def reset_precision(self) -> None:
            self._precision = None

        def set_output_type(self, index: int, dtype: Any) -> None:
            self._outputs[index] = dtype.name

        def get_output_type(self, index: int) -> Any:
            return module.DataType[self._outputs.get(index, "FLOAT")]

        def output_type_is_set(self, index: int) -> bool:
            return index in self._outputs

        vars().update(_properties(name="", metadata=""))

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger = network, _checked_logger(fake, logger)
            self._errors: list[Any] = []
            self._flags = 0

        def parse(self, model: Any, path: str | None = None) -> bool:
            return self._read(bytes(model), path)

        def parse_from_file(self, model: str) -> bool:
            if not Path(model).is_file():
                return self._fail(None, f"Could not open file {model}")
            return self._read(Path(model).read_bytes(), model)

        def _read(self, data: bytes, path: str | None) -> bool:
            fake.calls.append(("parse", path))
            try:
                model = read_model(data)
            except Exception:
                return self._fail(None, "Failed to parse ONNX model")
            outside = any(one.data_location == TensorProto.EXTERNAL for one in model.proto.graph.initializer)
            if outside and path is None:
                return self._fail(None, "Failed to open file: external weights, and no path was given")
            if not self._network._explicit():
                return self._fail(None, "The network must be created with an explicit batch")
            for i, node in enumerate(model.proto.graph.node):
                wrong = _why_not_parse(fake, model.proto, node)
                if wrong is not None:
                    return self._fail((i, node), wrong)
            if fake.old and model.proto.functions:
                return self._fail(None, "local functions are not supported")
            kinds = {one.onnx_type for one in model.all()} | {one.data_type for one in model.proto.graph.initializer}
            if fake.old and TensorProto.BFLOAT16 in kinds:
                return self._fail(None, "Unsupported ONNX data type: BFLOAT16")
            source: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
            if path is None:
                source["model_bytes"] = base64.b64encode(data).decode()
            else:
                source["model"] = str(Path(path).resolve())
            self._network._take(model, source)
            return True

        def _fail(self, where: tuple[int, onnx.NodeProto] | None, words: str) -> bool:
            self._errors.append(module.ParserError(where, words))
            fake.error(self._logger, words)
            return False

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> Any:
            return self._errors[index]

        def clear_errors(self) -> None:
            self._errors.clear()

        def set_flag(self, flag: Any) -> None:
            self._flags |= 1 << int(flag)

        def clear_flag(self, flag: Any) -> None:
            self._flags &= ~(1 << int(flag))

        def get_flag(self, flag: Any) -> bool:
            return bool(self._flags & 1 << int(flag))

        def set_builder_config(self, builder_config: Any) -> bool:
            return True

        def supports_operator(self, op_name: str) -> bool:
            return not (fake.old and op_name in LATER_OPS)

        def get_used_vc_plugin_libraries(self) -> list[str]:
            return []

        vars().update({"flags": property(lambda self: self._flags)})

    class ParserError:
        def __init__(self, where: tuple[int, onnx.NodeProto] | None, words: str) -> None:
            self._where, self._words = where, words

        def code(self) -> Any:
            return module.ErrorCode["UNSUPPORTED_NODE" if self._where else "INVALID_GRAPH"]

        def desc(self) -> str:
            return self._words

        def file(self) -> str:
            return "ModelImporter.cpp"

        def func(self) -> str:
            return "parseNode"

        def line(self) -> int:
            return 731

        def node(self) -> int:
            return -1 if self._where is None else self._where[0]

        def node_name(self) -> str:
            return "" if self._where is None else self._where[1].name

        def node_operator(self) -> str:
            return "" if self._where is None else self._where[1].op_type

    return [
        Builder,
        IBuilderConfig,
        IOptimizationProfile,
        ITimingCache,
        INetworkDefinition,
        ITensor,
        ILayer,
        OnnxParser,
        ParserError,
    ]


@dataclass
class _Profile:
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    values: dict[str, list[list[int]]] = field(default_factory=dict)


def _ordered(name: str, *three: Any) -> list[list[int]]:
    low, middle, high = ([int(side) for side in one] for one in three)
    if not all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True)):
        raise ValueError(f"{name}: min <= opt <= max does not hold for {low}, {middle}, {high}")
    return [low, middle, high]


def _member(kind: Any, value: Any) -> str:
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {value!r} is no {kind.__name__}")
    return value.name


def _stamp(fake: FakeTensorRT) -> str:
    return f"{fake.version} on {fake.device.name}"


def _why_not_parse(fake: FakeTensorRT, proto: onnx.ModelProto, node: onnx.NodeProto) -> str | None:
    """Return why the parser refuses a node."""
    if fake.faults.parse is not None and fake.faults.parse == node.name:
        return fake.faults.reason
    if node.domain == "edgeprune":
        held = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        version, space = (held.get(key, b"").decode() for key in ("plugin_version", "plugin_namespace"))
        if fake.registry._get(node.op_type, version or "1", space) is None:
            why = "Plugin not found, are the plugin name, version, and namespace correct?"
            return f"No importer registered for op: {node.op_type}. {why}"
        return None
    known = {one.name for one in proto.functions}
    if node.domain not in ("", "ai.onnx") and node.op_type not in known:
        return f"No importer registered for op: {node.op_type} of domain {node.domain}"
    if fake.old and node.op_type in LATER_OPS:
        return f"No importer registered for op: {node.op_type}"
    if node.op_type == "TopK":
        k = next((one for one in proto.graph.initializer if one.name == node.input[1]), None)
        if k is not None and int(onnx.numpy_helper.to_array(k).reshape(-1)[0]) > LARGEST_K:
            return f"TopK: K is larger than {LARGEST_K}"
    return None


def _why_not_build(fake: FakeTensorRT, network: Any, config: Any) -> str | None:
    """Return why a network cannot be built with the profiles of a config."""
    model = network._model
    if model is None:
        return "the network has no outputs"
    dynamic = [one for one in model.inputs if -1 in one.shape]
    if (dynamic or model.shape_inputs) and not config._profiles:
        return "Network has dynamic or shape inputs, but no optimization profile has been defined."
    for i, profile in enumerate(config._profiles):
        held = profile._values
        for one in model.inputs:
            if one.name in model.shape_inputs:
                if len(held.values.get(one.name, [[]])[0]) != int(np.prod(one.shape)):
                    return f"profile {i} has no values of the shape input {one.name}"
                continue
            if one.name not in held.shapes and -1 in one.shape:
                return f"profile {i} has no dimensions of the dynamic input {one.name}"
            for sides in held.shapes.get(one.name, []):
                if len(sides) != len(one.shape) or any(a not in (-1, b) for a, b in zip(one.shape, sides, strict=True)):
                    return f"profile {i}: {sides} do not fit the input {one.name} {one.shape}"
        unknown = {*held.shapes, *held.values} - {one.name for one in model.inputs}
        if unknown:
            return f"profile {i} names {sorted(unknown)}, which are no inputs"
    return None


def _tell_progress(config: Any) -> bool:
    """Report two phases to the progress monitor; return whether it wants to go on."""
    monitor = config._held.get("progress_monitor")
    if monitor is None:
        return True
    if not getattr(monitor, "_ready", False):
        raise TypeError("IProgressMonitor.__init__() must be called when overriding __init__")
    monitor.phase_start("Building Engine", None, 2)
    on = True
    for step in range(2):
        monitor.phase_start("Timing Runner", "Building Engine", 1)
        on = bool(monitor.step_complete("Timing Runner", 0)) and on
        monitor.phase_finish("Timing Runner")
        on = bool(monitor.step_complete("Building Engine", step)) and on
        if not on:
            break
    monitor.phase_finish("Building Engine")
    return on


def _running(fake: FakeTensorRT) -> list[type]:
    module, device = fake.module, fake.device

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger, self._held = _checked_logger(fake, logger), {}
            _asked_device(fake, "Runtime")

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            fake.calls.append(("deserialize_cuda_engine", len(bytes(serialized_engine))))
            wrong = fake.faults.reason if fake.faults.deserialize else None
            plan: dict[str, Any] = {}
            try:
                plan = read_plan(serialized_engine)
            except ValueError:
                wrong = wrong or "Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match"
            if wrong is None and plan["tensorrt"] != fake.version:
                wrong = f"The engine plan file is not compatible with this version of TensorRT, got {plan['tensorrt']}"
            for name, version, space in plan.get("plugins", ()):
                if wrong is None and fake.registry._get(name, version, space) is None:
                    wrong = f"getPluginCreator could not find plugin: {name} version: {version} namespace: {space}"
            if wrong is not None:
                fake.error(self._logger, wrong)
                return None
            return module.ICudaEngine(self, plan)

        logger = property(lambda self: self._logger)
        vars().update(_properties(max_threads=1, engine_host_code_allowed=False))

    class ICudaEngine:
        def __init__(self, runtime: Any, plan: dict[str, Any]) -> None:
            self._logger, self._plan = runtime._logger, plan
            data = base64.b64decode(plan["model_bytes"]) if "model_bytes" in plan else Path(plan["model"]).read_bytes()
            self._model = read_model(data)
            self._io = {one.name: one for one in self._model.all()}
            self._users: dict[int, Any] = {}  # profile -> context, of TensorRT without shared profiles

        def _tensor(self, name: str) -> Tensor:
            if name not in self._io:
                raise ValueError(f"there is no tensor {name}")
            return self._io[name]

        def _kind(self, name: str) -> str:
            return fake.kind(self._tensor(name).onnx_type)

        def _is_input(self, name: str) -> bool:
            return any(one.name == name for one in self._model.inputs)

        def _compute(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if "model" in self._plan:
                source = Path(self._plan["model"])
                computer = _computer(source, source.stat().st_mtime)
            else:
                computer = _computer(Path(), 0.0, base64.b64decode(self._plan["model_bytes"]))
            return computer.run(feeds, self._model.outputs)

        name = property(lambda self: "Unnamed Network 0")
        num_io_tensors = property(lambda self: len(self._io))
        num_layers = property(lambda self: len(self._model.proto.graph.node))
        num_optimization_profiles = property(lambda self: len(self._plan["profiles"]))
        num_aux_streams = property(lambda self: 0)
        refittable = property(lambda self: False)
        device_memory_size = property(lambda self: max(self._plan["scratch"]))
        device_memory_size_v2 = property(lambda self: max(self._plan["scratch"]))
        profiling_verbosity = property(lambda self: module.ProfilingVerbosity[self._plan["verbosity"]])

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return self._plan["scratch"][profile_index]

        def get_tensor_name(self, index: int) -> str:
            return list(self._io)[index]

        def __getitem__(self, index: int) -> str:
            return list(self._io)[index]

        def get_tensor_mode(self, name: str) -> Any:
            self._tensor(name)
            return module.TensorIOMode["INPUT" if self._is_input(name) else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            return module.DataType[self._kind(name)]

        def get_tensor_shape(self, name: str) -> Any:
            return module.Dims(self._tensor(name).shape)

        def get_tensor_location(self, name: str) -> Any:
            self._tensor(name)
            return module.TensorLocation["HOST" if name in self._model.shape_inputs else "DEVICE"]

        def is_shape_inference_io(self, name: str) -> bool:
            self._tensor(name)
            return name in self._model.shape_inputs

        def get_tensor_format(self, name: str) -> Any:
            self._tensor(name)
            return module.TensorFormat.LINEAR

        def get_tensor_bytes_per_component(self, name: str) -> int:
            return np.dtype(NUMPY[self._kind(name)]).itemsize

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
            held = self._plan["profiles"][profile_index]["shapes"].get(name, [self._tensor(name).shape] * 3)
            return [module.Dims(one) for one in held]

        def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
            managed = strategy is not None and strategy.name == "USER_MANAGED"
            return self._context(managed)

        def create_execution_context_without_device_memory(self) -> Any:
            return self._context(True)

        def _context(self, managed: bool) -> Any:
            fake.calls.append(("create_execution_context", "user-managed" if managed else "own memory"))
            if fake.faults.context:
                fake.error(self._logger, fake.faults.reason)
                return None
            own = None
            if not managed:
                try:
                    own = device.allocate(self._own_size(), "device").start
                except CudaFailure as failure:
                    fake.error(self._logger, str(failure))
                    return None
            return module.IExecutionContext(self, own)

        def _own_size(self) -> int:
            return max(*self._plan["scratch"], 1)

        def create_engine_inspector(self) -> Any:
            return module.EngineInspector(self)

        def serialize(self) -> Any:
            return module.IHostMemory(_encode(self._plan))

    class EngineInspector:
        def __init__(self, engine: Any) -> None:
            self._engine, self._held = engine, {}

        def get_engine_information(self, format: Any) -> str:
            _member(module.LayerInformationFormat, format)
            return fake.inspector or _inspect(self._engine)

        vars().update(_properties(execution_context=None))

    class IExecutionContext:
        def __init__(self, engine: Any, own: int | None) -> None:
            self._engine, self._logger, self._held = engine, engine._logger, {}
            self._memory, self._memory_size = own, None if own is None else engine._own_size()
            self._owns = own is not None
            self._addresses: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._warm: Any = None
            free = 0 not in engine._users or not self._exclusive()
            self._profile = 0 if free else -1
            if free:
                engine._users.setdefault(0, self)

        def __del__(self) -> None:
            if self._owns:
                device.memory.pop(self._memory, None)

        def _exclusive(self) -> bool:
            return fake.old and not self._engine._plan.get("previews", {}).get("PROFILE_SHARING_0806", False)

        def _refuse(self, words: str) -> bool:
            fake.error(self._logger, words)
            return False

        engine = property(lambda self: self._engine)
        active_optimization_profile = property(lambda self: self._profile)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            if not 0 <= profile_index < self._engine.num_optimization_profiles:
                return self._refuse(f"there is no profile {profile_index}")
            if stream_handle == 0:
                device.complaints.append("default stream: set_optimization_profile_async")
            user = self._engine._users.get(profile_index)
            if self._exclusive() and user is not None and user is not self:
                return self._refuse(f"profile {profile_index} is used by another context")
            if self._engine._users.get(self._profile) is self:
                del self._engine._users[self._profile]
            self._engine._users[profile_index] = self
            self._profile, self._warm = profile_index, None
            self._shapes.clear()
            return True

        def set_input_shape(self, name: str, shape: Any) -> bool:
            sides, wanted = tuple(int(side) for side in shape), self._engine._tensor(name).shape
            if not self._engine._is_input(name):
                return self._refuse(f"{name} is no input")
            if self._profile < 0:
                return self._refuse("no optimization profile is chosen")
            if len(sides) != len(wanted) or any(a not in (-1, b) for a, b in zip(wanted, sides, strict=True)):
                return self._refuse(f"{name}: {sides} does not fit {wanted}")
            low, _, high = map(tuple, self._engine.get_tensor_profile_shape(name, self._profile))
            if -1 in wanted and not all(a <= b <= c for a, b, c in zip(low, sides, high, strict=True)):
                return self._refuse(f"{name}: {sides} is outside the profile {self._profile}, {low} to {high}")
            if self._shapes.get(name) != sides:
                self._shapes[name], self._warm = sides, None
            return True

        def _sides(self, name: str) -> tuple[int, ...]:
            return self._shapes.get(name) or tuple(self._engine._tensor(name).shape)

        def get_tensor_shape(self, name: str) -> Any:
            known = self._sides(name)
            if -1 not in known or self._engine._is_input(name) or self._unspecified():
                return module.Dims(known)
            feeds = {}
            for one in self._engine._model.inputs:
                if one.name in self._engine._model.shape_inputs:
                    feeds[one.name] = self._shape_values(one.name)
                else:
                    feeds[one.name] = np.zeros(self._sides(one.name), KINDS[one.onnx_type][1])
            return module.Dims(self._engine._compute(feeds)[name].shape)

        def _shape_values(self, name: str) -> np.ndarray:
            """Read a shape input from the host, as the engine's type."""
            kind = np.dtype(NUMPY[self._engine._kind(name)])
            count = int(np.prod(self._engine._tensor(name).shape))
            values = host_view(self._addresses[name], count * kind.itemsize).view(kind)
            return values.astype(KINDS[self._engine._tensor(name).onnx_type][1])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._engine._tensor(name)
            if not isinstance(memory, int):
                raise TypeError("incompatible function arguments: an address is an int")
            self._addresses[name] = memory
            return True

        def get_tensor_address(self, name: str) -> int:
            return self._addresses.get(name, 0)

        def infer_shapes(self) -> list[str]:
            return self._unspecified()

        def _unspecified(self) -> list[str]:
            shaped = self._engine._model.shape_inputs
            found = [one.name for one in self._engine._model.inputs if -1 in self._sides(one.name)]
            return found + [name for name in shaped if not self._addresses.get(name)]

        all_binding_shapes_specified = property(lambda self: not self._unspecified())

        def set_device_memory(self, memory: int, size: int) -> None:
            self._memory, self._memory_size, self._owns = int(memory), int(size), False

        def update_device_memory_size_for_shapes(self) -> int:
            return self._engine.get_device_memory_size_for_profile_v2(self._profile)

        @property
        def device_memory(self) -> int:
            raise AttributeError("unreadable attribute")

        @device_memory.setter
        def device_memory(self, memory: int) -> None:
            self._memory, self._memory_size, self._owns = int(memory), None, False

        def execute_async_v3(self, stream_handle: int) -> bool:
            handle = int(stream_handle)
            about = ("execute", dict(self._addresses))
            fake.calls.append(("execute_async_v3", (handle, self._profile, device.capturing(handle))))
            wrong = fake.faults.reason if fake.faults.execute else self._why_not_run(handle)
            if wrong is not None:
                if device.capturing(handle):
                    device.stream(handle).broken = wrong
                return self._refuse(wrong)
            values = {name: self._shape_values(name) for name in self._engine._model.shape_inputs}
            addresses, shapes = (
                dict(self._addresses),
                {one.name: self._sides(one.name) for one in self._engine._model.inputs},
            )
            scratch = self._memory

            def do() -> None:
                size = self._engine._plan["scratch"][max(self._profile, 0)]
                if size:
                    device.view(scratch, size)[:] = 0xC3
                feeds: dict[str, np.ndarray] = dict(values)
                for one in self._engine._model.inputs:
                    if one.name not in values:
                        kind = np.dtype(NUMPY[self._engine._kind(one.name)])
                        size = int(np.prod(shapes[one.name])) * kind.itemsize
                        held = device.view(addresses[one.name], size).view(kind).reshape(shapes[one.name])
                        feeds[one.name] = held.astype(KINDS[one.onnx_type][1])
                for name, found in self._engine._compute(feeds).items():
                    out = np.ascontiguousarray(found.astype(NUMPY[self._engine._kind(name)]))
                    if out.nbytes:
                        device.view(addresses[name], out.nbytes)[:] = out.reshape(-1).view(np.uint8)

            device.enqueue(handle, Work(do, about))
            self._warm = self._state()
            return True

        def _state(self) -> Any:
            return self._profile, dict(self._shapes)

        def _why_not_run(self, handle: int) -> str | None:
            engine = self._engine
            if self._profile < 0:
                return "no optimization profile is chosen"
            lacking = self._unspecified() or [name for name in engine._io if not self._addresses.get(name)]
            if lacking:
                return f"shape or address of {lacking} is not set"
            if self._memory is None:
                return "the context has no device memory"
            needed = engine._plan["scratch"][self._profile]
            if needed and (self._memory % ALIGNMENT or (self._memory_size or needed) < needed):
                return f"device memory has to be aligned and at least {needed} bytes"
            held = engine._plan["profiles"][self._profile]["values"]
            for name in engine._model.shape_inputs:
                low, _, high = held[name]
                if not all(a <= b <= c for a, b, c in zip(low, self._shape_values(name).tolist(), high, strict=True)):
                    return f"values of the shape input {name} are outside the profile"
            for one in engine._model.inputs:
                low, _, high = map(tuple, engine.get_tensor_profile_shape(one.name, self._profile))
                if not all(a <= b <= c for a, b, c in zip(low, self._sides(one.name), high, strict=True)):
                    return f"{one.name} is outside the profile {self._profile}"
            if device.capturing(handle) and self._warm != self._state():
                return "a context has to run once with its shapes before it can be captured"
            return None

        def report_to_profiler(self) -> bool:
            return True

        vars().update(_properties(name="", profiler=None, enqueue_emits_profile=True, nvtx_verbosity=None))

    return [Runtime, ICudaEngine, EngineInspector, IExecutionContext]


def _inspect(engine: Any) -> str:
    """Return what the inspector says of an engine: one layer per node, attention as one fused layer."""
    nodes = engine._model.proto.graph.node
    names = [
        f"_gemm_mha_v2_{node.name}" if node.op_type == "Softmax" else node.name or node.output[0] for node in nodes
    ]
    io = list(engine._io)
    if engine._plan["verbosity"] not in ("DETAILED", "VERBOSE"):
        return json.dumps({"Layers": names, "Bindings": io})
    half = "FP16" in engine._plan["flags"] or any(
        one.data_type == TensorProto.FLOAT16 for one in engine._model.proto.graph.initializer
    )
    kind = "Row major linear FP16 format" if half else "Row major linear FP32"
    layers = [
        {
            "Name": name,
            "LayerType": "PluginV2"
            if node.domain == "edgeprune"
            else "Myelin"
            if node.op_type == "Softmax"
            else "NoOp",
            "Inputs": [
                {"Name": one, "Location": "Device", "Dimensions": [], "Format/Datatype": kind} for one in node.input
            ],
            "Outputs": [
                {"Name": one, "Location": "Device", "Dimensions": [], "Format/Datatype": kind} for one in node.output
            ],
            "TacticName": "_gemm_mha_v2" if node.op_type == "Softmax" else "",
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        for name, node in zip(names, nodes, strict=True)
    ]
    return json.dumps({"Layers": layers, "Bindings": io})


# putting it in place


def install(
    monkeypatch: pytest.MonkeyPatch, version: str = VERSIONS[0], *, layout: str | None = LAYOUTS[0], **device: Any
) -> FakeTensorRT:
    """Put stand-ins for tensorrt, pycuda, cuda-python and libcuda into this process.

    Args:
        monkeypatch: takes them back.
        version: of TensorRT, one of `VERSIONS`.
        layout: of cuda-python, None leaves it out.
        device: of `FakeDevice`.
    """
    fake = FakeTensorRT(version, FakeDevice(**device))
    install_cuda(fake.device, monkeypatch, layout=layout)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr("edgeprune.plugins.loader._loaded", [])
    return fake


def other_process(folder: Path, version: str = VERSIONS[0], **faults: Any) -> dict[str, str]:
    """Return the environment of a Python process that has the stand-ins from its start, such as a worker.

    Args:
        folder: an empty one, for the module that Python loads first.
        version: of TensorRT.
        faults: of `Faults`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import sys

            class Finder:  # the stand-ins are made when the first of their names is imported
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ("tensorrt", "pycuda", "cuda"):
                        start()
                    return None

            def start():
                sys.meta_path.remove(finder)
                from tests.helpers import fake_trt
                fake_trt.start_process({version!r}, {faults!r})

            finder = Finder()
            import ctypes
            real = ctypes.CDLL

            def load(name, *args, **options):
                if str(name).startswith("libcuda.so") and finder in sys.meta_path:
                    start()
                    return ctypes.CDLL(name)
                return real(name, *args, **options)

            ctypes.CDLL = load
            sys.meta_path.insert(0, finder)
            """
        )
    )
    root = Path(__file__).resolve().parents[2]
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def start_process(version: str, faults: dict[str, Any]) -> None:
    """Install the stand-ins for good; called by what `other_process` writes."""
    patch = SimpleNamespace(
        setitem=lambda held, key, value: held.__setitem__(key, value),
        setattr=lambda *args: _set(*args),
    )
    fake = install(patch, version)  # type: ignore[arg-type]
    fake.faults = Faults(**faults)


def _set(target: Any, name: Any, *value: Any) -> None:
    if isinstance(target, str):  # monkeypatch.setattr("module.name", value)
        path, _, attribute = target.rpartition(".")
        __import__(path)
        setattr(sys.modules[path], attribute, name)
    else:
        setattr(target, name, *value)
