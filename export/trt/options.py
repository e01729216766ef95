"""What a user may ask of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Selection = Literal["auto", "native", "plugin"]
Engines = Literal["auto", "profiles", "per-bucket"]
Tactics = Literal["default", "builtin"]

DEFAULT_WORKSPACE = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        batches: images per run, each a profile; those of the bundle when empty.
        engines: one engine with a profile per bucket, or an engine per bucket; "auto" measures both.
        selection: which form of a graph is built; "auto" measures both where the bundle has both.
        workspace: bytes of device memory a layer may use while it runs.
        timing_cache: file of kernel timings; by default one per device in the user's cache.
        cache: take finished engines from the user's cache and put new ones there.
        rebuild: build even what the cache has.
        optimization_level: of TensorRT, 0 to 5; its own default when None.
        tactics: "builtin" leaves out what needs cuBLAS or cuDNN.
        graphs: "model", "dense", "random" or names of graphs; all when empty.
    """

    batches: tuple[int, ...] = ()
    engines: Engines = "auto"
    selection: Selection = "auto"
    workspace: int = DEFAULT_WORKSPACE
    timing_cache: Path | None = None
    cache: bool = True
    rebuild: bool = False
    optimization_level: int | None = None
    tactics: Tactics = "default"
    graphs: tuple[str, ...] = ()
