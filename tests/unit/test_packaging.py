"""What is installed is what the tree holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"edgeprune": "edgeprune", "export": "edgeprune/export"}  # in the tree -> when installed


def tree_files() -> set[str]:
    """Return the package files as an installation should have them."""
    return {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "templates"
    }


def test_packages_in_pyproject_equal_the_tree() -> None:
    listed = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]
    modules = {name for name in tree_files() if name.endswith(".py")}
    assert sorted(listed) == sorted({str(Path(name).parent).replace("/", ".") for name in modules})


def test_every_folder_with_modules_is_a_package() -> None:
    files = {name for name in tree_files() if name.endswith(".py")}
    assert {f"{Path(name).parent.as_posix()}/__init__.py" for name in files} <= files


def test_export_cannot_be_imported_under_the_name_of_its_folder() -> None:
    command = [sys.executable, "-c", "import export"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "edgeprune.export" in done.stderr.splitlines()[-1]


def test_compiler_is_part_of_the_package_in_a_checkout() -> None:
    command = [sys.executable, "-c", "import edgeprune.export as e; print(e.__file__)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "export" / "__init__.py"


@pytest.mark.slow
def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves folders behind, and old ones would leak into the wheel
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert held == tree_files()
    assert "edgeprune/py.typed" in held
    code = "import edgeprune, edgeprune.export; print(edgeprune.export.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "installed" / "edgeprune" / "export" / "__init__.py"
