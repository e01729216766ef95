"""Numbers that decide which tokens stay are float32: half as many bits tie, and ties fall as the kernel pleases."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label
from edgeprune.export.ops import topk_gather

RANKING = frozenset({"TopK", topk_gather.NAME, "ArgMax", "ArgMin"})
COMPARING = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "CumSum"})
HALF = ("float16", "bfloat16")


def float32_scores(context: LintContext) -> list[Finding]:
    """Refuse rankings, comparisons and running sums of half-precision numbers."""
    return [
        Finding("float32-scores", label(node), f"{node.op_type} decides on {element_type} numbers, not float32")
        for node in context.facts.nodes
        if node.op_type in RANKING | COMPARING and (element_type := context.facts.types.get(node.input[0], "")) in HALF
    ]
