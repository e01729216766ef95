"""The folder of engines appears whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.export.trt.folder import EngineFolder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "orin-trt10.3.0"


def write(out: Path, text: str) -> None:
    with EngineFolder(out) as folder:
        (folder.path / "index.json").write_text(text)
        folder.finish()


def write_half(folder: Path) -> None:
    (folder / "index.json").write_text("half")
    raise KeyboardInterrupt


def test_folder_appears_at_the_end(out: Path) -> None:
    with EngineFolder(out) as folder:
        assert folder.path.is_dir()
        assert not out.exists()
        (folder.path / "index.json").write_text("new")
        folder.finish()
    assert (out / "index.json").read_text() == "new"
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


def test_earlier_folder_is_replaced_whole(out: Path) -> None:
    write(out, "old")
    (out / "model.engine").touch()
    write(out, "new")
    assert [entry.name for entry in out.iterdir()] == ["index.json"]
    assert (out / "index.json").read_text() == "new"
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


def test_failure_leaves_the_earlier_folder_alone(out: Path) -> None:
    write(out, "old")
    folder = EngineFolder(out)
    with pytest.raises(KeyboardInterrupt), folder:
        write_half(folder.path)
    assert (out / "index.json").read_text() == "old"
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


def test_failure_while_moving_brings_the_earlier_folder_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == out and ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match="Input/output error"):
        write(out, "new")
    assert (out / "index.json").read_text() == "old"
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


def test_full_disk_has_its_own_error(out: Path) -> None:
    with pytest.raises(EnvironmentLackError) as caught, EngineFolder(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code == "disk-full"
    assert "engines" in str(caught.value.hint)
    assert list(out.parent.iterdir()) == []


def test_other_failures_pass(out: Path) -> None:
    with pytest.raises(OSError, match="odd"), EngineFolder(out):
        raise OSError(errno.EINVAL, "odd")


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(InputError) as caught, EngineFolder(tmp_path / "engines" / "orin"):
        pass
    assert caught.value.code == "output-not-writable"


def test_leavings_of_killed_runs_go_after_a_day(out: Path) -> None:
    old, young = (out.parent / f".{out.name}.tmp-{end}" for end in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    day = time.time() - 2 * 24 * 3600
    os.utime(old, (day, day))
    write(out, "new")
    assert not old.exists()
    assert young.exists()
