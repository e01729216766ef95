"""Graph pass: int64 tensors come in as int32.

TensorRT 8.6 has no int64 inputs, and the stem's numbers fit. What is told of shapes stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.runtime.router import SLOTS


def narrow_inputs(graph: gs.Graph) -> gs.Graph:
    """Make every int64 input but `slots` int32, and cast it inside."""
    for tensor in graph.inputs:
        if tensor.dtype == np.int64 and tensor.name != SLOTS:
            wide = gs.Variable(f"{tensor.name}.int64", np.int64, tensor.shape)
            for node in list(tensor.outputs):
                node.inputs = [wide if t is tensor else t for t in node.inputs]
            tensor.dtype = np.dtype(np.int32)
            graph.nodes.insert(0, gs.Node("Cast", wide.name, {"to": 7}, [tensor], [wide]))
    return graph
