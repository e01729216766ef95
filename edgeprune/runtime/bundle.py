"""Bundles on disk: a directory with manifest.json, checked whole before use and written all or nothing.

Files the manifest does not list are ignored, and no graph may refer to one. No torch, no onnx.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from edgeprune.errors import InputError, InternalError
from edgeprune.runtime.folders import FolderWriter
from edgeprune.runtime.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileInfo, Manifest
from edgeprune.runtime.onnx_files import find_external_locations
from edgeprune.version import __version__

TOOL = "edgeprune"
_MAX_MANIFEST_BYTES = 16 << 20
MAX_BATCH = 1 << 16


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked.

    Attributes:
        path: its directory.
        manifest: what it holds.
    """

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """Return the file of a graph: "model", "dense", "random", "stem" or one of the rests.

        Raises:
            InputError: `graph-missing` when the bundle has no such graph.
        """
        if name not in self.manifest.graphs:
            raise InputError(
                f"{self.path} has no graph '{name}'",
                code="graph-missing",
                expected=f"one of {', '.join(sorted(self.manifest.graphs))}",
                hint="a dense bundle has no baselines; export with --method to get them",
                details={"graph": name, "graphs": sorted(self.manifest.graphs)},
            )
        return self.path / self.manifest.graphs[name].file


def load_bundle(path: Path | str, *, check_hashes: bool = True) -> Bundle:
    """Return the bundle in a directory, or refuse it.

    Args:
        path: the directory `edgeprune export` wrote.
        check_hashes: also read every file and compare its sha256; else only names and sizes are checked.

    Raises:
        InputError: `bundle-not-found` (no directory, no manifest), `bundle-invalid` (unreadable, foreign or
            contradictory manifest), `bundle-version` (schema this release does not know), `bundle-path` (a
            file outside the directory), `bundle-tampered` (a file is missing, changed or not listed),
            `graph-invalid` (a graph that is no ONNX file).
    """
    path = Path(path)
    manifest = _parse(_read_manifest(path), str(path / MANIFEST_NAME))
    for name, info in manifest.files.items():
        _check_file(path, name, info, check_hashes)
    for graph in manifest.graphs.values():
        _check_external(path, graph.file, manifest.files)
    return Bundle(path, manifest)


def hash_file(path: Path) -> FileInfo:
    """Return size and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileInfo(sha256=digest.hexdigest(), bytes=size)


class BundleWriter(FolderWriter):
    """Writes a bundle whole or not at all; put files into `.path`, then call `finish`. See `FolderWriter`."""

    kind = "bundle"
    size = "the new weights"

    def preview(self, manifest_fields: dict[str, Any]) -> Bundle:
        """Return the bundle as far as it is written, not to be kept: to run it before it is finished."""
        fields = {"tool_version": __version__, "created": "", "files": {}, **manifest_fields}
        return Bundle(self.path, Manifest.model_validate(fields))

    def finish(self, manifest_fields: dict[str, Any]) -> Bundle:
        """Hash the files, write the manifest, move the bundle into place and return it.

        Args:
            manifest_fields: the fields of `Manifest`; `files` is filled in, and `tool_version` and `created`
                where they are absent.

        Raises:
            InputError: `output-exists` when another run made `out` in the meantime.
            InternalError: `manifest-invalid` when the fields make no manifest that could be loaded again.
        """
        names = sorted(
            p.relative_to(self.path).as_posix()
            for p in self.path.rglob("*")
            if p.is_file() and p != self.path / MANIFEST_NAME
        )
        fields = {
            "tool_version": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **manifest_fields,
            "files": {name: hash_file(self.path / name) for name in names},
        }
        try:
            text = Manifest.model_validate(fields).model_dump_json(indent=2) + "\n"
            manifest = _parse(text.encode(), MANIFEST_NAME)
        except (ValidationError, InputError) as error:
            raise InternalError(f"the manifest to be written is not valid: {error}", code="manifest-invalid") from error
        (self.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
        self.commit((*names, MANIFEST_NAME))
        return Bundle(self.out, manifest)

    def is_ours(self, path: Path) -> bool:
        """Tell whether a directory holds a manifest of ours, valid or not."""
        try:
            data = json.loads(_read_manifest(path))
        except (InputError, ValueError, RecursionError):
            return False
        return isinstance(data, dict) and data.get("tool") == TOOL


def _read_manifest(path: Path) -> bytes:
    file = path / MANIFEST_NAME
    hint = "give the directory that `edgeprune export` wrote"
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(
            f"no bundle at {path}: it {what}",
            code="bundle-not-found",
            expected="a bundle directory",
            hint=hint,
        )
    if not os.path.lexists(file):
        raise InputError(
            f"no bundle at {path}: it has no {MANIFEST_NAME}",
            code="bundle-not-found",
            expected=f"a directory with a {MANIFEST_NAME}",
            hint=hint,
        )
    file = _inside(path, MANIFEST_NAME)
    try:
        if not file.is_file():  # reading a pipe would never end
            raise _invalid(str(file), "it is not a regular file")
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _invalid(str(file), f"it is larger than {_MAX_MANIFEST_BYTES >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise _invalid(str(file), f"it cannot be read ({error})") from error


def _parse(text: bytes, where: str) -> Manifest:
    """Return the manifest in `text`, in the order in which a wrong one is best explained."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, f"it is not readable JSON ({error})") from error
    if not isinstance(data, dict) or data.get("tool") != TOOL:
        raise _invalid(where, "it was not written by edgeprune")
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        raise InputError(
            f"{where} has schema version {version!r}",
            code="bundle-version",
            expected=f"schema version {SCHEMA_VERSION}, the one edgeprune {__version__} reads",
            hint="pip install --upgrade edgeprune" if newer else "export the bundle again",
            details={"found": version, "supported": SCHEMA_VERSION},
        )
    try:
        manifest = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = f"{'.'.join(str(part) for part in found[0]['loc'])}: {found[0]['msg']}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise _invalid(where, f"{first}{more}") from error
    _check_consistent(manifest, where)
    return manifest


def _check_consistent(manifest: Manifest, where: str) -> None:
    """Refuse a manifest whose parts contradict each other."""
    low, high = manifest.batch
    if not 1 <= low <= high <= MAX_BATCH:
        raise _invalid(where, f"batch: {low} to {high} is no range")
    for name in _graphs_needed(manifest) - manifest.graphs.keys():
        raise _invalid(where, f"graphs: '{name}' is absent")
    _check_buckets(manifest, where)
    _check_stages(manifest, where)
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise _invalid(where, f"graphs.{name}: {graph.file} is not among the files")


def _graphs_needed(manifest: Manifest) -> set[str]:
    """Return the graphs that running the bundle takes."""
    adaptive = manifest.adaptive
    if adaptive is not None and adaptive.form == "buckets":
        return {"stem", *(bucket.graph for bucket in adaptive.buckets)}
    return {"model", *(density.graph for density in manifest.densities)}


def _check_buckets(manifest: Manifest, where: str) -> None:
    """Refuse buckets that are not nested, or of which the last does not hold every token."""
    adaptive, stages = manifest.adaptive, manifest.method.stages
    if adaptive is None:
        return
    if (adaptive.form == "buckets") != bool(adaptive.buckets) or not stages:
        raise _invalid(where, f"adaptive: {len(adaptive.buckets)} buckets and {len(stages)} stages in {adaptive.form}")
    rows = [bucket.capacities for bucket in adaptive.buckets]
    if any(len(row) != len(stages) for row in rows):
        raise _invalid(where, f"adaptive.buckets: capacities of other than {len(stages)} stages")
    nested = all(a <= b for small, large in pairwise(rows) for a, b in zip(small, large, strict=True))
    falling = all(a >= b for row in rows for a, b in pairwise(row))
    if rows and not (nested and falling and rows[-1] == [stage.kept for stage in stages]):
        raise _invalid(where, "adaptive.buckets: they are not nested, or the last does not hold every token")


def _check_stages(manifest: Manifest, where: str) -> None:
    """Refuse graphs of an adaptive method or of several densities whose interface is not that of their stages."""
    adaptive, stages = manifest.adaptive, manifest.method.stages
    runs = [(bucket.graph, stages) for bucket in (adaptive.buckets if adaptive is not None else [])]
    runs += [(density.graph, density.stages) for density in manifest.densities]
    if adaptive is not None and not runs:
        runs = [("model", stages)]
    for name, own in runs:
        graph = manifest.graphs[name]
        shapes = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
        told, counts = shapes.get("slots", [len(own)]), shapes.get("kept_counts", [-1, len(own)])
        listed = sum(tensor.startswith("kept_indices_") for tensor in shapes)
        if told != [len(own)] or counts[1:] != [len(own)] or listed not in (0, len(own)):
            raise _invalid(where, f"graphs.{name}: its interface is not that of {len(own)} stages")
        if adaptive is not None and adaptive.buckets and not {"token_count", "kept_counts"} <= shapes.keys():
            raise _invalid(where, f"adaptive.buckets: '{name}' is no graph behind a stem")


def _invalid(where: str, why: str) -> InputError:
    return InputError(
        f"{where} is not a bundle manifest: {why}",
        code="bundle-invalid",
        expected=f"the {MANIFEST_NAME} that `edgeprune export` wrote, unchanged",
        hint="export the bundle again",
    )


def _tampered(path: Path, name: str, why: str) -> InputError:
    return InputError(
        f"{name} in {path} {why}",
        code="bundle-tampered",
        expected=f"every file as {MANIFEST_NAME} lists it",
        hint="copy the bundle again, or export it again",
        details={"file": name},
    )


def _inside(path: Path, name: str) -> Path:
    """Return the real path of a file of the bundle, refusing names and links that leave the directory."""
    outside = InputError(
        f"{path} names the file {name!r}, which is not inside the bundle",
        code="bundle-path",
        expected="relative paths inside the bundle directory",
        hint="do not use this bundle; export it again",
        details={"file": name},
    )
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise outside
    if "\\" in name or PureWindowsPath(name).drive:
        raise outside
    try:
        real = (path / name).resolve()
        root = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long
        raise outside from error
    if not real.is_relative_to(root):
        raise outside
    return real


def _check_file(path: Path, name: str, info: FileInfo, check_hash: bool) -> None:
    file = _inside(path, name)
    try:
        if not file.is_file():
            raise _tampered(path, name, "is missing")
        size = file.stat().st_size
        if size != info.bytes:
            raise _tampered(path, name, f"has {size} bytes instead of {info.bytes}")
        if check_hash and hash_file(file).sha256 != info.sha256:
            raise _tampered(path, name, "was changed: its sha256 differs")
    except OSError as error:
        raise _tampered(path, name, f"cannot be read ({error})") from error


def _check_external(path: Path, graph: str, files: dict[str, FileInfo]) -> None:
    """Refuse a graph that refers to weights outside the listed files."""
    for location in sorted(find_external_locations(_inside(path, graph))):
        _inside(path, location)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(graph), location))
        if name not in files:
            raise _tampered(path, graph, f"refers to {location!r}, which {MANIFEST_NAME} does not list")
