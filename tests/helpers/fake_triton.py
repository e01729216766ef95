"""A stand-in for Triton: it reads a model repository as the server does, and runs it with ONNX Runtime.

Every config.pbtxt is parsed with the published ModelConfig message; names, types and shapes of what goes in and comes
out are held against it. Python models get a stand-in of triton_python_backend_utils whose requests come back here.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

DTYPES = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_INT32": "int32", "TYPE_INT64": "int64"}
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
_numbers = itertools.count()


def read_config(folder: Path) -> Any:
    """Return the ModelConfig of a model's folder."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


class ModelError(Exception):
    """A response with an error."""


class FakeTriton:
    """A server with the models of a repository, loaded in an order that helps nobody.

    Attributes:
        calls: (model, images) of every run, those of routers too.
    """

    def __init__(self, repository: Path) -> None:
        self.calls: list[tuple[str, int]] = []
        self.configs = {folder.name: read_config(folder) for folder in sorted(repository.iterdir()) if folder.is_dir()}
        self.python: dict[str, Any] = {}
        self.graphs: dict[str, onnxruntime.InferenceSession] = {}
        for name, config in self.configs.items():
            folder = repository / name
            assert config.name == name
            assert (folder / "1" / FILES[config.backend]).is_file()
            if config.backend == "python":
                self.python[name] = load_python(folder / "1" / "model.py", utilities(self))
                self.python[name].initialize({"model_name": name})
            elif config.backend == "onnxruntime":
                self.graphs[name] = onnxruntime.InferenceSession(
                    str(folder / "1" / config.default_model_filename), providers=["CPUExecutionProvider"]
                )
        for name, config in self.configs.items():
            self._warm(repository / name, config)

    def infer(self, model: str, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return what a client gets for one request."""
        return self.infer_many(model, [images])[0]

    def infer_many(self, model: str, parts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return what clients get whose requests the dynamic batcher has put together."""
        config = self.configs[model]
        assert sum(map(len, parts)) <= max(config.max_batch_size, 1) or not config.max_batch_size
        if model not in self.python:
            return [self.run(model, {"images": part}) for part in parts]
        requests, names = [], [output.name for output in config.output]
        for part in parts:
            check(config, config.input, {"images": part})
            tensors = {"images": Tensor("images", part)}
            requests.append(SimpleNamespace(inputs=tensors, requested_output_names=lambda: names))
        self.calls.append((model, sum(map(len, parts))))
        responses = self.python[model].execute(requests)
        found = []
        for response in responses:
            if response.has_error():
                raise ModelError(response.error().message())
            outputs = {tensor.name: tensor.as_numpy() for tensor in response.outputs}
            check(config, config.output, outputs)
            found.append(outputs)
        return found

    def run(self, model: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph's model, as clients and routers do."""
        config, session = self.configs[model], self.graphs[model]
        check(config, config.input, feeds)
        self.calls.append((model, len(feeds.get("images", next(iter(feeds.values()))))))
        shapes = {value.name: value.shape for value in session.get_inputs()}
        values = session.run(None, {name: value.reshape(_as(shapes[name], value)) for name, value in feeds.items()})
        outputs = {info.name: value for info, value in zip(session.get_outputs(), values, strict=True)}
        reshaped = {o.name for o in config.output if o.HasField("reshape")}
        outputs = {name: value[:, None] if name in reshaped else value for name, value in outputs.items()}
        check(config, config.output, outputs)
        return outputs

    def _warm(self, folder: Path, config: Any) -> None:
        """Run the warm-up samples of a graph's model."""
        for sample in config.model_warmup if config.name in self.graphs else ():
            feeds = {}
            for name, given in sample.inputs.items():
                dtype = DTYPES[model_config_pb2.DataType.Name(given.data_type)]
                shape = ([sample.batch_size] if config.max_batch_size else []) + list(given.dims)
                if given.input_data_file:
                    raw = (folder / "warmup" / given.input_data_file).read_bytes()
                    feeds[name] = np.frombuffer(raw, dtype).reshape(shape)
                else:
                    assert given.zero_data
                    feeds[name] = np.zeros(shape, dtype)
            self.run(config.name, feeds)
        self.calls.clear()


def _as(shape: Sequence[Any], value: np.ndarray) -> tuple[int, ...]:
    """Return the shape of a value without the side that Triton added to it."""
    return value.shape[: len(shape)]


def check(config: Any, listed: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Hold tensors against `input` or `output` of a config."""
    assert set(tensors) == {info.name for info in listed}, config.name
    for info in listed:
        value = tensors[info.name]
        assert str(value.dtype) == DTYPES[model_config_pb2.DataType.Name(info.data_type)], info.name
        dims = [-1, *info.dims] if config.max_batch_size else list(info.dims)
        assert len(dims) == value.ndim, (config.name, info.name, dims, value.shape)
        assert all(side in (-1, real) for side, real in zip(dims, value.shape, strict=True)), (info.name, value.shape)


class Tensor:
    """A tensor of a Python model; what a response holds is gone once the response is."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        assert isinstance(value, np.ndarray) and value.flags.c_contiguous
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        return self.value


class Response:
    """An answer: tensors or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: Any = None) -> None:
        self.outputs, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class Failure:
    """What pb_utils.TritonError is."""

    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


def utilities(server: FakeTriton) -> ModuleType:
    """Return a stand-in for triton_python_backend_utils."""

    class InferenceRequest:
        def __init__(
            self,
            *,
            model_name: str,
            requested_output_names: Sequence[str],
            inputs: Sequence[Tensor],
            preferred_memory: Any,
        ) -> None:
            self.model, self.names, self.inputs = model_name, requested_output_names, inputs
            assert preferred_memory == ("memory", 0, 0)

        def exec(self) -> Response:
            feeds = {tensor.name: tensor.as_numpy().copy() for tensor in self.inputs}
            try:
                outputs = server.run(self.model, feeds)
            except Exception as error:
                return Response(error=Failure(str(error)))
            return Response([Tensor(name, np.ascontiguousarray(outputs[name])) for name in self.names])

    made = ModuleType("triton_python_backend_utils")
    made.__dict__.update(
        InferenceRequest=InferenceRequest,
        InferenceResponse=Response,
        Tensor=Tensor,
        TritonError=Failure,
        TritonModelException=RuntimeError,
        TRITONSERVER_MEMORY_CPU=0,
        PreferredMemory=lambda kind, number: ("memory", kind, number),
        get_input_tensor_by_name=lambda request, name: request.inputs[name],
        get_output_tensor_by_name=lambda response, name: next(t for t in response.outputs if t.name == name),
    )
    return made


def load_python(path: Path, pb_utils: ModuleType) -> Any:
    """Return the TritonPythonModel of a model.py."""
    sys.modules["triton_python_backend_utils"] = pb_utils
    try:
        spec = importlib.util.spec_from_file_location(f"triton_model_{next(_numbers)}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    return module.TritonPythonModel()
