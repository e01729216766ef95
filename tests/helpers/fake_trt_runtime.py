"""The half of the stand-in for TensorRT that loads engines and runs them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from tests.helpers.fake_cuda import ALIGNMENT, CudaFailure, Work, host_view
from tests.helpers.fake_trt_common import asked_device, checked_logger, member, properties
from tests.helpers.fake_trt_graphs import KINDS, NUMPY, Tensor, computer_of, encode, read_model, read_plan

if TYPE_CHECKING:
    from tests.helpers.fake_trt import FakeTensorRT


def running(fake: FakeTensorRT) -> list[type]:
    module, device = fake.module, fake.device

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger, self._held = checked_logger(fake, logger), {}
            asked_device(fake, "Runtime")
            if fake.faults.runtime:
                fake.error(self._logger, f"CUDA initialization failure with error: 35. {fake.faults.reason}")
                if fake.old:
                    raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            if fake.faults.runtime:
                raise AssertionError("a real runtime without a device ends the process here")
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
        vars().update(properties(max_threads=1, engine_host_code_allowed=False))

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
                computer = computer_of(source, source.stat().st_mtime)
            else:
                computer = computer_of(Path(), 0.0, base64.b64decode(self._plan["model_bytes"]))
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
            return module.IHostMemory(encode(self._plan))

    class EngineInspector:
        def __init__(self, engine: Any) -> None:
            self._engine, self._held = engine, {}

        def get_engine_information(self, format: Any) -> str:
            member(module.LayerInformationFormat, format)
            return fake.inspector or _inspect(self._engine)

        vars().update(properties(execution_context=None))

    class IExecutionContext:
        def __init__(self, engine: Any, own: int | None) -> None:
            self._engine, self._logger, self._held = engine, engine._logger, {}
            self._memory, self._memory_size = own, None if own is None else engine._own_size()
            self._owns = own is not None
            self._addresses: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._warm: Any = None
            self._profiler: Any = None
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
            fails = fake.faults.execute or (fake.faults.capture and device.capturing(handle))
            wrong = fake.faults.reason if fails else self._why_not_run(handle)
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
            if self._profiler is not None and self.enqueue_emits_profile:
                device.flush(handle)
                self._report()
            return True

        def _report(self) -> None:
            mark = f" [profile {self._profile}]" if self._profile else ""
            for name in _layer_names(self._engine):
                self._profiler.report_layer_time(f"{name}{mark}", fake.layer_ms.get(name, 0.125))

        @property
        def profiler(self) -> Any:
            return self._profiler

        @profiler.setter
        def profiler(self, profiler: Any) -> None:
            if not isinstance(profiler, module.IProfiler) or not getattr(profiler, "_ready", False):
                raise TypeError("incompatible function arguments: a profiler is wanted, its base class initialised")
            self._profiler = profiler

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
            if device.capturing(handle) and self._profiler is not None:
                return "a context whose layers are timed waits for them, which cannot be captured"
            return None

        def report_to_profiler(self) -> bool:
            return True

        vars().update(properties(name="", enqueue_emits_profile=True, nvtx_verbosity=None))

    return [Runtime, ICudaEngine, EngineInspector, IExecutionContext]


def _inspect(engine: Any) -> str:
    """Return what the inspector says of an engine: one layer per node, attention as one fused layer."""
    nodes, names = engine._model.proto.graph.node, _layer_names(engine)
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


def _layer_names(engine: Any) -> list[str]:
    return [
        f"_gemm_mha_v2_{node.name}" if node.op_type == "Softmax" else node.name or node.output[0]
        for node in engine._model.proto.graph.node
    ]
