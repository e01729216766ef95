"""Graph pass: remove nodes whose outputs nobody reads and order the rest."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def drop_dead_nodes(graph: gs.Graph) -> gs.Graph:
    """Return the graph without dead nodes and unused tensors, topologically sorted."""
    return graph.cleanup().toposort()
