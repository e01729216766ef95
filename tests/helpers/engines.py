"""Engines of the stand-in for TensorRT inside real bundles, written by hand as `edgeprune build` would."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.engines import (
    ENGINES_FOLDER,
    INDEX_NAME,
    EngineIndex,
    EngineInfo,
    ProfileInfo,
    folder_name,
    hash_weights,
)
from edgeprune.runtime.router import SLOTS
from tests.helpers.fake_trt import FakeTensorRT, make_plan

SCRATCH = 5000


@dataclass(frozen=True)
class EngineSpec:
    """An engine to write.

    Args:
        source: graph of the manifest it runs.
        profiles: (graph, batch, slots); by default those of the source.
        plugins: creators of the plugin it needs.
    """

    source: str
    profiles: tuple[tuple[str, int, tuple[int, ...] | None], ...]
    plugins: tuple[str, ...] = ()


def copy_bundle(bundle: Bundle, out: Path, change: Callable[[dict[str, Any]], Any] = lambda m: None) -> Bundle:
    """Return a copy of a bundle with changes to its manifest."""
    shutil.copytree(bundle.path, out)
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return load_bundle(out, check_hashes=False)


def own_engines(bundle: Bundle, batches: Sequence[int]) -> list[EngineSpec]:
    """Return an engine for every graph but variants and one that is told, with a profile for each batch."""
    graphs = bundle.manifest.graphs.items()
    own = [g for g, info in graphs if info.variant_of is None and all(one.name != SLOTS for one in info.inputs)]
    return [EngineSpec(g, tuple((g, batch, None) for batch in batches)) for g in own]


def write_engines(bundle: Bundle, fake: FakeTensorRT, specs: Sequence[EngineSpec]) -> Path:
    """Write engines and their index into the folder of the stand-in's device, and return the folder."""
    folder = bundle.path / ENGINES_FOLDER / folder_name(fake.device.name, fake.version)
    folder.mkdir(parents=True, exist_ok=True)
    infos = [_write(bundle, fake, spec, folder) for spec in specs]
    index = EngineIndex(
        tool_version="0",
        created="2026-11-25T00:00:00+00:00",
        device=fake.device.name,
        compute_capability=".".join(map(str, fake.device.capability)),
        tensorrt=fake.version,
        engines=infos,
    )
    (folder / INDEX_NAME).write_text(index.model_dump_json())
    return folder


def _write(bundle: Bundle, fake: FakeTensorRT, spec: EngineSpec, folder: Path) -> EngineInfo:
    manifest, inputs = bundle.manifest, bundle.manifest.graphs[spec.source].inputs
    profiles = []
    for _, batch, slots in spec.profiles:
        dynamic = [one for one in inputs if -1 in one.shape and one.name != SLOTS]
        shapes = {one.name: [batch if side == -1 else side for side in one.shape] for one in dynamic}
        profiles.append((shapes, {} if slots is None else {SLOTS: slots}))
    scratch = [SCRATCH * (i + 1) for i in range(len(profiles))]
    plan = make_plan(fake.version, bundle.graph_path(spec.source), profiles, scratch=scratch, plugins=spec.plugins)
    file = f"{spec.source}.engine"
    (folder / file).write_bytes(plan)
    return EngineInfo(
        file=file,
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        source=spec.source,
        source_sha256=manifest.files[manifest.graphs[spec.source].file].sha256,
        weights_sha256=hash_weights(bundle, spec.source),
        plugin=bool(spec.plugins),
        key="0",
        profiles=[ProfileInfo(graph=g, batch=b, slots=None if s is None else list(s)) for g, b, s in spec.profiles],
        scratch_bytes=max(scratch),
        build_s=1.0,
    )
