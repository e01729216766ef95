"""Attributes a parser does not look at: what it makes of the node computes something else, and nothing says so."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import STANDARD_DOMAINS, attribute, label
from edgeprune.export.targets.tensorrt_versions import first_that

NEUTRAL = {"reduction": b"none", "start": 0}  # what says the same as nothing


def ignored_attributes(context: LintContext) -> list[Finding]:
    """Refuse attributes that would have no effect: a reduction of scatters, the bounds of Shape."""
    return [
        Finding("ignored-attribute", label(node), f"{name} of {node.op_type} {_since(node.op_type, name)}")
        for node in context.facts.all_nodes
        if node.domain in STANDARD_DOMAINS
        for name in context.family.ignored.get(node.op_type, ())
        if attribute(node, name) not in (None, NEUTRAL.get(name))
    ]


def _since(operator: str, name: str) -> str:
    since = first_that(lambda family: name not in family.ignored.get(operator, ()))
    return "is taken by no version of TensorRT" if since is None else f"is ignored before TensorRT {since}"
