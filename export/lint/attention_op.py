"""The Attention operator as TensorRT's parser takes it."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label

RANK, MASK = 4, 3  # of query, key, value and mask; the mask is the fourth input


def attention_op(context: LintContext) -> list[Finding]:
    """Refuse past keys and values, other outputs than the first, and inputs of another rank than four."""
    findings = []
    for node in (node for node in context.facts.nodes if node.op_type == "Attention"):
        reasons = []
        if any(node.input[MASK + 1 :]):
            reasons.append("Attention takes no past keys and values")
        if any(node.output[1:]):
            reasons.append("only the first output of Attention is made")
        ranks = {context.facts.rank(name) for name in node.input[: MASK + 1] if name}
        if ranks - {None, RANK}:
            reasons.append(f"Attention takes queries, keys, values and masks of {RANK} axes")
        findings += [Finding("attention-op", label(node), reason) for reason in reasons]
    return findings
