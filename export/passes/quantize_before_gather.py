"""Graph pass: plugins that take tokens out of a sequence move 8-bit numbers where those are what is read of them.

gather -> QuantizeLinear becomes QuantizeLinear -> gather, which gives the same numbers: a plugin copies bytes. It moves
half as many then, and TensorRT finds QuantizeLinear, plugin, DequantizeLinear, the only order in which it runs a plugin
on quantized tensors (github.com/NVIDIA/TensorRT/issues/3055). The residual stream is not read by QuantizeLinear and
moves as it is. Gathers of standard operators stay in front: the parser's tables name no 8-bit types for them.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from edgeprune.export.ops import DOMAIN, gather_tokens, topk_gather

TOKENS = {gather_tokens.NAME: 0, topk_gather.NAME: 1}  # the input whose rows become the first output


def quantize_before_gather(graph: gs.Graph) -> gs.Graph:
    """Return the graph with every QuantizeLinear that alone reads gathered tokens in front of the gather."""
    nodes: list[gs.Node] = []
    moved: set[int] = set()
    for node in list(graph.nodes):
        if id(node) in moved:
            continue
        behind = _readers(node) if node.domain == DOMAIN and node.op in TOKENS else []
        if behind and node.outputs[0] not in graph.outputs and _are_alike(behind):
            nodes += _swap(node, behind)
            moved |= {id(reader) for reader in behind}
        nodes.append(node)
    graph.nodes = nodes
    return graph


def _readers(node: gs.Node) -> list[gs.Node]:
    return list(node.outputs[0].outputs)


def _are_alike(nodes: list[gs.Node]) -> bool:
    """Return whether all are QuantizeLinear of one scale for the whole tensor."""
    alike = {(node.op, *(tensor.name for tensor in node.inputs[1:])) for node in nodes}
    return len(alike) == 1 and nodes[0].op == "QuantizeLinear" and not nodes[0].inputs[1].shape


def _swap(gather: gs.Node, behind: list[gs.Node]) -> list[gs.Node]:
    """Let a gather read quantized tokens, and who read them behind it, the gather; return the nodes this takes."""
    place, first = TOKENS[gather.op], behind[0]
    tokens, kept = gather.inputs[place], gather.outputs[0]
    made = []
    found = [node for node in tokens.outputs if node is not gather and _are_alike([node, first])]
    if found:
        (quantized,) = found[0].outputs
    else:
        name = f"{gather.name}.tokens_quantized"
        quantized = gs.Variable(name, first.outputs[0].dtype, tokens.shape)
        made.append(gs.Node("QuantizeLinear", name, {}, [tokens, *first.inputs[1:]], [quantized]))
    gather.inputs[place] = quantized
    kept.dtype = quantized.dtype
    for node in behind:
        (old,) = node.outputs
        for reader in list(old.outputs):
            reader.inputs = [kept if tensor is old else tensor for tensor in reader.inputs]
        node.inputs.clear()
    return made
