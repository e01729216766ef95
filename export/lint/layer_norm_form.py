"""LayerNormalization as every version of TensorRT reads it alike."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label

INPUTS = ("data", "scale", "bias")


def layer_norm_form(context: LintContext) -> list[Finding]:
    """Refuse a missing scale or bias, for which some versions put zeros, and any output but the first."""
    findings = []
    for node in (node for node in context.facts.nodes if node.op_type == "LayerNormalization"):
        given = [*node.input, "", ""][: len(INPUTS)]
        findings += [
            Finding("layer-norm", label(node), f"LayerNormalization needs a {what} of its own")
            for what, name in zip(INPUTS, given, strict=True)
            if not name
        ]
        if any(node.output[1:]):
            findings.append(Finding("layer-norm", label(node), "only the first output of LayerNormalization is made"))
    return findings
