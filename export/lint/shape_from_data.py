"""Sizes computed from the image: an engine would have to wait for them, and could not be captured."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label
from edgeprune.runtime.router import SLOTS

# The inputs that say how large something is.
SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
MEASURES = ("Shape", "Size")  # what they give is known without the data


def shape_from_data(context: LintContext) -> list[Finding]:
    """Refuse sizes that depend on an input other than the token counts."""
    data = {i.name for i in context.model.graph.input if i.name not in (SLOTS, *context.facts.initializers)}
    findings = []
    for node in context.facts.nodes:
        places = SIZES.get(node.op_type, ())
        if any(name in data for place in places for name in node.input[place : place + 1]):
            reason = f"{node.op_type} gets a size that depends on the image"
            findings.append(Finding("shape-from-data", label(node), reason))
        if node.op_type not in MEASURES and not data.isdisjoint(node.input):
            data.update(node.output)
    return findings
