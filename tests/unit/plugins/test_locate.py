from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from edgeprune.errors import EnvironmentLackError
from edgeprune.plugins import locate
from edgeprune.plugins.contract import LIBRARIES, MAJORS, build_command, library_for
from edgeprune.plugins.locate import VARIABLE, chosen, find_candidates, why_unusable
from edgeprune.version import __version__
from tests.helpers.tensorrt import empty_machine

TRT8, TRT10 = LIBRARIES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder under which all places are, empty."""
    return empty_machine(tmp_path / "home", monkeypatch)


def write_elf(path: Path, machine: int | None = None) -> Path:
    """Write a file whose first bytes are those of a library."""
    if machine is None:
        machine = locate.MACHINES.get(platform.machine(), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + bytes(44))
    return path


def places(home: Path) -> dict[str, Path]:
    """Return the folder behind every place; the checkout has sources."""
    sources = home / "checkout/plugins"
    sources.mkdir(parents=True)
    (sources / "CMakeLists.txt").touch()
    return {
        "package": home / "package/lib",
        "user cache": home / "cache/edgeprune/plugins" / __version__,
        "checkout": home / "checkout/build/plugins",
    }


def reasons(library: locate.Library = TRT10) -> dict[str, str | None]:
    return {candidate.place: candidate.passed_over for candidate in find_candidates(library)}


@pytest.mark.parametrize(
    ("version", "library"),
    [("8.5.2.2", TRT8), ("8.6.0", TRT8), ("10.0.1", TRT10), ("10.16.2.10", TRT10), ("11.4.1", TRT10), ("8", TRT8)],
)
def test_library_belongs_to_the_major_version(version: str, library: locate.Library) -> None:
    assert library_for(version) is library


@pytest.mark.parametrize("version", ["7.2.3", "9.3.0", "12.0", "", "unknown"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(EnvironmentLackError) as caught:
        library_for(version)
    assert (caught.value.code, caught.value.exit_code) == ("tensorrt-version", 3)
    assert caught.value.details == {"tensorrt": version, "supported": list(MAJORS)}


def test_nothing_anywhere(home: Path) -> None:
    places(home)
    candidates = find_candidates(TRT10)
    assert chosen(candidates) is None
    assert [(c.place, c.passed_over) for c in candidates] == [
        ("package", "no such file"),
        ("user cache", "no such file"),
        ("checkout", "no such file"),
    ]
    assert {c.path.name for c in candidates} == {TRT10.file}


def test_places_are_tried_in_order(home: Path) -> None:
    folders = places(home)
    for place in reversed(folders):
        written = write_elf(folders[place] / TRT10.file)
        found = chosen(find_candidates(TRT10))
        assert found is not None
        assert (found.place, found.path) == (place, written)
    assert list(reasons().values()) == [None, "an earlier place has one", "an earlier place has one"]
    assert set(reasons(TRT8).values()) == {"no such file"}


def test_checkout_takes_what_was_built_last(home: Path) -> None:
    build = places(home)["checkout"]
    for age, folder in enumerate(("orin", ".", "desktop")):
        os.utime(write_elf(build / folder / TRT10.file), (0, 1000 - age))
    found = chosen(find_candidates(TRT10))
    assert found is not None
    assert found.path == build / "orin" / TRT10.file


def test_installed_package_has_no_checkout(home: Path) -> None:
    assert "checkout" not in reasons()


@pytest.mark.parametrize("folder", [".", "lib"])
def test_variable_may_name_a_directory(home: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    written = write_elf(home / "mine" / folder / TRT8.file)
    monkeypatch.setenv(VARIABLE, str(home / "mine"))
    found = chosen(find_candidates(TRT8))
    assert found is not None
    assert (found.place, found.path) == (VARIABLE, written)


def test_variable_may_name_a_file_of_any_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(write_elf(home / "other.so")))
    assert reasons()[VARIABLE] is None


def test_variable_decides_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_elf(places(home)["user cache"] / TRT10.file)
    monkeypatch.setenv(VARIABLE, str(home / "gone.so"))
    assert chosen(find_candidates(TRT10)) is None
    assert reasons() == {
        VARIABLE: "no such file",
        "package": f"{VARIABLE} is set",
        "user cache": f"{VARIABLE} is set",
        "checkout": f"{VARIABLE} is set",
    }


def test_empty_variable_is_not_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert VARIABLE not in reasons()


def test_unusable_file_is_passed_over_for_the_next_place(home: Path) -> None:
    folders = places(home)
    folders["package"].mkdir(parents=True)
    (folders["package"] / TRT10.file).write_text("a linker script, or half a download")
    other = next(number for name, number in locate.MACHINES.items() if name != platform.machine())
    write_elf(folders["user cache"] / TRT10.file, other)
    write_elf(folders["checkout"] / TRT10.file)
    found = reasons()
    assert found["package"] == "not a shared library"
    assert str(found["user cache"]).startswith("built for ")
    assert found["checkout"] is None


def test_reasons_of_files(tmp_path: Path) -> None:
    (tmp_path / "folder.so").mkdir()
    (tmp_path / "short.so").write_bytes(b"\x7fELF")
    os.mkfifo(tmp_path / "pipe.so")
    assert why_unusable(tmp_path / "folder.so") == "a directory"
    assert why_unusable(tmp_path / "short.so") == "not a shared library"
    assert why_unusable(tmp_path / "pipe.so") == "not a file"
    assert why_unusable(tmp_path / "short.so/below.so") == "no such file"
    assert why_unusable(write_elf(tmp_path / "good.so")) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_passed_over(tmp_path: Path) -> None:
    write_elf(tmp_path / "secret.so").chmod(0)
    assert why_unusable(tmp_path / "secret.so") == "Permission denied"


def test_relative_cache_home_is_ignored() -> None:
    assert locate.cache_folder({"XDG_CACHE_HOME": "here", "HOME": "/home/me"}) == Path(
        f"/home/me/.cache/edgeprune/plugins/{__version__}"
    )


def test_build_command_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert build_command() == "edgeprune plugins build --preset orin"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert build_command() == "edgeprune plugins build --preset desktop"
