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
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def plugin_attributes() -> list[OpSchema.Attribute]:
    """Return the attributes every op carries for TensorRT."""
    return [OpSchema.Attribute(name, OpSchema.AttrType.STRING, required=True) for name in PLUGIN_FIELDS]
