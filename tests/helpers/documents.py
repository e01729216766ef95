"""What the Markdown documents hold: code blocks, commands, code in the text, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKIPPED = {".venv", ".stage", ".git", "out", "build", "node_modules"}
SHELL = ("sh", "console", "")  # a block without a language is one of commands


@dataclass(frozen=True)
class Block:
    """One fenced block of a document; `line` is that of its fence, from 1."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def all_documents() -> list[str]:
    """Return every Markdown file of the project, relative to its root."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(str(path) for path in paths if not SKIPPED & set(path.parts))


def read(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    text = read(document)
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def without_blocks(text: str) -> str:
    """Return a document's text without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(block: Block) -> list[str]:
    """Return the command lines of a block of shell: continued lines are joined, comments and shown output dropped."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def inline_code(document: str) -> list[str]:
    """Return what stands between backticks in the text, each once; a line break in it is a space."""
    paragraphs = re.split(r"\n\s*\n", without_blocks(read(document)))
    found = [" ".join(code.split()) for paragraph in paragraphs for code in re.findall(r"`([^`]+)`", paragraph)]
    return list(dict.fromkeys(found))


def anchors(document: str) -> set[str]:
    """Return the names of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", without_blocks(read(document)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (numbered := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(numbered)
    return found


def links(document: str) -> list[str]:
    """Return the targets of a document's links and pictures that are no web addresses."""
    text = re.sub(r"`[^`\n]*`", "", without_blocks(read(document)))
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text) + re.findall(
        r"(?:src|srcset|href)=\"([^\"]+)\"", text
    )
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
