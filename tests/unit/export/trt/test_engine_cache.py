"""Engines by what they were made of."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.export.trt import engine_cache
from edgeprune.export.trt.engine_cache import CacheInfo, EngineCache, default_folder, key_of
from edgeprune.export.trt.job import Built
from edgeprune.runtime.bundle import hash_file
from edgeprune.runtime.engines import ProofInfo

INPUTS: dict[str, Any] = {
    "graph": "a",
    "profiles": [{"shapes": {"images": [1, 3, 8, 8]}, "slots": None}],
    "workspace": 1,
}
KEY = key_of(INPUTS)
PLAN = b"a plan"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "engines"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Built, Path, Path]:
    engine, layers = tmp_path / "model.engine", tmp_path / "model.layers.json"
    engine.write_bytes(PLAN)
    layers.write_text("{}")
    proof = ProofInfo(layers=1, precisions={"float16": 1}, attention_blocks=1, fused_attention=1)
    built = Built(sha256=hash_file(engine).sha256, bytes=6, scratch_bytes=3, build_s=2.5, proof=proof)
    return built, engine, layers


def put(cache: EngineCache, made: tuple[Built, Path, Path]) -> list[str]:
    built, engine, layers = made
    return cache.put(KEY, INPUTS, built, engine, layers)


def take(cache: EngineCache, tmp_path: Path, key: str = KEY) -> Built | None:
    return cache.take(key, tmp_path / "taken.engine", tmp_path / "taken.json")


def test_key_is_of_the_content_not_of_its_order() -> None:
    assert key_of(dict(reversed(INPUTS.items()))) == KEY
    assert len(KEY) == 64


@pytest.mark.parametrize("changed", [{"graph": "b"}, {"workspace": 2}, {"profiles": []}, {"more": None}])
def test_key_follows_everything(changed: dict[str, Any]) -> None:
    assert key_of({**INPUTS, **changed}) != KEY


def test_key_follows_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "FORMAT", engine_cache.FORMAT + 1)
    assert key_of(INPUTS) != KEY


def test_engine_that_was_put_is_taken(folder: Path, made: tuple[Built, Path, Path], tmp_path: Path) -> None:
    cache = EngineCache(folder)
    assert put(cache, made) == []
    assert take(cache, tmp_path) == made[0]
    assert (tmp_path / "taken.engine").read_bytes() == PLAN
    assert (tmp_path / "taken.json").read_text() == "{}"
    assert [entry.name for entry in folder.iterdir()] == [KEY]
    assert CacheInfo.model_validate_json((folder / KEY / "info.json").read_bytes()).inputs == INPUTS


def test_unknown_key_is_nothing(folder: Path, made: tuple[Built, Path, Path], tmp_path: Path) -> None:
    cache = EngineCache(folder)
    put(cache, made)
    assert take(cache, tmp_path, "0" * 64) is None


@pytest.mark.parametrize("name", ["engine", "layers.json", "info.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damaged_entry_is_nothing_and_is_replaced(
    name: str, damage: str, folder: Path, made: tuple[Built, Path, Path], tmp_path: Path
) -> None:
    cache = EngineCache(folder)
    put(cache, made)
    file = folder / KEY / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\xffsomething" if damage == "changed" else b"")
    assert take(cache, tmp_path) is None
    assert put(cache, made) == []
    assert take(cache, tmp_path) == made[0]
    assert [entry.name for entry in folder.iterdir()] == [KEY]


def test_cache_that_does_not_read_still_writes(folder: Path, made: tuple[Built, Path, Path], tmp_path: Path) -> None:
    cache = EngineCache(folder, reads=False)
    put(cache, made)
    assert take(cache, tmp_path) is None
    assert take(EngineCache(folder), tmp_path) == made[0]


def test_cache_that_does_not_write_leaves_nothing(folder: Path, made: tuple[Built, Path, Path]) -> None:
    assert put(EngineCache(folder, writes=False), made) == []
    assert not folder.exists()


def test_full_disk_is_a_warning_and_leaves_nothing(
    folder: Path, made: tuple[Built, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    assert put(EngineCache(folder), made) == [f"the engine cache '{folder}' cannot be written: No space left on device"]
    assert list(folder.iterdir()) == []


def test_folder_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "edgeprune" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "edgeprune" / "engines"


def test_info_refuses_fields_it_does_not_know(folder: Path, made: tuple[Built, Path, Path], tmp_path: Path) -> None:
    cache = EngineCache(folder)
    put(cache, made)
    file = folder / KEY / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": 1}))
    assert take(cache, tmp_path) is None
