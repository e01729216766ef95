"""Triton models of a bundle's graphs: their config.pbtxt and files. Of ONNX files or of TensorRT engines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import (
    ENGINES_FOLDER,
    EngineIndex,
    EngineInfo,
    ProfileInfo,
    check_source,
    engine_folders,
    engine_missing,
    read_index,
)
from edgeprune.runtime.manifest import TensorInfo
from edgeprune.runtime.onnx_files import find_external_locations
from edgeprune.runtime.router import SLOTS
from edgeprune.serving.pbtxt import Word, data_type

VERSION_FOLDER = "1"
CPU, GPU = Word("KIND_CPU"), Word("KIND_GPU")
_ON_GPU = ("ort-cuda-fp16",)
Pairs = list[tuple[str, list[int]]]


@dataclass(frozen=True)
class TritonModel:
    """One folder of a model repository.

    Attributes:
        name: of the folder.
        config: the fields of its config.pbtxt.
        files: by their path in the folder, copies of files or bytes.
    """

    name: str
    config: dict[str, Any]
    files: dict[str, Path | bytes]


@dataclass
class Settings:
    """What all models of a repository share.

    Attributes:
        name: what their names begin with.
        instances: of each model.
        threads: of one run in ONNX Runtime; 0 for its own choice.
        delay_us: microseconds a request waits for others to make a batch.
    """

    name: str
    instances: int = 1
    threads: int = 0
    delay_us: int = 0


class Graphs(Protocol):
    """Where the graphs of a bundle come from."""

    models: list[TritonModel]

    def inputs(self, graph: str) -> list[TensorInfo]:
        """Return what a graph takes; one that is told its slots takes them too."""
        ...

    def outputs(self, graph: str) -> list[TensorInfo]:
        """Return what a graph gives."""
        ...

    def component(self, graph: str) -> Pairs:
        """Make the models that run a graph for a front; return (name, the batches it takes, none for any)."""
        ...

    def alone(self, name: str, graph: str, labels: bool) -> TritonModel | None:
        """Return the model that serves a graph by itself, None when its batches want a front."""
        ...

    def largest(self, graph: str) -> int:
        """Return the most images a run takes."""
        ...


@dataclass
class OnnxGraphs:
    """The graphs of a bundle in ONNX Runtime."""

    bundle: Bundle
    settings: Settings
    models: list[TritonModel] = field(default_factory=list)

    def inputs(self, graph: str) -> list[TensorInfo]:
        """Return what a graph takes."""
        return self.bundle.manifest.graphs[graph].inputs

    def outputs(self, graph: str) -> list[TensorInfo]:
        """Return what a graph gives."""
        return self.bundle.manifest.graphs[graph].outputs

    def component(self, graph: str) -> Pairs:
        """Make the model of a graph, with the batch as a dimension like any other."""
        name = f"{self.settings.name}_{graph}"
        batch = batch_of(self.inputs(graph))
        if name not in [model.name for model in self.models]:
            self.models.append(self._model(name, graph, max_batch=0))
        return [(name, [] if batch == -1 else [batch])]

    def alone(self, name: str, graph: str, labels: bool) -> TritonModel | None:
        """Return the model that serves a graph by itself: of one image, or with batches Triton makes."""
        batch = batch_of(self.inputs(graph))
        if batch not in (-1, 1):
            return None
        return self._model(name, graph, max_batch=self.largest(graph) if batch == -1 else 0, labels=labels)

    def largest(self, graph: str) -> int:
        """Return the bundle's largest batch: a router takes it apart where a graph takes less."""
        return self.bundle.manifest.batch[1]

    def _model(self, name: str, graph: str, *, max_batch: int, labels: bool = False) -> TritonModel:
        path = self.bundle.graph_path(graph)
        kind = GPU if self.bundle.manifest.target in _ON_GPU else CPU
        inputs = self.inputs(graph)
        config = {
            "name": name,
            "backend": "onnxruntime",
            "default_model_filename": "model.onnx",
            "max_batch_size": max_batch,
            "input": [tensor_fields(info, max_batch > 0) for info in inputs],
            "output": [tensor_fields(info, max_batch > 0, labels) for info in self.outputs(graph)],
            "instance_group": [{"count": self.settings.instances, "kind": kind}],
            **batching_fields(max_batch, self.settings.delay_us),
        }
        if self.settings.threads:
            threads = {"string_value": str(self.settings.threads)}
            config["parameters"] = [{"key": "intra_op_thread_count", "value": threads}]
        files: dict[str, Path | bytes] = {f"{VERSION_FOLDER}/model.onnx": path}
        for location in sorted(find_external_locations(path)):
            files[f"{VERSION_FOLDER}/{location}"] = path.parent / location
        told = any(info.name == SLOTS for info in inputs)
        runs = [(abs(batch_of(inputs)), slots_of(self.bundle, graph) if told else None)]  # any batch: one image
        samples, more = warmup(inputs, runs, batched=max_batch > 0)
        return TritonModel(name, {**config, "model_warmup": samples}, {**files, **more})


@dataclass
class EngineGraphs:
    """The graphs of a bundle in TensorRT, on engines that were built of them.

    Attributes:
        folder, index: the engines.
    """

    bundle: Bundle
    settings: Settings
    folder: Path
    index: EngineIndex
    models: list[TritonModel] = field(default_factory=list)

    def inputs(self, graph: str) -> list[TensorInfo]:
        """Return what the engines of a graph take."""
        return self._tensors(self._serving(graph)[0][0], "inputs")

    def outputs(self, graph: str) -> list[TensorInfo]:
        """Return what the engines of a graph give."""
        return self._tensors(self._serving(graph)[0][0], "outputs")

    def component(self, graph: str) -> Pairs:
        """Make the models of a graph's engines; an engine that runs several graphs is one model."""
        batches: dict[str, list[int]] = {}
        for info, profile in self._serving(graph):
            name = f"{self.settings.name}_{Path(info.file).stem}"
            if name not in [model.name for model in self.models]:
                self.models.append(self._model(name, info))
            batches.setdefault(name, []).append(profile.batch)
        return list(batches.items())

    def alone(self, name: str, graph: str, labels: bool) -> TritonModel | None:
        """Return the model that serves a graph by itself: on an engine of one profile for one image."""
        serving = self._serving(graph)
        if len(serving) > 1 or serving[0][1].batch != 1:
            return None
        return self._model(name, serving[0][0], labels)

    def largest(self, graph: str) -> int:
        """Return the most images there is an engine for."""
        return max(profile.batch for _, profile in self._serving(graph))

    def uses_plugin(self, fronts: Sequence[TritonModel]) -> bool:
        """Tell whether an engine that is served, by itself or behind a front, needs the plugin."""
        served = [model.files.get(f"{VERSION_FOLDER}/model.plan") for model in (*fronts, *self.models)]
        return any(info.plugin and self.folder / info.file in served for info in self.index.engines)

    def _serving(self, graph: str) -> list[tuple[EngineInfo, ProfileInfo]]:
        """Return the fastest engine for every batch of a graph.

        Raises:
            EnvironmentLackError: `engine-missing`.
        """
        best: dict[int, tuple[EngineInfo, ProfileInfo]] = {}
        for info, _, profile in self.index.serving(graph):
            if profile.batch not in best or _time(profile) < _time(best[profile.batch][1]):
                best[profile.batch] = (info, profile)
        if not best:
            raise engine_missing(self.bundle, f"no engine in {self.folder} runs '{graph}'", graph=graph)
        return list(best.values())

    def _tensors(self, info: EngineInfo, side: str) -> list[TensorInfo]:
        """Return the inputs or outputs of an engine. TensorRT before 9 has no int64."""
        tensors: list[TensorInfo] = getattr(self.bundle.manifest.graphs[info.source], side)
        if int(self.index.tensorrt.split(".")[0]) >= 9:
            return tensors
        return [one.model_copy(update={"dtype": "int32"}) if one.dtype == "int64" else one for one in tensors]

    def _model(self, name: str, info: EngineInfo, labels: bool = False) -> TritonModel:
        check_source(self.bundle, info)
        inputs = self._tensors(info, "inputs")
        told = [{**tensor_fields(i, False), **({"is_shape_tensor": True} if i.name == SLOTS else {})} for i in inputs]
        profiles = [str(number) for number in range(len(info.profiles))]
        runs = [(profile.batch, profile.slots) for profile in info.profiles]
        samples, more = warmup(inputs, runs, batched=False)
        config = {
            "name": name,
            "backend": "tensorrt",
            "default_model_filename": "model.plan",
            "max_batch_size": 0,
            "input": told,
            "output": [tensor_fields(one, False, labels) for one in self._tensors(info, "outputs")],
            "instance_group": [{"count": self.settings.instances, "kind": GPU, "profile": profiles}],
            "model_warmup": samples,
        }
        return TritonModel(name, config, {f"{VERSION_FOLDER}/model.plan": self.folder / info.file, **more})


def choose_engines(bundle: Bundle, wanted: str | None) -> tuple[Path, EngineIndex]:
    """Return the folder of a bundle's engines, and its index.

    Args:
        bundle: for a target of TensorRT.
        wanted: name of the folder; None when there is only one.

    Raises:
        EnvironmentLackError: `engine-missing` when nothing was built, `engine-stale` when the index is not understood.
        InputError: `engines` when the folder is not there, or not the only one.
    """
    names = [folder.name for folder in engine_folders(bundle)]
    if not names:
        raise engine_missing(bundle, f"{bundle.path} has no engines")
    if wanted not in names and (wanted is not None or len(names) > 1):
        what = "engines of several devices" if wanted is None else f"no engines '{wanted}'"
        raise InputError(
            f"{bundle.path} has {what}",
            code="engines",
            expected=f"one of {', '.join(names)}",
            hint=f"--engines {names[0]}",
            details={"engines": names},
        )
    folder = bundle.path / ENGINES_FOLDER / (wanted or names[0])
    return folder, read_index(bundle, folder)


def batch_of(inputs: Sequence[TensorInfo]) -> int:
    """Return the batch a graph is fixed to, -1 when it takes any."""
    return next(info.shape[0] for info in inputs if info.name != SLOTS)


def slots_of(bundle: Bundle, graph: str) -> list[int]:
    """Return slots a graph may be told: the most it is ever asked for."""
    manifest = bundle.manifest
    for density in manifest.densities:
        if density.graph == graph:
            return [stage.kept for stage in density.stages]
    return [stage.kept for stage in manifest.method.stages]


def tensor_fields(info: TensorInfo, batched: bool, labels: bool = False) -> dict[str, Any]:
    """Return an entry of `input` or `output`.

    Args:
        info: the tensor; its first side is the batch.
        batched: the batch is Triton's and not among the dimensions.
        labels: the logits have names.
    """
    dims = info.shape[1:] if batched else info.shape
    fields: dict[str, Any] = {"name": info.name, "data_type": data_type(info.dtype), "dims": dims or [1]}
    if not dims:  # one number for each image
        fields["reshape"] = {"shape": dims}
    if labels and info.name == "logits":
        fields["label_filename"] = "labels.txt"
    return fields


def batching_fields(max_batch: int, delay_us: int) -> dict[str, Any]:
    """Return `dynamic_batching` of a model that takes batches: powers of two, and the largest, are preferred."""
    if max_batch < 2:
        return {}
    sizes = sorted({1 << power for power in range(1, max_batch.bit_length()) if 1 << power <= max_batch} | {max_batch})
    return {"dynamic_batching": {"preferred_batch_size": sizes, "max_queue_delay_microseconds": delay_us}}


def warmup(
    inputs: Sequence[TensorInfo], runs: Iterable[tuple[int, Sequence[int] | None]], *, batched: bool
) -> tuple[list[dict[str, Any]], dict[str, Path | bytes]]:
    """Return `model_warmup` on zeros, and the files it reads.

    Args:
        inputs: of the graph.
        runs: (images, slots to be told or None), one sample for each.
        batched: the batch is Triton's.
    """
    samples, files = [], dict[str, Path | bytes]()
    for batch, slots in runs:
        entries = []
        name = "_".join(["zeros", str(batch), *map(str, slots or [])])
        for info in inputs:
            if info.name == SLOTS:
                source: dict[str, Any] = {"input_data_file": name}
                files[f"warmup/{name}"] = np.asarray(slots, info.dtype).tobytes()
                dims = info.shape
            else:
                source = {"zero_data": True}
                dims = info.shape[1:] if batched else [batch, *info.shape[1:]]
            value = {"data_type": data_type(info.dtype), "dims": dims or [1], **source}
            entries.append({"key": info.name, "value": value})
        samples.append({"name": name, "batch_size": batch if batched else 1, "inputs": entries})
    return samples, files


def route_file(route: dict[str, Any]) -> bytes:
    """Return route.json."""
    return (json.dumps(route, indent=2) + "\n").encode()


def _time(profile: ProfileInfo) -> float:
    return float("inf") if profile.median_ms is None else profile.median_ms
