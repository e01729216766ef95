"""Graph pass: int64 tensors come in and go out as int32.

TensorRT 8.6 has no int64 inputs and outputs, and the numbers fit. What is told of shapes stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.runtime.router import SLOTS


def narrow_io(graph: gs.Graph) -> gs.Graph:
    """Make every int64 input and output but `slots` int32, with a cast inside."""
    for tensor in graph.inputs:
        if tensor.dtype == np.int64 and tensor.name != SLOTS:
            wide = gs.Variable(f"{tensor.name}.int64", np.int64, tensor.shape)
            for node in list(tensor.outputs):
                node.inputs = [wide if t is tensor else t for t in node.inputs]
            tensor.dtype = np.dtype(np.int32)
            graph.nodes.insert(0, gs.Node("Cast", wide.name, {"to": 7}, [tensor], [wide]))
    for i, tensor in enumerate(graph.outputs):
        if tensor.dtype == np.int64:
            narrow = gs.Variable(tensor.name, np.int32, tensor.shape)
            tensor.name = f"{narrow.name}.int64"
            graph.nodes.append(gs.Node("Cast", f"{narrow.name}.int32", {"to": 6}, [tensor], [narrow]))
            graph.outputs[i] = narrow
    return graph
