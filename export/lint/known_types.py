"""Element types a version of TensorRT has no tensors of."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.targets.tensorrt_versions import Family, first_that


def known_types(context: LintContext) -> list[Finding]:
    """Refuse tensors of types the version does not know; one finding per type, at the first such tensor."""
    first = {element_type: name for name, element_type in reversed(context.facts.types.items())}
    return [
        Finding("type-unknown", name, f"{element_type} tensors {_since(element_type)}")
        for element_type, name in first.items()
        if element_type not in context.family.types
    ]


def _since(element_type: str) -> str:
    def knows(family: Family) -> bool:
        return element_type in family.types

    since = first_that(knows)
    return "are known to no version of TensorRT" if since is None else f"are known from TensorRT {since} on"
