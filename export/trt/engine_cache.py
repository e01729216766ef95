"""Finished engines by what they were made of: `engines/<key>/` in the user's cache, each whole or not there."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeprune.export.trt.job import Built
from edgeprune.plugins.locate import cache_root
from edgeprune.runtime.bundle import hash_file
from edgeprune.runtime.manifest import Sha256

FORMAT = 1  # raise it when engines of the same key would come out different
ENGINE, LAYERS, INFO = "engine", "layers.json", "info.json"


class CacheInfo(BaseModel):
    """What lies beside a cached engine: what it was made of and what it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, Any]
    built: Built
    layers_sha256: Sha256


def key_of(inputs: Mapping[str, Any]) -> str:
    """Return the key of an engine: the hash of everything it depends on, as canonical JSON."""
    text = json.dumps({"format": FORMAT, **inputs}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def default_folder() -> Path:
    """Return the folder of all cached engines."""
    return cache_root() / "engines"


class EngineCache:
    """The cache.

    Args:
        folder: holds one folder per key.
        reads: whether engines are taken from it.
        writes: whether new ones are put into it.
    """

    def __init__(self, folder: Path, *, reads: bool = True, writes: bool = True) -> None:
        self.folder, self.reads, self.writes = folder, reads, writes

    def take(self, key: str, engine: Path, layers: Path) -> Built | None:
        """Copy an engine and its layers out of the cache; None when it has none that is whole."""
        entry = self.folder / key
        if not self.reads or not entry.is_dir():
            return None
        try:
            info = CacheInfo.model_validate_json((entry / INFO).read_bytes())
            shutil.copyfile(entry / ENGINE, engine)
            shutil.copyfile(entry / LAYERS, layers)
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValidationError):
            return None
        # what was copied is what will run, so that is what is checked
        if hash_file(engine).sha256 != info.built.sha256 or hash_file(layers).sha256 != info.layers_sha256:
            return None
        return info.built

    def put(self, key: str, inputs: Mapping[str, Any], built: Built, engine: Path, layers: Path) -> list[str]:
        """Copy an engine and its layers into the cache, in place of an earlier one; return warnings."""
        if not self.writes:
            return []
        entry, work = self.folder / key, self.folder / f".{key[:16]}.{secrets.token_hex(4)}"
        info = CacheInfo(inputs=dict(inputs), built=built, layers_sha256=hash_file(layers).sha256)
        try:
            work.mkdir(parents=True)
            shutil.copyfile(engine, work / ENGINE)
            shutil.copyfile(layers, work / LAYERS)
            (work / INFO).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
            if entry.exists():
                aside = work.with_name(f"{work.name}.old")
                entry.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            work.rename(entry)
        except OSError as error:
            return [f"the engine cache '{self.folder}' cannot be written: {error.strerror}"]
        finally:
            with suppress(OSError):
                shutil.rmtree(work)
        return []
