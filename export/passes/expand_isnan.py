"""Graph pass: missing scores found by a comparison.

TensorRT 8 imports IsNaN as `x != x`, which an optimizer may fold away. No comparison with NaN is true, so a score that
is not at least the smallest number is missing; minus infinity counts as missing too.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

SMALLEST = np.finfo(np.float32).min


def expand_isnan(graph: gs.Graph) -> gs.Graph:
    """Replace every IsNaN."""
    nodes: list[gs.Node] = []
    for node in list(graph.nodes):
        nodes.extend(_expand(node) if node.op == "IsNaN" else [node])
    graph.nodes = nodes
    return graph


def _expand(node: gs.Node) -> list[gs.Node]:
    inputs, outputs, name = list(node.inputs), list(node.outputs), node.name
    node.inputs.clear()
    node.outputs.clear()
    there = gs.Variable(f"{name}.there", bool, outputs[0].shape)
    smallest = gs.Constant(f"{name}.smallest", np.array(SMALLEST, np.float32))
    return [
        gs.Node("GreaterOrEqual", f"{name}.there", {}, [*inputs, smallest], [there]),
        gs.Node("Not", name, {}, [there], outputs),
    ]
