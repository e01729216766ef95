"""The `edgeprune` operator domain, version 1: one file per op.

Each file holds the op's schema (inputs, outputs, attributes), its shape rule and its body in standard operators. The
torch reference is in `edgeprune.pruning.ops`.
"""

from __future__ import annotations

from onnx.defs import OpSchema

DOMAIN = "edgeprune"
DOMAIN_VERSION = 1
# TensorRT's parser ignores the domain and finds the plugin by these fields.
PLUGIN_FIELDS = {"plugin_namespace": "edgeprune", "plugin_version": "1"}
TOKENS = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int8", "float8e4m3fn")]  # bytes are moved


def plugin_attributes() -> list[OpSchema.Attribute]:
    """Return the attributes every op carries for TensorRT."""
    return [OpSchema.Attribute(name, OpSchema.AttrType.STRING, required=True) for name in PLUGIN_FIELDS]


# From patch positions [B, K] to kept [B, P+K, D]: the prefix and those rows of tokens [B, P+N, D], for any batch.
GATHER_POSITIONS = """
  one = Constant <value_ints = [1]> ()
  zero = Constant <value_ints = [0]> ()
  minus_one = Constant <value_ints = [-1]> ()
  prefix_value = Constant <value_int: int = @num_prefix_tokens> ()
  patch_rows = Add (positions, prefix_value)
  first = Slice (positions, zero, one, one)
  zeros = Sub (first, first)
  start = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  prefix_range = Range (start, prefix_value, step)
  prefix_rows = Add (zeros, prefix_range)
  rows = Concat <axis = 1> (prefix_rows, patch_rows)
  rows_at = Unsqueeze (rows, minus_one)
  kept = GatherND <batch_dims = 1> (tokens, rows_at)
""".strip()
