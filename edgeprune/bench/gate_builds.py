"""Engines built afresh for a comparison: TensorRT chooses kernels anew in every build, so one build is luck."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeprune.bench.bench import device_of
from edgeprune.bench.measure import Progress
from edgeprune.errors import InputError
from edgeprune.export.trt import BuildOptions, build_engines
from edgeprune.export.trt.machine import check_version, find_machine
from edgeprune.runtime.bundle import Bundle


def check_builds(bundle: Bundle) -> None:
    """Refuse a bundle whose engines cannot be built here, before anything is.

    Raises:
        InputError: `compare-builds` for another target.
        EnvironmentLackError: `gpu-missing`, `tensorrt-missing`, `tensorrt-version`.
    """
    target = bundle.manifest.target
    if device_of(target) != "tensorrt":
        raise InputError(
            f"--builds builds engines of TensorRT, and {bundle.path} is for {target}",
            code="compare-builds",
            expected="two bundles for TensorRT, such as trt-fp16",
            hint="leave --builds out: nothing is built for this target that could differ from build to build",
        )
    check_version(bundle.manifest, find_machine().tensorrt)


@contextmanager
def fresh_builds(
    bundle: Bundle, count: int, *, batch: int, dense: bool, progress: Progress | None = None
) -> Iterator[list[Bundle]]:
    """Yield copies of a bundle in a temporary folder, each with engines that were built for it alone.

    They are what `edgeprune build` makes by default, but neither finished engines nor kernel timings are taken from the
    caches or put there: with them the second build would be the first one again.

    Args:
        bundle: that `check_builds` has let through.
        count: of copies.
        batch: images per run, to build for.
        dense: build the dense graph too.
        progress: called with (step, share done).

    Raises:
        EnvironmentLackError: those of `build_engines`.
        BuildError: likewise.
    """
    manifest = bundle.manifest
    graphs = ["model", *(name for name in ("dense",) if dense and name in manifest.graphs)]
    # images that part ways into buckets run in smaller batches too
    routed = manifest.adaptive is not None and manifest.adaptive.form == "buckets" and batch > 1
    options = BuildOptions(batches=() if routed else (batch,), cache=False, graphs=tuple(graphs))
    with tempfile.TemporaryDirectory(prefix="edgeprune-builds-") as folder:
        copies = []
        for number in range(1, count + 1):
            copy = Bundle(Path(folder) / str(number), manifest)
            _copy_files(bundle, copy.path)
            build_engines(copy, options, named(progress, f"build {number} of {count}") or _silent)
            copies.append(copy)
        yield copies


def _copy_files(bundle: Bundle, out: Path) -> None:
    """Put the files a bundle lists into another directory, without a second copy where the file system lets us."""
    for name in bundle.manifest.files:
        source, target = (bundle.path / name).resolve(), out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)


def named(progress: Progress | None, what: str) -> Progress | None:
    """Return a progress whose steps begin with what they are of."""
    return None if progress is None else lambda step, share: progress(f"{what}: {step}", share)


def _silent(step: str, share: float) -> None:
    """Report nothing."""
