"""Operators the parser does not know, or not on this type of data."""

from __future__ import annotations

import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, label
from edgeprune.export.targets.tensorrt_versions import Family, first_that

DATA = {"Where": 1, "OneHot": 2}  # the input that holds the data, unless it is the first
MADE = frozenset({"Constant", "ConstantOfShape", "If"})  # the data is what they make
READ_AS = {"float64": "float32"}


def known_operators(context: LintContext) -> list[Finding]:
    """Refuse standard operators the version does not take, by name or by the type of their data."""
    findings = []
    for node in context.facts.all_nodes:
        if node.domain not in STANDARD_DOMAINS:
            continue
        if node.op_type not in context.family.operators:
            reason = f"{node.op_type} {_since(node.op_type, None)}"
            findings.append(Finding("operator-unknown", label(node), reason))
    for node in context.facts.nodes:
        if node.domain not in STANDARD_DOMAINS or node.op_type not in context.family.operators:
            continue
        for element_type in _types(context, node):
            if not context.family.takes(node.op_type, element_type):
                reason = f"{node.op_type} on {element_type} {_since(node.op_type, element_type)}"
                findings.append(Finding("operator-type", label(node), reason))
    return findings


def _types(context: LintContext, node: onnx.NodeProto) -> list[str]:
    """Return the element types of a node's data that the version knows at all."""
    place = DATA.get(node.op_type, 0)
    names = node.output[:1] if node.op_type in MADE else node.input[place : place + 1]
    names = [*names, *(node.output if node.op_type == "Cast" else ())]
    types = dict.fromkeys(context.facts.types.get(name, "") for name in names)
    return [READ_AS.get(t, t) for t in types if t in context.family.types]


def _since(operator: str, element_type: str | None) -> str:
    def takes(family: Family) -> bool:
        return operator in family.operators if element_type is None else family.takes(operator, element_type)

    since = first_that(takes)
    return "is taken by no version of TensorRT" if since is None else f"is taken from TensorRT {since} on"
