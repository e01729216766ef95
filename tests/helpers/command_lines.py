"""Whether a command line that a document shows would be understood, without running what it does.

edgeprune is asked itself: its parser, the parsers of its values, and `--dry-run` where a verb has one. Scripts of
`benchmarks/` are started up to the end of their argument parser. Of other programs as much is checked as the checkout
knows of: targets of make, extras of pip, presets of cmake, images of docker.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import click

from edgeprune.bench.bench import BASELINES
from edgeprune.bench.gate_rules import parse_rules
from edgeprune.bench.scenarios import parse_scenario
from edgeprune.bench.sweep import parse_sweep
from edgeprune.cli.app import VERBS, cli, run
from edgeprune.cli.parse import key_values
from edgeprune.cli.ui import Ui
from edgeprune.export.buckets import parse_buckets
from edgeprune.export.targets.registry import TARGETS
from edgeprune.models.registry import MODELS
from edgeprune.pruning import get_method
from edgeprune.pruning.base import parse_stages
from edgeprune.search.request import parse_latency
from edgeprune.training.request import FinetuneRequest, get_recipe

ROOT = Path(__file__).parents[2]
FOREIGN = ("cd", "cp", "git", "rsync", "scp", "ssh", "source", "sudo", "nvidia-smi", "trtexec")  # nothing to check


def _one_of(names: Iterable[str]) -> Callable[[str], object]:
    known = tuple(names)

    def check(name: str) -> None:
        assert name in known, f"'{name}' is none of {', '.join(known)}"

    return check


def _data(text: str) -> None:
    assert text == "digits" or re.fullmatch(r"imagefolder:\S+", text), f"'{text}' is no data"


VALUES: dict[str, Callable[[Any], object]] = {
    "model": _one_of(MODELS),
    "teacher_model": _one_of(MODELS),
    "method": get_method,
    "target": _one_of(TARGETS),
    "data": _data,
    "calibration": _data,
    "stages": lambda text: parse_stages(text, 0.5),
    "buckets": parse_buckets,
    "scenario": parse_scenario,
    "sweep": parse_sweep,
    "fail_on": parse_rules,
    "latency_budget": parse_latency,
    "against": lambda text: [_one_of(BASELINES)(name) for name in text.split(",")],
}


def check(line: str, capture: Callable[[], object] = lambda: None) -> None:
    """Raise when a line of shell would not be understood.

    Args:
        line: the line; commands joined by `&&` or `|` are checked one by one.
        capture: called after edgeprune was run, to drop what it printed.
    """
    part: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word in ("&&", "|", ";"):
            _check_words(part, capture)
            part = []
        else:
            part.append(word)


def _check_words(words: list[str], capture: Callable[[], object]) -> None:
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        words = words[1:]
    assert words, "a line without a command"
    if ">" in words:
        words = words[: words.index(">")]
    _check_paths(words)
    program, *rest = words
    name = program.rpartition("/")[2]
    if name == "edgeprune":
        check_edgeprune(rest, capture)
    elif program in ("accelerate", "python", "python3") and rest[-1:] and "edgeprune" in rest:
        assert rest[rest.index("edgeprune") - 1] == "-m"
        check_edgeprune(rest[rest.index("edgeprune") + 1 :], capture)
    elif name in ("python", "python3"):
        _check_python(rest)
    elif name == "gpu_check.sh":
        _check_script(Path("benchmarks/gpu_check.py"), rest)
    elif name in OTHERS:
        OTHERS[name](rest)
    elif "/" in program:
        assert (ROOT / program).stat().st_mode & 0o100, f"{program} cannot be started"
    else:
        assert name in FOREIGN, f"nothing is known of the program '{name}'"


def _check_paths(words: list[str]) -> None:
    """Raise for a path into the checkout where there is nothing."""
    for word in words:
        for path in re.findall(r"(?:^|[=:])((?:benchmarks|checkpoints|docker|docs|plugins|tests)/[\w./-]+)", word):
            assert (ROOT / path).exists(), f"there is no {path}"


def options_of(words: list[str]) -> dict[str, Any]:
    """Return the options the real command line reads from the words behind `edgeprune`; {} where one answers itself."""
    with cli.make_context("edgeprune", list(words), obj=Ui()) as context:
        name, command, rest = cli.resolve_command(context, list(words))
        if isinstance(command, click.Group) and rest:
            name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        try:
            return command.make_context(name, rest, parent=context).params
        except click.exceptions.Exit:  # such as --list-recipes
            return {}


def check_edgeprune(words: list[str], capture: Callable[[], object] = lambda: None) -> None:
    """Raise unless the command line understands the words and every value that has a form of its own."""
    assert words and words[0] in VERBS, f"'{' '.join(words[:1])}' is no verb"
    options = options_of(words)
    for name, value in options.items():
        if value is not None and value != () and name in VALUES:
            VALUES[name](value)
    if words[0] == "finetune" and options:
        _check_training(**options)
    if words[0] in ("export", "search") and "--recipe" not in words:  # a recipe is a file that is not here
        at = words.index("--labels") if "--labels" in words else len(words)  # a file that is not here either
        code = run([*words[:at], *words[at + 2 :], *([] if "--dry-run" in words else ["--dry-run"])])
        capture()
        assert code == 0, f"--dry-run ends with {code}"


def _check_training(method_option: tuple[str, ...], recipe_option: tuple[str, ...], **options: Any) -> None:
    get_method(options["method"]).parse_options(key_values(method_option, "--method-option"))
    fields = {name: value for name, value in options.items() if name in FinetuneRequest.__dataclass_fields__}
    given = key_values(recipe_option, "--recipe-option")
    get_recipe(FinetuneRequest(out=options["output"], recipe_options=given, **fields))


def _check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        _check_pytest(words[2:])
    elif words[:2] != ["-m", "venv"]:
        script = Path(words[0])
        assert script.parts[0] in ("benchmarks", "docs"), f"{script} is no script of ours"
        _check_script(script, words[1:])


def _check_pytest(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for marker in re.findall(r"-m (\w+)", " ".join(words)):
        assert f'"{marker}: ' in project, f"'{marker}' is no marker"


class _ParsedError(BaseException):
    """Ends a script behind its argument parser."""


def _check_script(script: Path, words: list[str]) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        real(self, args, namespace)
        raise _ParsedError

    path = str(ROOT / script)
    with (
        mock.patch.object(sys, "argv", [path, *words]),
        mock.patch.object(sys, "path", [str(ROOT / script.parent), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except _ParsedError:
            return
        except SystemExit as end:
            raise AssertionError(f"{script} does not understand {' '.join(words)}") from end
    raise AssertionError(f"{script} parses no arguments")


def _check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE), f"make has no target '{target}'"


def _check_pip(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra_lines = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = re.findall(r"^(\w+) = \[", extra_lines, re.MULTILINE)
    for extras in re.findall(r"(?:^|[ ./])(?:edgeprune)?\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known), f"not all of {extras} are extras"


def _check_docker(words: list[str]) -> None:
    """`docker build`, and `docker run` or `docker compose run` with the words for the entry point, `edgeprune`."""
    images = [word for word in words if word.startswith("edgeprune:")]
    known = {f"edgeprune:{path.suffix[1:]}" for path in (ROOT / "docker").glob("Dockerfile.*")}
    assert set(images) <= known, f"no Dockerfile for {images}"
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        check_edgeprune(words[words.index(images[0]) + 1 :] if images else words[words.index("--rm") + 2 :])


def _check_cmake(words: list[str]) -> None:
    if "-S" in words:
        folder = ROOT / words[words.index("-S") + 1]
        assert (folder / "CMakeLists.txt").is_file()
        if "--preset" in words:
            presets = json.loads((folder / "CMakePresets.json").read_text(encoding="utf-8"))["configurePresets"]
            name = words[words.index("--preset") + 1]
            assert name in {preset["name"] for preset in presets}, f"no preset '{name}'"
    else:
        assert words[0] == "--build"


OTHERS = {"make": _check_make, "pip": _check_pip, "docker": _check_docker, "cmake": _check_cmake}
