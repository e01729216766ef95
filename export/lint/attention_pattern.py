"""The form of attention TensorRT makes one kernel of: MatMul, mask, Softmax, MatMul, scaled in front of the first."""

from __future__ import annotations

import onnx

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import Facts, label

HANDED_ON = ("Cast", "Identity")
AXES = 4


def attention_pattern(context: LintContext) -> list[Finding]:
    """Refuse attention that loses the fusion: scaled scores, a mask of few axes, weights somebody else reads."""
    facts, findings = context.facts, []
    for node in (node for node in facts.nodes if node.op_type == "Softmax"):
        readers = facts.behind(node.output[0], *HANDED_ON)
        if any(reader.op_type == "MatMul" for reader in readers):
            reasons = _between(facts, node.input[0])
            if any(reader.op_type != "MatMul" for reader in readers):
                reasons.append("the attention weights are read besides the product with the values")
            findings += [Finding("attention-pattern", label(node), reason) for reason in reasons]
    return findings


def _between(facts: Facts, scores: str) -> list[str]:
    """Return what is wrong on the way back from the softmax to the product of queries and keys."""
    reasons: list[str] = []
    while (node := facts.before(scores, *HANDED_ON)) is not None and node.op_type != "MatMul":
        if node.op_type not in ("Add", "Mul", "Div"):
            return [*reasons, f"{node.op_type} stands between the scores and their softmax"]
        scores, other = _sides(facts, node)
        if node.op_type != "Add":
            reasons.append(f"{node.op_type} scales the scores; scale the queries or the keys in front of the product")
        elif facts.rank(scores) == AXES and (rank := facts.rank(other)) is not None and rank < AXES:
            reasons.append(f"the mask has {rank} axes, needed are {AXES}")
    return reasons


def _sides(facts: Facts, node: onnx.NodeProto) -> tuple[str, str]:
    """Return the input that comes from a product, and the other."""
    first, second = node.input
    makers = [facts.before(name, *HANDED_ON, "Add", "Mul", "Div") for name in (first, second)]
    swapped = makers[0] is None or makers[0].op_type != "MatMul"
    return (second, first) if swapped else (first, second)
