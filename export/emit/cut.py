"""A graph in two: the stem, which every image passes, and the rest, which is built for several numbers of tokens."""

from __future__ import annotations

from collections.abc import Container, Sequence

import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError


def cut_graph(graph: gs.Graph, at: Sequence[gs.Variable]) -> tuple[gs.Graph, gs.Graph]:
    """Return stem and rest of a graph: what the rest reads of the stem is an output of one and an input of the other.

    Args:
        graph: the nodes are taken over, in an order that can be executed; the first input is the images.
        at: tensors of the stem, and inputs that only the rest reads; whatever depends on one of them is the rest, and
            so is what depends on constants alone and is read there.
    """
    known = {tensor.name for tensor in at}
    stem_nodes, rest_nodes, fixed_nodes = [], [], []
    for node in graph.nodes:
        if all(isinstance(tensor, gs.Constant) for tensor in node.inputs):
            fixed_nodes.append(node)
        elif any(tensor.name in known for tensor in node.inputs):
            rest_nodes.append(node)
            known.update(tensor.name for tensor in node.outputs)
        else:
            stem_nodes.append(node)
    of_rest = [_feeds(node, known) for node in fixed_nodes]
    stem_nodes = [*(node for node, there in zip(fixed_nodes, of_rest, strict=True) if not there), *stem_nodes]
    rest_nodes = [*(node for node, there in zip(fixed_nodes, of_rest, strict=True) if there), *rest_nodes]
    made = {tensor.name: tensor for node in stem_nodes for tensor in node.outputs}
    made |= {tensor.name: tensor for tensor in graph.inputs}
    passed: dict[str, gs.Variable] = {}  # by name, the rest's own tensor in the place of the stem's
    for node in rest_nodes:
        for i, tensor in enumerate(node.inputs):
            if tensor.name in made:
                own = gs.Variable(tensor.name, tensor.dtype, tensor.shape)
                node.inputs[i] = passed.setdefault(tensor.name, own)
    own_inputs = [tensor for tensor in graph.inputs if tensor.name in passed]
    if any(tensor.name in made for tensor in graph.outputs):
        raise InternalError("an output of the graph lies in front of its cut", code="cut")
    handed = [made[name] for name in passed if made[name] not in own_inputs]
    batch = graph.inputs[0].shape[0]
    if any(tensor.shape[0] != batch for tensor in handed):  # the router tells images apart by the first axis
        raise InternalError("a tensor that crosses the cut does not start with the batch", code="cut")
    fields = {"opset": graph.opset, "producer_name": graph.producer_name, "producer_version": ""}
    stem_inputs = [tensor for tensor in graph.inputs if tensor not in own_inputs]
    stem = gs.Graph(nodes=stem_nodes, inputs=stem_inputs, outputs=handed, name="stem", **fields)
    rest = gs.Graph(nodes=rest_nodes, inputs=list(passed.values()), outputs=graph.outputs, name="rest", **fields)
    return stem, rest


def _feeds(node: gs.Node, known: Container[str]) -> bool:
    """Return whether all that reads a node also reads a tensor of the rest."""
    readers = [reader for out in node.outputs for reader in out.outputs]
    return all(any(tensor.name in known for tensor in reader.inputs) for reader in readers)
