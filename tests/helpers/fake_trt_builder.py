"""The half of the stand-in for TensorRT that parses and builds."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.helpers.fake_trt_common import asked_device, checked_logger, member, properties
from tests.helpers.fake_trt_graphs import KINDS, Model, encode, read_model

if TYPE_CHECKING:
    from tests.helpers.fake_trt import FakeTensorRT

LARGEST_K = 3840
LATER_OPS = {"Gelu", "Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}  # not in the parser of 8.6


def building(fake: FakeTensorRT) -> list[type]:
    module = fake.module

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = checked_logger(fake, logger)
            asked_device(fake, "Builder")

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
            return module.IHostMemory(encode({**network._plan(), **config._summary()}))

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
            self._flags.add(member(module.BuilderFlag, flag))

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(member(module.BuilderFlag, flag))

        def get_flag(self, flag: Any) -> bool:
            return member(module.BuilderFlag, flag) in self._flags

        @property
        def flags(self) -> int:
            return sum(1 << int(module.BuilderFlag[one]) for one in self._flags)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[member(module.MemoryPoolType, pool)] = int(pool_size)

        def get_memory_pool_limit(self, pool: Any) -> int:
            return self._pools.get(member(module.MemoryPoolType, pool), fake.device.total_bytes)

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            self._previews[member(module.PreviewFeature, feature)] = enable

        def get_preview_feature(self, feature: Any) -> bool:
            return self._previews.get(member(module.PreviewFeature, feature), False)

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
            properties(
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

        vars().update(properties(name="Unnamed Network"))

    class ITensor:
        def __init__(self, name: str, kind: str, shape: Sequence[int], shaped: bool) -> None:
            self._held = {"name": name, "dtype": module.DataType[kind]}
            self._shape, self._shaped = shape, shaped

        shape = property(lambda self: module.Dims(self._shape))
        is_shape_tensor = property(lambda self: self._shaped)
        is_execution_tensor = property(lambda self: not self._shaped)
        vars().update(properties(name="", dtype=None))

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

        vars().update(properties(name="", metadata=""))

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger = network, checked_logger(fake, logger)
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
