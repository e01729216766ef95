"""ScatterTokens: tokens go back to given positions of a longer sequence, for dense prediction.

Inputs: base [B, N, D], tokens [B, K, D], indices [B, K] int32 into N, each position once.
Outputs: [B, N, D], base with the tokens in their places.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx.defs import OpSchema

from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION, TOKENS, plugin_attributes

NAME = "ScatterTokens"


def schema() -> OpSchema:
    """Return the signature of the op."""
    Parameter = OpSchema.FormalParameter
    return OpSchema(
        NAME,
        DOMAIN,
        DOMAIN_VERSION,
        doc="Tokens at given positions of a longer sequence.",
        inputs=[Parameter("base", "T"), Parameter("tokens", "T"), Parameter("indices", "tensor(int32)")],
        outputs=[Parameter("out", "T")],
        type_constraints=[("T", TOKENS, "tokens")],
        attributes=plugin_attributes(),
    )


def output_shape(base: Sequence[int | str]) -> list[int | str]:
    """Return the shape of the output."""
    return list(base)


def body(opset: int) -> str:
    """Return the op as an ONNX function in text form; opset at least 13."""
    return f"""
<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {DOMAIN_VERSION}]>
{NAME} <plugin_namespace, plugin_version> (base, tokens, indices) => (out)
{{
  minus_one = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  first_axis = Constant <value_ints = [0]> ()
  second_axis = Constant <value_ints = [1]> ()
  positions = Cast <to = 7> (indices)
  shape = Shape (positions)
  batch_list = Slice (shape, first_axis, second_axis, first_axis)
  batch = Squeeze (batch_list, first_axis)
  images = Range (zero, batch, one)
  images_column = Unsqueeze (images, second_axis)
  none = Sub (positions, positions)
  image_of = Add (none, images_column)
  image_at = Unsqueeze (image_of, minus_one)
  position_at = Unsqueeze (positions, minus_one)
  at = Concat <axis = -1> (image_at, position_at)
  out = ScatterND (base, at, tokens)
}}
"""
