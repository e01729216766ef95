"""Every error code the package can raise, read from its source."""

from __future__ import annotations

import ast
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune import errors

ROOT = Path(__file__).parents[2]
EXIT_CODES = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.EdgepruneError)
}
SIGNALS = {"interrupted": 128 + signal.SIGINT, "terminated": 128 + signal.SIGTERM}
PASSED_ON = {"self.code"}  # an error that came from another process, where it was raised


@dataclass
class Source:
    """The parsed modules: every node's enclosing definitions, every call by the last name of what it calls."""

    around: dict[ast.AST, tuple[ast.AST, ...]] = field(default_factory=dict)
    calls: dict[str, list[ast.Call]] = field(default_factory=lambda: defaultdict(list))
    classes: list[ast.ClassDef] = field(default_factory=list)
    places: dict[ast.Call, str] = field(default_factory=dict)

    def read_text(self, text: str, name: str) -> None:
        """Add a module."""
        self._walk(ast.parse(text), (), name)

    def _walk(self, node: ast.AST, around: tuple[ast.AST, ...], file: str) -> None:
        self.around[node] = around
        if isinstance(node, ast.Call):
            self.calls[last_name(node.func)].append(node)
            self.places[node] = f"{file}:{node.lineno}"
        if isinstance(node, ast.ClassDef):
            self.classes.append(node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            around = (*around, node)
        for child in ast.iter_child_nodes(node):
            self._walk(child, around, file)

    def texts(self, node: ast.expr) -> set[str]:
        """Return the texts an expression can have; ValueError when that cannot be read from the source."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.IfExp):
            return self.texts(node.body) | self.texts(node.orelse)
        if isinstance(node, ast.JoinedStr):
            made = {""}
            for part in node.values:
                inner = part.value if isinstance(part, ast.FormattedValue) else part
                made = {start + end for start in made for end in self.texts(inner)}
            return made
        if isinstance(node, ast.Name):
            found = [text for value in self._arguments(node) for text in self.texts(value)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found = [text for value in self._attributes(node) for text in self.texts(value)]
        else:
            found = []
        if not found:
            raise ValueError(f"line {node.lineno}: `{ast.unparse(node)}` cannot be read; write the code as a text")
        return set(found)

    def _arguments(self, name: ast.Name) -> Iterator[ast.expr]:
        """Yield what is passed for the parameter of that name of the function around it."""
        for function in self.around[name]:
            if not isinstance(function, ast.FunctionDef):
                continue
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            for call in self.calls[function.name]:
                yield from (k.value for k in call.keywords if k.arg == name.id)
                if name.id in names and len(call.args) > names.index(name.id):
                    yield call.args[names.index(name.id)]

    def _attributes(self, node: ast.Attribute) -> Iterator[ast.expr]:
        """Yield what the classes derived from the one around it set for an attribute, or it itself without such."""
        owner = next(n for n in self.around[node] if isinstance(n, ast.ClassDef))
        derived = [kind for kind in self.classes if owner.name in map(last_name, kind.bases)]
        for kind in derived or [owner]:
            for line in kind.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == node.attr:
                    yield line.value


def last_name(node: ast.expr) -> str:
    """Return `c` of `a.b.c`, and "" of what is no name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def raised_codes() -> dict[tuple[int, str], list[str]]:
    """Return the places in the source by (exit code, error code).

    Raises:
        ValueError: an error without a code, or a code that is not to be read from the source.
    """
    source = Source()
    for folder in ("edgeprune", "export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source.read_text(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for call, place in source.places.items():
        name, given = last_name(call.func), next((k.value for k in call.keywords if k.arg == "code"), None)
        if given is None or ast.unparse(given) in PASSED_ON:
            if name in EXIT_CODES and given is None:
                raise ValueError(f"{place}: {name} without a code")
            continue
        if name not in EXIT_CODES:
            raise ValueError(f"{place}: `{name}` takes a code and is no error of edgeprune.errors")
        for text in source.texts(given):
            exit_code = SIGNALS[text] if name == "EdgepruneError" else EXIT_CODES[name]
            found[exit_code, text].append(place)
    return dict(found)
