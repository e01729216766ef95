"""Operators of another domain with the name of a standard one: the parser looks the name up and ignores the domain."""

from __future__ import annotations

import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, label
from edgeprune.export.targets.tensorrt_versions import FAMILIES, as_numbers


def name_collisions(context: LintContext) -> list[Finding]:
    """Refuse nodes that would be read as the standard operator of their name."""
    known = FAMILIES[max(FAMILIES, key=as_numbers)].operators  # newer ONNX versions than the one installed have more
    return [
        Finding(
            "name-collision",
            label(node),
            f"{node.domain}.{node.op_type} is read as the standard {node.op_type}: the parser ignores domains",
        )
        for node in context.facts.all_nodes
        if node.domain not in STANDARD_DOMAINS and (onnx.defs.has(node.op_type) or node.op_type in known)
    ]
