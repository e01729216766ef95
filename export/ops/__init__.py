"""The `edgeprune` operator domain, version 1: one file per op.

Each file holds the op's schema (inputs, outputs, attributes), its shape rule and its body in standard operators. The
torch reference is in `edgeprune.pruning.ops`.
"""

from __future__ import annotations

DOMAIN = "edgeprune"
DOMAIN_VERSION = 1
# TensorRT's parser ignores the domain and finds the plugin by these fields.
PLUGIN_FIELDS = {"plugin_namespace": "edgeprune", "plugin_version": "1"}
