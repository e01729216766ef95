"""The TensorRT engines of a bundle: what `edgeprune build` wrote on this device, and finding it again.

Engines are a cache of the bundle's graphs. They lie under `engines/<device>-trt<version>/` inside the bundle, with an
`index.json` of their own, so that building changes no file the manifest lists. Each engine is a plain TensorRT plan.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeprune.errors import EnvironmentLackError
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.manifest import Count, Milliseconds, Sha256, Size
from edgeprune.runtime.onnx_files import find_external_locations

ENGINES_FOLDER = "engines"
INDEX_NAME = "index.json"
INDEX_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProfileInfo(_Model):
    """One optimization profile of an engine; it has one shape only: min = opt = max.

    Attributes:
        graph: the manifest's graph it runs: "model", "dense", "stem", "rest_48".
        batch: images.
        slots: the value of the shape input `slots`, of an engine that is told; None for another.
        median_ms: of one run, measured after building.
    """

    graph: str
    batch: Size
    slots: list[Count] | None = None
    median_ms: Milliseconds | None = None


class ProofInfo(_Model):
    """What the engine inspector says of an engine, see `edgeprune.export.trt.proof`.

    Attributes:
        layers: of the engine.
        precisions: layers by the type of their first output.
        attention_blocks: attentions of the graph.
        fused_attention: how many of them run as one fused kernel.
        hidden_attention: how many lie in layers that the inspector does not open.
        selection: names of the layers that choose tokens.
        reformats: layers that change a layout or type beside those.
        findings: what is not as it should be, in words.
    """

    layers: Count
    precisions: dict[str, Count]
    attention_blocks: Count
    fused_attention: Count
    hidden_attention: Count = 0
    selection: list[str] = []
    reformats: Count = 0
    findings: list[str] = []


class EngineInfo(_Model):
    """One engine.

    Attributes:
        file: beside the index.
        source: the manifest's graph it was built of; a variant of the one its profiles name, or the graph that is told.
        source_sha256: of that graph's file.
        weights_sha256: of the files with its weights, by name; None when it was not taken down.
        plugin: it needs the plugin library.
        key: of the engine cache.
        profiles: in TensorRT's order.
        scratch_bytes: device memory a context needs.
        build_s: seconds the build took; 0 from the cache.
    """

    file: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    sha256: Sha256
    bytes: Size
    source: str
    source_sha256: Sha256
    weights_sha256: dict[str, Sha256] | None = None
    plugin: bool = False
    key: str
    profiles: Annotated[list[ProfileInfo], Field(min_length=1)]
    scratch_bytes: Count
    build_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    proof: ProofInfo | None = None


class ChoiceInfo(_Model):
    """What was measured to choose, and what was chosen: "selection" or "engines" of a graph."""

    what: str
    graph: str
    chosen: str
    median_ms: dict[str, Milliseconds]


class EngineIndex(_Model):
    """All engines of a bundle for one device and one TensorRT."""

    schema_version: Literal[1] = 1
    tool: str = "edgeprune"
    tool_version: str
    created: str
    device: str
    compute_capability: str
    tensorrt: str
    plugin_sha256: Sha256 | None = None
    engines: list[EngineInfo]
    choices: list[ChoiceInfo] = []

    def serving(self, graph: str) -> Iterator[tuple[EngineInfo, int, ProfileInfo]]:
        """Yield the engines that run a graph with the number of the profile and the profile, smallest batch first."""
        found = [(e, i, p) for e in self.engines for i, p in enumerate(e.profiles) if p.graph == graph]
        yield from sorted(found, key=lambda entry: entry[2].batch)


def folder_name(device: str, tensorrt: str) -> str:
    """Return the name of the folder for a device and a TensorRT: "nvidia-orin-nano-trt10.3.0"."""
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-trt{tensorrt}"


def find_engines(bundle: Bundle, device: str, compute_capability: str, tensorrt: str) -> tuple[Path, EngineIndex]:
    """Return the folder with the engines for a device and a TensorRT, and its index.

    Raises:
        EnvironmentLackError: `engine-missing` when nothing was built, `engine-other-device` when it was built for
            others, `engine-stale` when the index is not understood.
    """
    folder = bundle.path / ENGINES_FOLDER / folder_name(device, tensorrt)
    if not (folder / INDEX_NAME).is_file():
        others = [other.name for other in engine_folders(bundle)]
        if others:
            raise _other_device(bundle, f"are for {', '.join(others)}", device, tensorrt)
        raise engine_missing(bundle, f"{bundle.path} has no engines", device=device, tensorrt=tensorrt)
    index = read_index(bundle, folder)
    if (index.device, index.compute_capability, index.tensorrt) != (device, compute_capability, tensorrt):
        built = f"{index.device} of compute capability {index.compute_capability} with TensorRT {index.tensorrt}"
        raise _other_device(bundle, f"in {folder} are for {built}", device, tensorrt)
    return folder, index


def engine_folders(bundle: Bundle) -> list[Path]:
    """Return the folders with engines of a bundle, for whatever device."""
    return sorted(path.parent for path in (bundle.path / ENGINES_FOLDER).glob(f"*/{INDEX_NAME}"))


def read_index(bundle: Bundle, folder: Path) -> EngineIndex:
    """Return the index in a folder of engines.

    Raises:
        EnvironmentLackError: `engine-stale` when it is not understood.
    """
    try:
        return EngineIndex.model_validate_json((folder / INDEX_NAME).read_bytes())
    except OSError as error:
        raise engine_stale(bundle, f"{folder / INDEX_NAME} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False)
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" + (f" (and {len(more)} more)" if more else "")
        raise engine_stale(bundle, f"{folder / INDEX_NAME} is not understood: {why}") from error


def check_source(bundle: Bundle, info: EngineInfo) -> None:
    """Raise EnvironmentLackError `engine-stale` when an engine was built of other files than the bundle holds."""
    manifest = bundle.manifest
    graph = manifest.graphs.get(info.source)
    if graph is None or graph.file not in manifest.files or manifest.files[graph.file].sha256 != info.source_sha256:
        raise engine_stale(bundle, f"the engine {info.file} was built of another graph '{info.source}'")
    if info.weights_sha256 is not None and info.weights_sha256 != hash_weights(bundle, info.source):
        raise engine_stale(bundle, f"the engine {info.file} was built of other weights")


def hash_weights(bundle: Bundle, graph: str) -> dict[str, str]:
    """Return the sha256 of the files with the weights of a graph, by name, as the manifest lists them."""
    file = bundle.manifest.graphs[graph].file
    folder, locations = posixpath.dirname(file), find_external_locations(bundle.path / file)
    names = {posixpath.normpath(posixpath.join(folder, location)) for location in locations}
    return {name: bundle.manifest.files[name].sha256 for name in sorted(names)}


def read_engine(bundle: Bundle, folder: Path, info: EngineInfo) -> bytes:
    """Return the plan of an engine, compared with its hash.

    Raises:
        EnvironmentLackError: `engine-missing`, `engine-stale`.
    """
    try:
        plan = (folder / info.file).read_bytes()
    except OSError as error:
        raise engine_missing(bundle, f"{folder / info.file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(plan).hexdigest() != info.sha256:
        raise engine_stale(bundle, f"{folder / info.file} is not the file its index describes")
    return plan


def engine_missing(bundle: Bundle, message: str, **details: Any) -> EnvironmentLackError:
    """Return the error `engine-missing`."""
    return _rebuild(bundle, message, "engine-missing", "engines built on this device", details)


def engine_stale(bundle: Bundle, message: str, **details: Any) -> EnvironmentLackError:
    """Return the error `engine-stale`."""
    return _rebuild(bundle, message, "engine-stale", "engines built of this very bundle", details)


def build_command(bundle: Bundle) -> str:
    """Return the command that builds the engines of a bundle."""
    return f"edgeprune build {shlex.quote(str(bundle.path))}"


def _other_device(bundle: Bundle, words: str, device: str, tensorrt: str) -> EnvironmentLackError:
    message, expected = f"the engines of {bundle.path} {words}", f"engines for {device} with TensorRT {tensorrt}"
    return _rebuild(bundle, message, "engine-other-device", expected, {"device": device, "tensorrt": tensorrt})


def _rebuild(bundle: Bundle, message: str, code: str, expected: str, details: dict[str, Any]) -> EnvironmentLackError:
    command = build_command(bundle)
    return EnvironmentLackError(
        message, code=code, expected=expected, hint=f"build them here: {command}", details={**details, "build": command}
    )
