"""Graph passes: what becomes of the `edgeprune` nodes. A target uses one of the three.

- `inline_bodies`: the portable standard operators, for any batch.
- `flatten_selection`: TopK and one Gather over all rows of the batch, for a fixed batch on ONNX Runtime's CPU provider.
- `attach_bodies`: the nodes stay; a runtime with the plugin uses it, any other runs the attached function.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import BuildError
from edgeprune.export.ops import functions, gather_tokens, topk_gather


def inline_bodies(graph: gs.Graph) -> gs.Graph:
    """Replace every `edgeprune` node by its body."""
    nodes: list[gs.Node] = []
    for node in list(graph.nodes):
        nodes.extend(functions.inline(node, graph.opset) if functions.is_edgeprune(node) else [node])
    graph.nodes = nodes
    return graph


def attach_bodies(graph: gs.Graph) -> gs.Graph:
    """Leave the nodes; check that one function per op is enough, which the writer adds.

    Raises:
        BuildError: `no-lowering` when it is not.
    """
    bodies: dict[str, object] = {}
    for node in filter(functions.is_edgeprune, graph.nodes):
        body = functions.function_of(node, graph.opset)
        if bodies.setdefault(node.op, body) is not body:
            raise BuildError(
                f"the graph holds two variants of {node.op}, and a function has one body",
                code="no-lowering",
                expected="one order and one mode of the op in a graph with plugin nodes",
                hint="use --selection native",
            )
    return graph


def flatten_selection(graph: gs.Graph) -> gs.Graph:
    """Replace every `edgeprune` node by TopK and a Gather of whole rows; variants of the op get their body.

    The rows of a batch are addressed in the flattened [B*T, D] tensor, so one Gather serves any fixed batch.
    """
    rows_of: dict[str, gs.Tensor] = {}
    nodes: list[gs.Node] = []
    for node in list(graph.nodes):
        if not functions.is_edgeprune(node):
            nodes.append(node)
        elif node.op == topk_gather.NAME and node.attrs["mode"] == 0 and node.attrs["order"] == 0:
            nodes.extend(_flat_topk_gather(node, rows_of))
        elif node.op == gather_tokens.NAME and node.inputs[1].name in rows_of:
            nodes.extend(_flat_gather_tokens(node, rows_of))
        else:
            nodes.extend(functions.inline(node, graph.opset))
    graph.nodes = nodes
    return graph


def _flat_topk_gather(node: gs.Node, rows_of: dict[str, gs.Tensor]) -> list[gs.Node]:
    scores, tokens = node.inputs
    kept, indices, count = node.outputs
    B, T, _ = tokens.shape
    P, K, name = node.attrs["num_prefix_tokens"], node.attrs["k"], node.name
    node.inputs.clear()
    node.outputs.clear()

    missing = gs.Variable(f"{name}.missing", bool, scores.shape)
    ranked = gs.Variable(f"{name}.ranked", np.float32, scores.shape)
    last = gs.Constant(f"{name}.last", np.array(topk_gather.NAN_SCORE, np.float32))
    values = gs.Variable(f"{name}.values", np.float32, [B, K])
    ranks = gs.Variable(f"{name}.ranks", np.int64, [B, K])
    patch_rows = gs.Variable(f"{name}.patch_rows", np.int64, [B, K])
    rows = gs.Variable(f"{name}.rows", np.int64, [B, P + K])
    starts = np.arange(B, dtype=np.int64)[:, None] * T
    rows_of[indices.name] = rows
    made = [
        gs.Node("IsNaN", f"{name}.missing", {}, [scores], [missing]),
        gs.Node("Where", f"{name}.ranked", {}, [missing, last, scores], [ranked]),
        gs.Node("TopK", f"{name}.topk", {"axis": 1, "largest": 1, "sorted": 1},
                [ranked, gs.Constant(f"{name}.k", np.array([K], np.int64))], [values, ranks]),
        gs.Node("Cast", f"{name}.indices", {"to": 6}, [ranks], [indices]),
        gs.Node("Add", f"{name}.patch_rows", {}, [ranks, gs.Constant(f"{name}.offsets", starts + P)], [patch_rows]),
    ]  # fmt: skip
    if P:
        prefix = gs.Constant(f"{name}.prefix_rows", starts + np.arange(P, dtype=np.int64)[None])
        made.append(gs.Node("Concat", f"{name}.rows", {"axis": 1}, [prefix, patch_rows], [rows]))
    else:
        rows_of[indices.name] = rows = patch_rows
    counts = gs.Constant(f"{name}.counts", np.full(B, K, np.int32))
    made.append(gs.Node("Identity", f"{name}.count", {}, [counts], [count]))
    return [*made, *_gather_rows(name, tokens, rows, kept)]


def _flat_gather_tokens(node: gs.Node, rows_of: dict[str, gs.Tensor]) -> list[gs.Node]:
    tokens, indices = node.inputs
    (kept,) = node.outputs
    node.inputs.clear()
    node.outputs.clear()
    return _gather_rows(node.name, tokens, rows_of[indices.name], kept)


def _gather_rows(name: str, tokens: gs.Tensor, rows: gs.Tensor, kept: gs.Tensor) -> list[gs.Node]:
    B, T, D = tokens.shape
    flat = gs.Variable(f"{name}.flat", tokens.dtype, [B * T, D])
    shape = gs.Constant(f"{name}.flat_shape", np.array([B * T, D], np.int64))
    return [
        gs.Node("Reshape", f"{name}.flatten", {}, [tokens, shape], [flat]),
        gs.Node("Gather", f"{name}.gather", {"axis": 0}, [flat, rows], [kept]),
    ]
