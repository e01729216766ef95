"""Nodes that become plugins: what the parser and the plugin's creator must find on them."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

from edgeprune.export.lint import Finding, LintContext
from edgeprune.export.lint.facts import attribute, label
from edgeprune.export.ops import DOMAIN, PLUGIN_FIELDS, gather_tokens, scatter_tokens, topk_gather
from edgeprune.plugins.contract import CREATORS

SCHEMAS: dict[str, OpSchema] = {s.name: s for s in (op.schema() for op in (topk_gather, gather_tokens, scatter_tokens))}


def plugin_fields(context: LintContext) -> list[Finding]:
    """Refuse `edgeprune` nodes whose creator would not be found, or not get what it asks for."""
    return [
        Finding("plugin-fields", label(node), reason)
        for node in context.facts.all_nodes
        if node.domain == DOMAIN
        for reason in _reasons(node)
    ]


def _reasons(node: onnx.NodeProto) -> list[str]:
    if node.op_type not in CREATORS:
        return [f"no plugin is called {node.op_type}, there are {', '.join(CREATORS)}"]
    schema, name = SCHEMAS[node.op_type], node.op_type
    reasons = [
        f'{name} has no {field}="{value}", so the parser looks for another plugin'
        for field, value in PLUGIN_FIELDS.items()
        if attribute(node, field) != value.encode()
    ]
    given = {a.name for a in node.attribute} - set(PLUGIN_FIELDS)
    wanted = set(schema.attributes) - set(PLUGIN_FIELDS)
    reasons += [f"{name} lacks the attribute {missing}" for missing in sorted(wanted - given)]
    reasons += [f"the creator of {name} has no field {extra}" for extra in sorted(given - wanted)]
    outputs = len([output for output in node.output if output])
    if outputs != len(schema.outputs):
        reasons.append(f"{name} declares {outputs} of its {len(schema.outputs)} outputs")
    if len([x for x in node.input if x]) != len(schema.inputs):
        reasons.append(f"{name} needs all its {len(schema.inputs)} inputs")
    return reasons
