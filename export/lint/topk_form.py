"""What TensorRT's TopK layer asks of the node."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import attribute, label
from edgeprune.export.targets.tensorrt_versions import first_that

AXES = 4  # only one of the last so many can be ranked along


def topk_form(context: LintContext) -> list[Finding]:
    """Refuse a K above the limit or, of old versions, computed; results out of order; an axis too far in front."""
    findings = []
    for node in (node for node in context.facts.nodes if node.op_type == "TopK"):
        reasons = []
        k = context.facts.value(node.input[1])
        if k is not None and int(k.reshape(())) > context.family.topk_limit:
            reasons.append(f"K of TopK is {int(k.reshape(()))}, the limit is {context.family.topk_limit}")
        if not context.family.k_tensor and not context.facts.is_constant(node.input[1]):
            since = first_that(lambda family: family.k_tensor)
            reasons.append(f"K of TopK is computed, which is taken from TensorRT {since} on")
        if attribute(node, "sorted") == 0:
            reasons.append("TopK gives its values sorted only, write sorted=1")
        rank, axis = context.facts.rank(node.input[0]), attribute(node, "axis")
        axis = -1 if axis is None else axis
        if rank is not None and axis % rank < rank - AXES:
            reasons.append(f"TopK ranks along one of the last {AXES} axes only")
        findings += [Finding("topk", label(node), reason) for reason in reasons]
    return findings
