"""The documents say what is true of the code: every error code, every link."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.helpers.documents import Block, all_documents, anchors, blocks, commands, links, read
from tests.helpers.error_codes import Source, raised_codes

ROOT = Path(__file__).parents[2]
TROUBLE = ROOT / "docs" / "troubleshooting.md"
SHORT_SEARCH = ["--images", "64", "--subset", "32", "--evaluations", "6", "--finalists", "1"]  # minutes otherwise


def explained_codes() -> list[tuple[int, str]]:
    """Return (exit code, error code) for every row of the page's tables."""
    found = []
    for section in re.split(r"^## ", TROUBLE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        exits = [int(number) for number in re.findall(r"\d+", section.partition("\n")[0])]
        for code, rest in re.findall(r"^\| `([a-z0-9-]+)` \|(.*)$", section, re.MULTILINE):
            (exit_code,) = exits if len(exits) == 1 else [e for e in exits if f"({e})" in rest]
            found.append((exit_code, code))
    return found


def test_every_error_code_is_explained_once_under_its_exit_code() -> None:
    raised, explained = raised_codes(), explained_codes()
    missing = {pair: raised[pair] for pair in sorted(raised.keys() - set(explained))}
    assert not missing, f"raised, but not in {TROUBLE.name}: {missing}"
    gone = sorted(set(explained) - raised.keys())
    assert not gone, f"in {TROUBLE.name}, but no longer raised: {gone}"
    assert len(explained) == len(set(explained))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('InputError("a", code="one")', {"one"}),
        ('InputError("a", code="one" if x else "two")', {"one", "two"}),
        ('def f(code):\n    InputError("a", code=code)\nf("one")\nf(code="two")', {"one", "two"}),
        ('class A:\n    k = "b"\n    def f(self):\n        InputError("", code=f"a-{self.k}")', {"a-b"}),
    ],
)
def test_codes_are_read_from_source(line: str, expected: set[str]) -> None:
    source = Source()
    source.read_text(line, "file.py")
    (call,) = source.calls["InputError"]
    assert source.texts(call.keywords[0].value) == expected


def test_a_code_that_cannot_be_read_is_refused() -> None:
    source = Source()
    source.read_text('InputError("a", code=pick())', "file.py")
    with pytest.raises(ValueError, match="cannot be read"):
        source.texts(source.calls["InputError"][0].keywords[0].value)


@pytest.mark.parametrize("document", all_documents())
def test_links_lead_somewhere(document: str) -> None:
    lost = []
    for target in links(document):
        name, _, anchor = target.partition("#")
        path = ((ROOT / document).parent / name).resolve() if name else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(str(path.relative_to(ROOT)))):
            lost.append(target)
    assert not lost


def test_headings_become_the_anchors_github_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.documents.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# A `b-c`: d, e_f\n\n## Same\n\n## Same\n\n```sh\n# no heading\n```\n")
    assert anchors("a.md") == {"a-b-c-d-e_f", "same", "same-1"}
    (tmp_path / "b.md").write_text('[x](a.md#same) ![y](p.png) `[n](no)` <img src="q.png"> [w](https://a.b)\n')
    assert links("b.md") == ["a.md#same", "p.png", "q.png"]


def tutorial_steps() -> list[Block]:
    """Return the blocks of the tutorial that need no file but those of the checkout and of earlier steps."""
    first, second = (read("docs/tutorial.md").index(f"## Part {part}:") for part in (1, 2))
    lines = [read("docs/tutorial.md").count("\n", 0, place) for place in (first, second)]
    return [
        block
        for block in blocks("docs/tutorial.md")
        if lines[0] < block.line < lines[1] and "out/tutorial" in block.text
    ]


@pytest.mark.slow
def test_the_first_part_of_the_tutorial_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    steps = tutorial_steps()
    assert len(steps) == 8
    verbs = set()
    for block in steps:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
            continue
        for line in commands(block):
            line, _, file = line.partition(" > ")
            words = shlex.split(line)
            words += SHORT_SEARCH if words[1] == "search" else []
            done = cli(*words[1:])
            assert done.code == 0, f"{block}: {line}\n{done.err}"
            if file:
                Path(file).write_text(done.out)
            verbs.add(words[1])
            if words[1] == "verify":
                assert "PASSED" in done.err
                assert ("emulated" in done.err) == ("jetson" in line)
    assert verbs == {"export", "inspect", "verify", "evaluate", "run", "bench", "search", "report", "build"}
    assert len(list(Path("out/tutorial/overlays").iterdir())) == 1
    assert Path("out/tutorial/report.html").stat().st_size > 50_000


def test_pictures_are_small_and_shown() -> None:
    pictures = {path.relative_to(ROOT) for path in (ROOT / "docs/images").iterdir()}
    shown = {Path(target) for target in links("README.md") if target.endswith(".png")}
    assert pictures == shown
    assert all((ROOT / path).stat().st_size < 150 * 1024 for path in pictures)
