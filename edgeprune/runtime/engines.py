"""The TensorRT engines of a bundle: what `edgeprune build` wrote on this device, and finding it again.

Engines are a cache of the bundle's graphs. They lie under `engines/<device>-trt<version>/` inside the bundle, with an
`index.json` of their own, so that building changes no file the manifest lists. Each engine is a plain TensorRT plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgeprune.runtime.manifest import Count, Milliseconds, Sha256, Size

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
        plugin: it needs the plugin library.
        key: of the engine cache.
        profiles: in TensorRT's order.
        scratch_bytes: device memory a context needs.
        build_s: seconds the build took; 0 from the cache.
    """

    file: str
    sha256: Sha256
    bytes: Size
    source: str
    source_sha256: Sha256
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
