"""Writing a bundle: all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EnvironmentLackError, InputError, InternalError
from edgeprune.runtime.bundle import BundleWriter, load_bundle
from tests.helpers.bundles import graph_info, manifest_fields, tiny_model, write_tiny

ROOT = Path(__file__).resolve().parents[3]


def write(out: Path, *, overwrite: bool = False, **extra: Any) -> None:
    model = tiny_model()
    with BundleWriter(out, overwrite=overwrite) as writer:
        (writer.path / "model.onnx").write_bytes(model.SerializeToString())
        writer.finish({**manifest_fields({"model": graph_info(model, "model.onnx")}), **extra})


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in root.rglob("*")}


def test_written_bundle_is_what_is_loaded(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "out")
    assert load_bundle(bundle.path) == bundle
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_manifest_says_when_and_by_which_version(tmp_path: Path) -> None:
    write(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert data["created"].endswith("+00:00")
    assert data["schema_version"] == 1


def test_files_lie_in_a_hidden_directory_beside_until_finished(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        assert writer.path.parent == tmp_path
        assert writer.path.name.startswith(".out")
        assert not (tmp_path / "out").exists()
    assert snapshot(tmp_path) == {}


def test_bundle_has_the_permissions_of_any_new_directory(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_files_in_subdirectories_are_listed(tmp_path: Path) -> None:
    model = tiny_model()
    with BundleWriter(tmp_path / "out") as writer:
        (writer.path / "deep").mkdir()
        (writer.path / "deep" / "model.onnx").write_bytes(model.SerializeToString())
        writer.finish(manifest_fields({"model": graph_info(model, "deep/model.onnx")}))
    assert list(load_bundle(tmp_path / "out").manifest.files) == ["deep/model.onnx"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert load_bundle(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_failed_run_leaves_nothing_not_even_parents(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "a" / "out") as writer:  # noqa: PT012
        (writer.path / "model.onnx.data").write_bytes(b"\0" * 1000)
        raise error
    assert snapshot(tmp_path) == {}


def test_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    write_tiny(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(InputError) as caught, BundleWriter(tmp_path / "out"):
        pytest.fail("entered")
    assert caught.value.code == "output-exists"
    assert "--overwrite" in str(caught.value.hint)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "directory", "foreign manifest", "broken manifest"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        name = "photo.jpg" if kind == "directory" else "manifest.json"
        (out / name).write_text('{"tool": "other"}' if kind == "foreign manifest" else "precious")
    before = snapshot(tmp_path)
    with pytest.raises(InputError) as caught, BundleWriter(out, overwrite=True):
        pytest.fail("entered")
    assert caught.value.code == "output-not-a-bundle"
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_a_bundle_whole(tmp_path: Path) -> None:
    write_tiny(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_damaged_bundle(tmp_path: Path) -> None:
    write_tiny(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    write(tmp_path / "out", overwrite=True)
    assert load_bundle(tmp_path / "out")


def test_overwrite_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert load_bundle(tmp_path / "out")


def test_overwrite_keeps_a_link_and_replaces_its_target(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    write(tmp_path / "current", overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert len(load_bundle(tmp_path / "v1").manifest.files) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_bundle_stays_when_the_new_one_fails(tmp_path: Path, error: type[BaseException]) -> None:
    write_tiny(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(error), BundleWriter(tmp_path / "out", overwrite=True):
        raise error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_old_bundle_comes_back_when_the_last_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_tiny(tmp_path / "out")
    before = snapshot(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        write(tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == before


def test_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(InputError) as caught, BundleWriter(tmp_path / "out") as writer:  # noqa: PT012
        (writer.path / "model.onnx").write_bytes(model.SerializeToString())
        write_tiny(tmp_path / "out")
        writer.finish(manifest_fields({"model": graph_info(model, "model.onnx")}))
    assert caught.value.code == "output-exists"
    assert len(load_bundle(tmp_path / "out").manifest.files) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "extra",
    [
        {"graphs": {}},
        {"graphs": {"model": {"file": "absent.onnx", "inputs": [], "outputs": []}}},
        {"surprise": 1},
        {"batch": (2, 1)},
        {
            "parity": {
                "images": 8,
                "max_abs_error": float("nan"),
                "max_rel_error": 0.0,
                "top1_agreement": 1.0,
                "tolerance": 1e-4,
            }
        },
    ],
)
def test_manifest_that_could_not_be_loaded_is_not_written(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(InternalError) as caught:
        write(tmp_path / "out", **extra)
    assert caught.value.code == "manifest-invalid"
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(EnvironmentLackError) as caught, BundleWriter(tmp_path / "out") as writer:  # noqa: PT012
        (writer.path / "model.onnx.data").write_bytes(b"\0" * 1000)
        raise OSError(number, os.strerror(number))
    assert caught.value.code == "disk-full"
    assert caught.value.exit_code == 3
    assert snapshot(tmp_path) == {}


def test_full_disk_is_named_when_even_the_directory_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(EnvironmentLackError) as caught, BundleWriter(tmp_path / "out"):
        pytest.fail("entered")
    assert caught.value.code == "disk-full"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_really_full_disk_is_named_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(EnvironmentLackError) as caught, BundleWriter(small_disk / "out") as writer:
        (writer.path / "model.onnx.data").write_bytes(b"\1" * 100_000)
    assert caught.value.code == "disk-full"
    assert snapshot(small_disk) == {}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def deny(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(InputError) as caught, BundleWriter(tmp_path / "out"):
        pytest.fail("entered")
    assert caught.value.code == "output-not-writable"


@pytest.mark.parametrize("out", ["file/out", "file/deep/out", "loop/out", "x" * 300])
def test_impossible_place_is_named(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as caught, BundleWriter(tmp_path / out):
        pytest.fail("entered")
    assert caught.value.code == "output-not-writable"


def test_failure_to_read_something_else_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), BundleWriter(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint.pth"))


def test_killed_run_does_not_block_the_next_and_its_leavings_go_after_a_day(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from edgeprune.runtime.bundle import BundleWriter\n"
        "w = BundleWriter(sys.argv[1]).__enter__(); (w.path / 'x').write_bytes(b'1' * 99)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    write(tmp_path / "out")
    assert left.is_dir()  # another run may still be working on it
    os.utime(left, (0, 0))
    write(tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bundle_that_was_moved_aside_is_not_cleaned_up_while_no_new_one_stands(tmp_path: Path) -> None:
    write_tiny(tmp_path / "out")
    aside = (tmp_path / "out").rename(tmp_path / ".out.old-1234")
    os.utime(aside, (0, 0))
    with BundleWriter(tmp_path / "out"):
        pass
    assert load_bundle(aside)
