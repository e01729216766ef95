"""Imports point one way, and each heavy package has its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Package or module -> what it may import besides itself. The two modules listed stand below their packages:
# `runtime.manifest` is data alone, and `checks.compare` is what exporting and verifying have in common.
_BASE = {"errors", "version", "files", "runtime.manifest"}
_MODEL = _BASE | {"models", "pruning", "data"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "runtime.manifest": set(),
    "plugins": {"errors", "version", "files"},
    "models": _BASE,
    "pruning": _BASE | {"models"},
    "data": _BASE,
    "runtime": _BASE | {"data", "plugins"},
    "serving": _BASE | {"runtime", "plugins"},
    "quantization": _MODEL,
    "training": _MODEL | {"quantization"},
    "convert": _MODEL,
    "checks.compare": _MODEL,
    "export": _MODEL | {"runtime", "checks.compare", "plugins", "quantization"},
    "checks": _MODEL | {"runtime", "checks.compare", "export", "quantization"},
    "bench": _MODEL | {"runtime", "checks", "export"},
    "search": _MODEL | {"runtime", "checks", "export", "bench", "quantization"},
    "cli": _MODEL
    | {"runtime", "checks", "export", "bench", "search", "training", "convert", "plugins", "serving", "quantization"},
}
# The facade names the public API lazily, and `python -m edgeprune` is the command.
FACADE = {"edgeprune", "edgeprune.__main__"}


def modules() -> dict[str, Path]:
    """Return every module of the package by its import name."""
    found = {}
    for folder, package in ((ROOT / "edgeprune", "edgeprune"), (ROOT / "export", "edgeprune.export")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(p for p in parts if p != "__init__")])
            found[name] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield (statement, dotted name) of every import outside `if TYPE_CHECKING`, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from imports(ast.Module(node.orelse, type_ignores=[]))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{'.' * node.level}{node.module or ''}.{alias.name}"
        else:
            yield from imports(node)


def layer(dotted: str) -> str:
    """Return the key of `ALLOWED` for a name inside edgeprune."""
    parts = dotted.split(".")[1:]
    module = ".".join(parts[:2])
    return module if module in ALLOWED else parts[0]


def imported(module: str) -> list[tuple[int, str]]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [(node.lineno, name) for node, name in imports(tree)]


@pytest.mark.parametrize("module", sorted(set(MODULES) - FACADE))
def test_imports_point_down(module: str) -> None:
    own = layer(module)
    assert own in ALLOWED, f"{module}: add the package '{own}' to ALLOWED"
    wrong = [
        f"{MODULES[module]}:{line} imports {name}; {own} may import {sorted(ALLOWED[own])}"
        for line, name in imported(module)
        if name.startswith("edgeprune.") and layer(name) not in ALLOWED[own] | {own}
    ]
    assert wrong == []


def test_allowed_imports_have_no_cycle() -> None:
    def below(name: str) -> set[str]:
        return ALLOWED[name].union(*(below(other) for other in ALLOWED[name]))  # a cycle would not end

    assert all(name not in below(name) for name in ALLOWED)


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        f"{module}:{line}"
        for module in MODULES
        if layer(f"{module}.") != "cli" and module != "edgeprune.__main__"
        for line, name in imported(module)
        if name.startswith("edgeprune.cli")
    ]
    assert wrong == []


def test_no_import_is_relative() -> None:
    assert [f"{m}:{line}" for m in MODULES for line, name in imported(m) if name.startswith(".")] == []


def test_compiler_is_imported_under_its_own_name() -> None:
    assert [f"{m}:{line}" for m in MODULES for line, name in imported(m) if name.split(".")[0] == "export"] == []


def users(package: str, within: tuple[str, ...]) -> list[str]:
    return sorted(
        m for m in MODULES if m.startswith(within) and any(name.split(".")[0] == package for _, name in imported(m))
    )


def test_onnxruntime_is_imported_by_one_module_of_the_run_time() -> None:
    within = ("edgeprune.runtime", "edgeprune.data", "edgeprune.models", "edgeprune.pruning", "edgeprune.training")
    assert users("onnxruntime", within) == ["edgeprune.runtime.ort"]


@pytest.mark.parametrize(
    ("package", "seam"),
    [("tensorrt", "plugins.loader"), ("pycuda", "runtime.cuda"), ("cuda", "runtime.cuda")],
)
def test_what_drives_a_gpu_is_imported_by_one_module(package: str, seam: str) -> None:
    assert users(package, ("edgeprune",)) == [f"edgeprune.{seam}"]


@pytest.mark.parametrize("package", ["torch", "onnx", "onnx_graphsurgeon", "sklearn", "safetensors"])
def test_run_time_never_imports_what_a_device_lacks(package: str) -> None:
    assert users(package, ("edgeprune.runtime", "edgeprune.data.preprocess", "edgeprune.data.overlay")) == []


def test_walk_sees_imports_wherever_they_stand() -> None:
    code = (
        "import a\ndef f():\n    from b import c\nif TYPE_CHECKING:\n    import d\nelse:\n    import e\nfrom . import g"
    )
    assert [name for _, name in imports(ast.parse(code))] == ["a", "b.c", "e", "..g"]
