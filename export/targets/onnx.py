"""Target `onnx`: standard operators only, for any engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.export.targets.base import GraphPass, Target

if TYPE_CHECKING:
    from edgeprune.export.emit.dialects.plain import PlainDialect
    from edgeprune.export.lint import Rule

STANDARD_DOMAINS = ("", "ai.onnx")


def make_dialect() -> PlainDialect:
    """Return the portable dialect."""
    from edgeprune.export.emit.dialects.plain import PlainDialect

    return PlainDialect()


def graph_passes(selection: str, batch: tuple[int, int]) -> tuple[GraphPass, ...]:
    """Return the ordered graph passes."""
    from edgeprune.export.passes.drop_dead_nodes import drop_dead_nodes
    from edgeprune.export.passes.lower_selection import attach_bodies, inline_bodies

    return (attach_bodies if selection == "plugin" else inline_bodies, drop_dead_nodes)


def lint_rules() -> tuple[Rule, ...]:
    """Return the rules every static graph must obey."""
    from edgeprune.export.lint.constant_k import constant_k
    from edgeprune.export.lint.data_dependent_ops import data_dependent_ops
    from edgeprune.export.lint.foreign_domains import foreign_domains
    from edgeprune.export.lint.tokens_shrink import tokens_shrink

    return (foreign_domains, data_dependent_ops, constant_k, tokens_shrink)


TARGET = Target(
    name="onnx",
    backend="any ONNX engine",
    precision="fp32",
    summary="standard operators only; runs in ONNX Runtime, OpenVINO and others",
    opset=17,
    opsets=(17, 18, 19, 20, 21),
    domains=STANDARD_DOMAINS,
    packages=(("onnx", "export"), ("onnx_graphsurgeon", "export"), ("onnxruntime", "ort")),
    dialect=make_dialect,
    passes=graph_passes,
    rules=lint_rules,
)
