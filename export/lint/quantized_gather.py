"""Plugins between QuantizeLinear and DequantizeLinear: they move 8-bit numbers, or there is nothing to gain."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import label
from edgeprune.export.ops import DOMAIN
from edgeprune.export.passes.quantize_before_gather import TOKENS


def quantized_gather(context: LintContext) -> list[Finding]:
    """Refuse DequantizeLinear in front of a plugin, and QuantizeLinear as all that reads what one gathered."""
    facts, findings = context.facts, []
    for node in facts.nodes:
        if node.domain != DOMAIN or node.op_type not in TOKENS:
            continue
        maker = facts.producers.get(node.input[TOKENS[node.op_type]])
        readers = facts.readers.get(node.output[0], [])
        if maker is not None and maker.op_type == "DequantizeLinear":
            reason = f"DequantizeLinear stands in front of {node.op_type}, and belongs behind it"
            findings.append(Finding("quantized-plugin", label(node), reason))
        if len({(one.op_type, *one.input[1:]) for one in readers}) == 1 and readers[0].op_type == "QuantizeLinear":
            reason = f"QuantizeLinear stands behind {node.op_type}, and belongs in front of it"
            findings.append(Finding("quantized-plugin", label(node), reason))
    return findings
