"""Every command line the documents show is understood by the real command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from edgeprune.cli.app import VERBS, cli
from edgeprune.cli.ui import Ui
from edgeprune.export.targets.registry import TARGETS
from edgeprune.models.registry import MODELS
from edgeprune.pruning import METHODS

ROOT = Path(__file__).parents[2]
NAMES = {"model": MODELS, "method": METHODS, "target": TARGETS}


def shown_commands(name: str) -> list[str]:
    """Return the `edgeprune ...` lines of a document's code blocks, or of a Makefile; continued lines are joined."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    if name.endswith(".md"):
        text = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return re.findall(r"^\s*(?:\$ )?(?:\S*/)?edgeprune (.+)$", text, re.MULTILINE)


COMMANDS = {
    f"{name}: {line}": line for name in ("README.md", "CONTRIBUTING.md", "Makefile") for line in shown_commands(name)
}


def test_readme_shows_commands() -> None:
    assert {shlex.split(line)[0] for line in shown_commands("README.md")} >= {
        "export",
        "run",
        "verify",
        "bench",
        "inspect",
    }


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_shown_command_is_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] in VERBS
    with cli.make_context("edgeprune", words, obj=Ui()) as context:
        name, command, rest = cli.resolve_command(context, words)
        if isinstance(command, click.Group):
            name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        try:
            options = command.make_context(name, rest, parent=context).params
        except click.exceptions.Exit:  # an option that answers by itself, such as --list-recipes
            return
    for option, known in NAMES.items():
        assert options.get(option) is None or options[option] in known


def test_verbs_named_in_the_text_exist() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    assert set(re.findall(r"`edgeprune ([a-z-]+)", text)) <= set(VERBS)
