"""Bodies of operators inside the model: old parsers know none, later ones prefer them to a plugin of their name."""

from __future__ import annotations

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.targets.tensorrt_versions import first_that
from edgeprune.plugins.contract import CREATORS


def local_functions(context: LintContext) -> list[Finding]:
    """Refuse functions the version cannot read, or would take in place of the plugin."""
    used = {(node.domain, node.op_type) for node in context.facts.all_nodes}
    findings = []
    for function in context.model.functions:
        if (function.domain, function.name) not in used:
            continue
        if context.family.functions == "unknown":
            since = first_that(lambda family: family.functions != "unknown")
            reason = f"local functions ({function.name}) are known from TensorRT {since} on"
            findings.append(Finding("local-function", function.name, reason))
        elif context.family.functions == "function wins" and function.name in CREATORS:
            since = first_that(lambda family: family.functions == "plugin wins")
            reason = f"the body of {function.name} is taken in place of the plugin before TensorRT {since}"
            findings.append(Finding("local-function", function.name, reason))
    return findings
