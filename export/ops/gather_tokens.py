"""GatherTokens: the prefix and the patch tokens at given positions.

Inputs: tokens [B, P+N, D], indices [B, K] int32 into N.
Outputs: [B, P+K, D].
Attributes: num_prefix_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx.defs import OpSchema

from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION, GATHER_POSITIONS, TOKENS, plugin_attributes

NAME = "GatherTokens"


def schema() -> OpSchema:
    """Return the signature of the op."""
    Parameter = OpSchema.FormalParameter
    return OpSchema(
        NAME,
        DOMAIN,
        DOMAIN_VERSION,
        doc="The prefix and the patch tokens at given positions.",
        inputs=[Parameter("tokens", "T"), Parameter("indices", "tensor(int32)")],
        outputs=[Parameter("kept", "T")],
        type_constraints=[("T", TOKENS, "tokens")],
        attributes=[
            OpSchema.Attribute("num_prefix_tokens", OpSchema.AttrType.INT, required=True),
            *plugin_attributes(),
        ],
    )


def output_shape(tokens: Sequence[int | str], indices: Sequence[int | str], num_prefix_tokens: int) -> list[int | str]:
    """Return the shape of the output."""
    return [tokens[0], num_prefix_tokens + int(indices[1]), tokens[2]]


def body(opset: int) -> str:
    """Return the op as an ONNX function in text form; opset at least 13."""
    return f"""
<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {DOMAIN_VERSION}]>
{NAME} <num_prefix_tokens, plugin_namespace, plugin_version> (tokens, indices) => (kept)
{{
  positions = Cast <to = 7> (indices)
  {GATHER_POSITIONS}
}}
"""
