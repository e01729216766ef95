"""TopKGather: keep the prefix and the k best patch tokens.

Inputs: scores [B, N] float32, tokens [B, P+N, D].
Outputs: kept [B, P+k, D], indices [B, k] int32 into N, count [B] int32.
Attributes: k, num_prefix_tokens, order (0 by rank, 1 by position), mode (0 top-k, 1 threshold, 2 mass), threshold.
Ties go to the lower index, NaN sorts last; slots past the count hold the next best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx.defs import OpSchema

from edgeprune.export.ops import DOMAIN, DOMAIN_VERSION, GATHER_POSITIONS, TOKENS, plugin_attributes

NAME = "TopKGather"
NAN_SCORE = -3.4e38  # what NaN is ranked as: behind every finite score above -3e38


def schema() -> OpSchema:
    """Return the signature of the op."""
    Attribute, Parameter, Kind = OpSchema.Attribute, OpSchema.FormalParameter, OpSchema.AttrType
    return OpSchema(
        NAME,
        DOMAIN,
        DOMAIN_VERSION,
        doc="Keep the prefix and the k best patch tokens.",
        inputs=[Parameter("scores", "tensor(float)"), Parameter("tokens", "T")],
        outputs=[Parameter("kept", "T"), Parameter("indices", "tensor(int32)"), Parameter("count", "tensor(int32)")],
        type_constraints=[("T", TOKENS, "tokens")],
        attributes=[
            Attribute("k", Kind.INT, required=True),
            Attribute("num_prefix_tokens", Kind.INT, required=True),
            *(Attribute(name, Kind.INT, required=True) for name in ("order", "mode")),
            Attribute("threshold", Kind.FLOAT, required=True),
            *plugin_attributes(),
        ],
    )


def output_shapes(
    scores: Sequence[int | str], tokens: Sequence[int | str], k: int, num_prefix_tokens: int
) -> tuple[list[int | str], list[int | str], list[int | str]]:
    """Return the shapes of kept, indices and count."""
    return [tokens[0], num_prefix_tokens + k, tokens[2]], [scores[0], k], [scores[0]]


def body(opset: int, order: int, mode: int) -> str:
    """Return the op as an ONNX function in text form.

    A function cannot branch on an attribute, so `order` and `mode` choose the text; k, num_prefix_tokens and threshold
    stay attributes. Scores below -3e38 tie; that leaves room for NaN behind them.

    Args:
        opset: version of the standard operators, at least 13.
        order: 0 by rank, 1 by position.
        mode: 0 top-k, 1 threshold, 2 cumulative mass.
    """
    by_position = "positions, unused = TopK <axis = 1, largest = 0, sorted = 1> (ranks, k_list)"
    positions = by_position if order else "positions = Identity (ranks)"
    count = {
        0: """
  count_long = Add (zeros_flat, k_value)
  count = Cast <to = 6> (count_long)""",
        1: """
  limit = Constant <value_float: float = @threshold> ()
  above = Greater (scores, limit)
  above_int = Cast <to = 6> (above)
  count = ReduceSum <keepdims = 0> (above_int, one)""",
        2: """
  limit = Constant <value_float: float = @threshold> ()
  two = Constant <value_ints = [2]> ()
  shape = Shape (scores)
  n_list = Slice (shape, one, two)
  sorted_scores, sorted_ranks = TopK <axis = 1, largest = 1, sorted = 1> (ranked, n_list)
  no_score = Constant <value_float = 0.0> ()
  mass = Max (sorted_scores, no_score)
  axis_one = Constant <value_int = 1> ()
  before = CumSum <exclusive = 1> (mass, axis_one)
  within = Less (before, limit)
  within_int = Cast <to = 7> (within)
  counted = ReduceSum <keepdims = 0> (within_int, one)
  at_least_one = Max (counted, one)
  whole = Constant <value_float = 1.0> ()
  everything = GreaterOrEqual (limit, whole)
  count_long = Where (everything, n_list, at_least_one)
  count_full = Add (count_long, zeros_flat)
  count = Cast <to = 6> (count_full)""",
    }[mode]
    return f"""
<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {DOMAIN_VERSION}]>
{NAME} <k, num_prefix_tokens, order, mode, threshold, plugin_namespace, plugin_version>
  (scores, tokens) => (kept, indices, count)
{{
  missing = IsNaN (scores)
  last = Constant <value_float = {NAN_SCORE}> ()
  low = Constant <value_float = -3.0e38> ()
  bounded = Max (scores, low)
  ranked = Where (missing, last, bounded)
  k_value = Constant <value_int: int = @k> ()
  k_shape = Constant <value_ints = [1]> ()
  k_list = Reshape (k_value, k_shape)
  top_scores, ranks = TopK <axis = 1, largest = 1, sorted = 1> (ranked, k_list)
  {positions}
  indices = Cast <to = 6> (positions)
  {GATHER_POSITIONS}
  zeros_flat = Reshape (zeros, minus_one)
  {count.strip()}
}}
"""
