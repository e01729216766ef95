"""A model repository of Triton from a bundle: one model for every graph, and in front of them what routes a batch.

Everything Triton reads is written out, nothing is left to its guesses: it runs with --disable-auto-complete-config.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.plugins.contract import build_command, library_for
from edgeprune.plugins.locate import chosen, find_candidates, is_shared_library
from edgeprune.runtime import router
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.folders import FolderWriter
from edgeprune.runtime.manifest import StageInfo, TensorInfo
from edgeprune.runtime.opener import ENGINE_TARGETS
from edgeprune.runtime.router import BUCKET, KEPT, OVERFLOW, SLOTS
from edgeprune.serving.models import (
    CPU,
    VERSION_FOLDER,
    EngineGraphs,
    Graphs,
    OnnxGraphs,
    Settings,
    TritonModel,
    batching_fields,
    choose_engines,
    route_file,
    tensor_fields,
)
from edgeprune.serving.pbtxt import render
from edgeprune.serving.readme import readme
from edgeprune.version import __version__

ABOUT_NAME = "edgeprune.json"
KIND = "triton-model-repository"
CONFIG_NAME = "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ServeOptions:
    """How a bundle is served.

    Attributes:
        name: of the model clients call; by default that of the bundle's folder.
        instances: of each model, runs at once.
        threads: of a run in ONNX Runtime; 0 for its own choice.
        delay_us: microseconds a request waits for others to make a batch.
        dense: serve the dense baseline as well.
        engines: folder of the engines, of a bundle for TensorRT that was built on several devices.
        plugin: library for engines that need the plugin; by default the one that is found here.
    """

    name: str | None = None
    instances: int = 1
    threads: int = 0
    delay_us: int = 0
    dense: bool = False
    engines: str | None = None
    plugin: Path | None = None


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        path: its folder.
        models: (name, what it is, backend) of every model, those clients call first.
        public: names of those.
        tensorrt: version that built the engines, None without.
        plugin: file name of the plugin library, None when none is needed.
    """

    path: Path
    models: tuple[tuple[str, str, str], ...]
    public: tuple[str, ...]
    tensorrt: str | None
    plugin: str | None


class RepositoryWriter(FolderWriter):
    """Writes a repository whole or not at all."""

    kind = "repository"
    size = "the weights"

    def is_ours(self, path: Path) -> bool:
        """Tell whether a directory is a repository of ours."""
        try:
            data = json.loads((path / ABOUT_NAME).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(data, dict) and data.get("tool") == "edgeprune" and data.get("kind") == KIND


def write_repository(bundle: Bundle, out: Path, options: ServeOptions, *, overwrite: bool = False) -> Repository:
    """Write the model repository of a bundle.

    Raises:
        InputError: `serving-name`, `serving-bfloat16`, `engines`, `graph-missing`, those of `FolderWriter`.
        EnvironmentLackError: `engine-missing`, `engine-stale`, `plugin-missing`, `plugin-not-registering`.
    """
    settings = Settings(_name(bundle, options.name), options.instances, options.threads, options.delay_us)
    graphs = _open(bundle, settings, options.engines)
    fronts = [_front(graphs, bundle, settings, *one) for one in _public(bundle, settings.name, options.dense)]
    models = [*fronts, *graphs.models]
    plugin = _plugin(graphs, fronts, options.plugin)
    tensorrt = graphs.index.tensorrt if isinstance(graphs, EngineGraphs) else None
    written = Repository(
        out,
        tuple((model.name, _what(model), str(model.config["backend"])) for model in models),
        tuple(model.name for model in fronts),
        tensorrt,
        None if plugin is None else plugin.name,
    )
    with RepositoryWriter(out, overwrite=overwrite) as writer:
        placed = dict[Path, Path]()
        for model in models:
            _write(writer.path / model.name, model, placed)
        if plugin is not None:
            shutil.copyfile(plugin, writer.path / plugin.name)
        texts = {
            "README.md": readme(bundle, written),
            "client.py": Path(__file__).with_name("triton_client.py").read_text(encoding="utf-8"),
            ABOUT_NAME: json.dumps(_about(bundle, written), indent=2) + "\n",
        }
        for name, text in texts.items():
            (writer.path / name).write_text(text, encoding="utf-8")
        writer.commit(sorted(p.relative_to(writer.path).as_posix() for p in writer.path.rglob("*") if p.is_file()))
    return written


def _name(bundle: Bundle, wanted: str | None) -> str:
    """Return the name of the model clients call."""
    if wanted is None:
        cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "_", bundle.path.resolve().name).lstrip("_.-")
        return cleaned or bundle.manifest.model.name
    if not _NAME.fullmatch(wanted):
        raise InputError(
            f"'{wanted}' is no name for a model",
            code="serving-name",
            expected="letters, digits, '_', '.' and '-', the first a letter or digit",
            hint=f"--name {bundle.manifest.model.name}",
        )
    return wanted


def _open(bundle: Bundle, settings: Settings, engines: str | None) -> OnnxGraphs | EngineGraphs:
    if bundle.manifest.target not in ENGINE_TARGETS:
        return OnnxGraphs(bundle, settings)
    return EngineGraphs(bundle, settings, *choose_engines(bundle, engines))


def _public(bundle: Bundle, name: str, dense: bool) -> Iterator[tuple[str, str, str, list[StageInfo]]]:
    """Yield (name, form, graph, stages) of every model clients call, as `Opener.runners` has them."""
    manifest = bundle.manifest
    adaptive = manifest.adaptive
    form = "computed" if adaptive is not None and adaptive.form == "computed" else "whole"
    if manifest.densities:
        for density in manifest.densities:
            own = form if density.stages else "whole"
            yield f"{name}_{density.keep_rate:g}", own, density.graph, density.stages
    elif adaptive is not None and adaptive.form == "buckets":
        yield name, "buckets", "stem", manifest.method.stages
    else:
        yield name, form if manifest.method.stages else "whole", "model", manifest.method.stages
    if dense:
        bundle.graph_path("dense")  # refuses what is not there
        yield f"{name}_dense", "whole", "dense", []


def _front(
    graphs: Graphs, bundle: Bundle, settings: Settings, name: str, form: str, graph: str, stages: Sequence[StageInfo]
) -> TritonModel:
    """Return the model clients call: the graph itself where that does, else a router in front of it."""
    labels = bundle.manifest.labels is not None
    told = any(info.name == SLOTS for info in graphs.inputs(graph))
    model = graphs.alone(name, graph, labels) if form == "whole" and not told else None
    if model is None:
        slots = [stage.kept for stage in stages] if told or form == "computed" else None
        model = _router(graphs, bundle, settings, name, form, graph, slots)
    return _with_labels(model, bundle.manifest.labels)


def _router(
    graphs: Graphs, bundle: Bundle, settings: Settings, name: str, form: str, graph: str, slots: list[int] | None
) -> TritonModel:
    """Return a Python model that runs the graphs through Triton."""
    adaptive = bundle.manifest.adaptive
    buckets = adaptive.buckets if adaptive is not None and form == "buckets" else []
    rests = [bucket.graph for bucket in buckets]
    outputs = list(graphs.outputs(rests[0] if rests else graph))
    if rests:
        _refuse_bfloat16(graphs.outputs(graph))
        outputs = [one for one in outputs if one.name not in (OVERFLOW, BUCKET)]
        outputs += [TensorInfo(name=extra, dtype="int32", shape=[-1]) for extra in (OVERFLOW, BUCKET)]
    names = list(dict.fromkeys([graph, *rests]))
    route = {
        "form": form,
        "slots": slots,
        "buckets": [bucket.capacities for bucket in buckets],
        "fill": adaptive is not None and adaptive.fill == "next-best",
        "rests": rests,
        "outputs": [one.name for one in outputs],
        "graphs": {one: _route_graph(graphs, one) for one in names},
    }
    images = next(one for one in graphs.inputs(graph) if one.name == router.IMAGES)
    largest = min(graphs.largest(one) for one in names)
    config = {
        "name": name,
        "backend": "python",
        "max_batch_size": largest,
        "input": [tensor_fields(images, True)],
        "output": [_output_fields(one, bundle.manifest.labels is not None) for one in outputs],
        "instance_group": [{"count": settings.instances, "kind": CPU}],
        **batching_fields(largest, settings.delay_us),
    }
    source = Path(router.__file__)
    files: dict[str, Path | bytes] = {
        f"{VERSION_FOLDER}/model.py": Path(__file__).with_name("triton_model.py"),
        f"{VERSION_FOLDER}/router.py": source,
        f"{VERSION_FOLDER}/route.json": route_file(route),
    }
    return TritonModel(name, config, files)


def _route_graph(graphs: Graphs, graph: str) -> dict[str, Any]:
    return {
        "inputs": [one.model_dump() for one in graphs.inputs(graph)],
        "outputs": [one.model_dump() for one in graphs.outputs(graph)],
        "models": graphs.component(graph),
    }


def _output_fields(info: TensorInfo, labels: bool) -> dict[str, Any]:
    """Return an output of a router: kept tokens are as wide as they come, one number an image is a column."""
    fields = tensor_fields(info, True, labels)
    fields.pop("reshape", None)
    if info.name.startswith(KEPT):
        fields["dims"] = [-1]
    return fields


def _refuse_bfloat16(handed: Sequence[TensorInfo]) -> None:
    wrong = [one.name for one in handed if one.dtype == "bfloat16"]
    if wrong:
        raise InputError(
            f"the stem hands over {', '.join(wrong)} in bfloat16, which Triton's Python models cannot pass on",
            code="serving-bfloat16",
            expected="buckets in float16 or float32",
            hint="export with --target trt-fp16",
            details={"tensors": wrong},
        )


def _with_labels(model: TritonModel, labels: Sequence[str] | None) -> TritonModel:
    if labels is None:
        return model
    text = "".join(" ".join(label.split()) + "\n" for label in labels)
    return TritonModel(model.name, model.config, {**model.files, "labels.txt": text.encode()})


def _plugin(graphs: Graphs, fronts: Sequence[TritonModel], given: Path | None) -> Path | None:
    """Return the plugin library for the engines, None when they need none.

    Raises:
        EnvironmentLackError: `plugin-missing`, `plugin-not-registering` when it would do nothing inside Triton.
    """
    if not isinstance(graphs, EngineGraphs) or not graphs.uses_plugin(fronts):
        return None
    library = library_for(graphs.index.tensorrt)
    found = chosen(find_candidates(library))
    path = given or (found.path if found is not None else None)
    command = f"{build_command()} --self-register"
    if path is None or not path.is_file() or not is_shared_library(path):
        raise EnvironmentLackError(
            f"the engines need the plugin, and there is no {library.file}" + (f" at {given}" if given else ""),
            code="plugin-missing",
            expected=f"{library.file}, built to register itself",
            hint=f"{command}, or build engines without it: edgeprune build --selection native",
        )
    if b"libnvinfer.so" not in path.read_bytes():  # not linked to TensorRT, so it cannot reach the registry
        raise EnvironmentLackError(
            f"{path} does not register itself, and Triton only opens it",
            code="plugin-not-registering",
            expected=f"{library.file} linked to the TensorRT that Triton has",
            hint=f"{command} in an image of that TensorRT, then --plugin FILE",
        )
    return path


def _write(folder: Path, model: TritonModel, placed: dict[Path, Path]) -> None:
    """Write one model's folder; a file that was copied before is linked to, since graphs share their weights."""
    for name, content in model.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
            continue
        source = content.resolve()
        if source in placed:
            try:
                os.link(placed[source], target)
                continue
            except OSError:  # a file system without hard links
                pass
        shutil.copyfile(source, target)
        placed[source] = target
    (folder / CONFIG_NAME).write_text(render(model.config), encoding="utf-8")


def _what(model: TritonModel) -> str:
    """Return what a model is, in words."""
    config = model.config
    if config["backend"] == "python":
        route = json.loads(_bytes(model.files[f"{VERSION_FOLDER}/route.json"]))
        words = {"buckets": "routes to buckets", "computed": "image by image", "whole": "fills batches up"}
        return words[route["form"]] if route["slots"] is None or route["form"] != "whole" else "sets the token counts"
    return "graph" if config["backend"] == "onnxruntime" else "engine"


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _about(bundle: Bundle, written: Repository) -> dict[str, Any]:
    """Return edgeprune.json: where the repository comes from, and how an image becomes an input."""
    manifest = bundle.manifest
    return {
        "tool": "edgeprune",
        "kind": KIND,
        "tool_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bundle": {
            "created": manifest.created,
            "model": manifest.model.name,
            "method": manifest.method.name,
            "target": manifest.target,
            "weights": manifest.weights.source,
            "graphs": {name: manifest.files[info.file].sha256 for name, info in sorted(manifest.graphs.items())},
        },
        "tensorrt": written.tensorrt,
        "models": list(written.public),
        "preprocessing": manifest.preprocessing.model_dump(mode="json"),
        "labels": manifest.labels,
    }
