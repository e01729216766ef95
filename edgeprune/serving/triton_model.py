"""The Python model in front of a bundle's graphs in Triton: it routes a batch as `edgeprune.runtime.router` does.

`edgeprune serve-repo` copies this file as model.py into a model repository, beside router.py, which is that very
module, and route.json, which names the graphs. It needs numpy alone: edgeprune is not installed there. Triton gathers
requests into batches; all images of a batch are routed together, whichever requests they came with.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent


def load_router() -> ModuleType:
    """Return the router beside this file, whatever else may be called router."""
    name = f"edgeprune_router_{abs(hash(HERE))}"
    spec = importlib.util.spec_from_file_location(name, HERE / "router.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{HERE} has no router.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Tensor(NamedTuple):
    """An input or output of a graph; -1 marks a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int]


class TritonBackend:
    """One graph, run by one of Triton's models or several that differ in the batch they take.

    Args:
        graph: its entry in route.json: `inputs`, `outputs`, and `models`: pairs of a model's name and the batches it
            takes, none for any.
    """

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self.inputs = [Tensor(**info) for info in graph["inputs"]]
        self.outputs = [Tensor(**info) for info in graph["outputs"]]
        self._dtypes = {info.name: info.dtype for info in self.inputs}
        self._any = next((model for model, batches in graph["models"] if not batches), None)
        self._sizes = sorted((batch, model) for model, batches in graph["models"] for batch in batches)

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, np.ndarray]:
        """Return every output by name; a batch no engine was built for is filled up with its last image."""
        rows = next(len(value) for name, value in feeds.items() if name != "slots")
        size, model = self._choose(rows)
        inputs = [pb_utils.Tensor(name, self._input(name, value, size)) for name, value in feeds.items()]
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[info.name for info in self.outputs],
            inputs=inputs,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
        found = {}
        for info in self.outputs:
            tensor = pb_utils.get_output_tensor_by_name(response, info.name)
            found[info.name] = np.array(tensor.as_numpy())[:rows]  # a copy: the memory goes with the response
        return found

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return some parts as one array."""
        return np.concatenate(parts)

    def _choose(self, rows: int) -> tuple[int, str]:
        for batch, model in self._sizes:
            if batch >= rows:
                return batch, model
        if self._any is None:
            raise pb_utils.TritonModelException(f"{rows} images, where the largest engine takes {self._sizes[-1][0]}")
        return rows, self._any

    def _input(self, name: str, value: np.ndarray, size: int) -> np.ndarray:
        if name != "slots" and len(value) < size:
            value = np.concatenate([value, np.repeat(value[-1:], size - len(value), 0)])
        return np.ascontiguousarray(value, np.dtype(self._dtypes[name]))


def make_runner(router: ModuleType, route: Mapping[str, Any]) -> Any:
    """Return what route.json asks for: a `Router`, a `OneByOne` or a `Whole`."""
    graphs = {name: TritonBackend(graph) for name, graph in route["graphs"].items()}
    if route["form"] == "buckets":
        rests = [graphs[name] for name in route["rests"]]
        return router.Router(graphs["stem"], rests, route["buckets"], fill=route["fill"])
    (backend,) = graphs.values()
    if route["form"] == "computed":
        return router.OneByOne(backend, route["slots"])
    return router.Whole(backend, route["slots"])


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read route.json; no model is called yet, since Triton may load them later."""
        route = json.loads((HERE / "route.json").read_text(encoding="utf-8"))
        self.outputs = route["outputs"]
        self.runner = make_runner(load_router(), route)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response for every request, from one run over the images of all."""
        parts = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        try:
            found = self.runner.run(parts[0] if len(parts) == 1 else np.concatenate(parts))
        except Exception as error:  # whatever it is, each request is answered
            failure = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        return list(self._answers(requests, parts, found))

    def _answers(
        self, requests: Sequence[Any], parts: Sequence[np.ndarray], found: Mapping[str, np.ndarray]
    ) -> Iterator[Any]:
        at = 0
        for request, part in zip(requests, parts, strict=True):
            wanted = set(request.requested_output_names())
            tensors = []
            for name in self.outputs:
                if name in wanted:
                    rows = found[name][at : at + len(part)]
                    column = rows[:, None] if rows.ndim == 1 else rows  # Triton has no shape of the batch alone
                    tensors.append(pb_utils.Tensor(name, np.ascontiguousarray(column)))
            at += len(part)
            yield pb_utils.InferenceResponse(output_tensors=tensors)
