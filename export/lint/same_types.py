"""Inputs of different types where the operator wants one; nothing converts them in a strongly typed network."""

from __future__ import annotations

import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, label

ELEMENTWISE = {"Pow": 2}  # ONNX lets these inputs differ, TensorRT does not


def same_types(context: LintContext) -> list[Finding]:
    """Refuse nodes that mix element types."""
    findings = []
    for node in context.facts.nodes:
        if node.domain in STANDARD_DOMAINS:
            for types in _alike(node, context.facts.opset, context.facts.types):
                if len(types) > 1:
                    reason = f"{node.op_type} of {' and '.join(sorted(types))}: cast one of them"
                    findings.append(Finding("mixed-types", label(node), reason))
    return findings


def _alike(node: onnx.NodeProto, opset: int, types: dict[str, str]) -> list[set[str]]:
    """Return the known types of the inputs that must be of one."""
    if not onnx.defs.has(node.op_type, opset, ""):
        return []
    formal = list(onnx.defs.get_schema(node.op_type, opset, "").inputs)
    if formal and formal[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        if not formal[-1].is_homogeneous:
            return []
        formal += formal[-1:] * len(node.input)
    groups: dict[str, set[str]] = {}
    for place, (name, parameter) in enumerate(zip(node.input, formal, strict=False)):
        key = "elementwise" if place < ELEMENTWISE.get(node.op_type, 0) else parameter.type_str
        if name in types:
            groups.setdefault(key, set()).add(types[name])
    return list(groups.values())
