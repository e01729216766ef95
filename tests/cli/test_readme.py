"""Every command and every piece of Python the documents show is understood by the real thing."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from edgeprune.cli.app import VERBS
from edgeprune.errors import EdgepruneError
from tests.helpers.command_lines import check, options_of
from tests.helpers.documents import SHELL, Block, all_documents, blocks, commands, inline_code, without_blocks

ROOT = Path(__file__).parents[2]
DOCUMENTS = all_documents()
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
LANGUAGES = (*SHELL, "python", "text")
COMMANDS = {f"{block}: {line}": line for block in BLOCKS if block.language in SHELL for line in commands(block)}
MAKEFILE = re.findall(r"^\t\$\(BIN\)/(edgeprune .+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
PYTHON = [block for block in BLOCKS if block.language == "python"]
INLINE = {f"{document}: {code}": code for document in DOCUMENTS for code in inline_code(document)}
FOLDERS = ("benchmarks", "checkpoints", "docker", "docs", "edgeprune", "export", "plugins", "tests")


def test_documents_show_commands() -> None:
    assert {"README.md", "CONTRIBUTING.md", "METHODS.md", "docs/tutorial.md", "docker/README.md"} <= set(DOCUMENTS)
    shown = {line.split()[1] for line in COMMANDS.values() if line.startswith("edgeprune ")}
    assert shown >= {"export", "build", "run", "verify", "bench", "compare", "search", "report", "inspect", "doctor"}
    assert len(MAKEFILE) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_are_of_a_kind_that_is_checked(block: Block) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("line", [*COMMANDS.values(), *MAKEFILE], ids=[*COMMANDS, *MAKEFILE])
def test_shown_command_is_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(line, capsys.readouterr)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("edgeprune exprot -m vit_digits", "is no verb"),
        ("edgeprune export -m vit_digits --random-weights --no-such-option -o out/a", "No such option"),
        ("edgeprune export -m vit_digitz --random-weights -o out/a", "'vit_digitz' is none of"),
        ("edgeprune export -m vit_digits --method evit --random-weights -o out/a", "--dry-run ends with 2"),
        ("edgeprune export -m vit_digits --checkpoint checkpoints/none.pth -o out/a", "there is no checkpoints/none"),
        ("edgeprune export -m vit_digits --random-weights --target trt-int4 -o out/a", "'trt-int4' is none of"),
        ("edgeprune search -m vit_digits --method sait --checkpoint a.pth --data digits", "--dry-run ends with 2"),
        ("edgeprune finetune -m vit_digits --recipe none -o out/a.safetensors", "unknown recipe 'none'"),
        ("edgeprune finetune -m vit_digits --recipe-option none=1 -o out/a.safetensors", "has no such field"),
        ("edgeprune bench out/a --scenario fixed-fps:often", "scenario 'fixed-fps:often'"),
        ("edgeprune bench out/a --against fast", "'fast' is none of"),
        ("edgeprune compare out/a out/b --fail-on median", "--fail-on median"),
        ("edgeprune evaluate out/a --data folder:x", "'folder:x' is no data"),
        ("accelerate launch -m edgeprune nothing", "is no verb"),
        ("python benchmarks/ort_cpu_peers.py --no-such-option", "does not understand"),
        ("python benchmarks/none.py", "there is no benchmarks/none.py"),
        ("python elsewhere.py", "no script of ours"),
        ("benchmarks/gpu_check.sh --no-such-option", "does not understand"),
        ("python -m pytest -m nothing", "is no marker"),
        ("make nothing", "no target 'nothing'"),
        ("pip install '.[nothing]'", "not all of nothing"),
        ("docker run --rm edgeprune:cpu rnu bundle", "is no verb"),
        ("docker run --rm edgeprune:gpu run bundle", "no Dockerfile"),
        ("docker build -f docker/Dockerfile.none .", "there is no docker/Dockerfile.none"),
        ("cmake -S plugins --preset none", "no preset 'none'"),
        ("cd plugins && frobnicate", "the program 'frobnicate'"),
    ],
)
def test_what_is_wrong_is_not_understood(line: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, click.UsageError, EdgepruneError)) as caught:
        check(line, capsys.readouterr)
    assert why in str(caught.value) or why in getattr(caught.value, "message", "")


def is_command(code: str) -> bool:
    """Return whether code in the text is a command with words behind the verb, none of them a placeholder for it."""
    known = re.match(r"edgeprune \S+ .|python (-m pytest|benchmarks/)|make |pip install .", code)
    return known is not None and not re.search(r"\.\.\.|COMMAND|\|", code)


@pytest.mark.parametrize("code", sorted({code for code in INLINE.values() if is_command(code)}))
def test_command_in_the_text_is_understood(code: str) -> None:
    if not code.startswith("edgeprune "):
        check(code)
        return
    with contextlib.suppress(click.MissingParameter):  # in the text it need not be whole
        options_of(code.split()[1:])


def test_verbs_named_in_the_text_exist() -> None:
    text = "".join(without_blocks((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS)
    assert set(re.findall(r"`edgeprune ([a-z][a-z-]+)", text)) <= set(VERBS)


def test_files_named_in_the_text_exist() -> None:
    paths = {name: code for name, code in INLINE.items() if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", code)}
    assert len(paths) > 50
    missing = [name for name, path in paths.items() if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_shown_python_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.partition(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names.update({alias.asname or alias.name: getattr(module, alias.name) for alias in node.names})
    names.setdefault("edgeprune", importlib.import_module("edgeprune"))
    for node in ast.walk(tree):  # what is made of a class has its attributes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            made = resolve(node.value.func, names)
            if isinstance(made, type):
                names[node.targets[0].id] = made
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return what a chain of names stands for, None when it starts with something unknown; AttributeError if wrong."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, names)
        if isinstance(owner, (type, ModuleType)):
            return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("text", ["edgeprune.Sesion('a')", "s = edgeprune.Session('a')\ns.densty = 1"])
def test_wrong_python_is_found(text: str) -> None:
    with pytest.raises(AttributeError):
        test_shown_python_names_what_exists(Block("x.md", 1, "python", text))
