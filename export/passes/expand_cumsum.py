"""Graph pass: running sums as masked sums.

TensorRT before 10.8 imports CumSum as a loop: many launches, and no CUDA graph. A product with a triangle would be one
launch, but in TF32 where that is allowed; multiplied and summed it stays float32.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError


def expand_cumsum(graph: gs.Graph) -> gs.Graph:
    """Replace every CumSum over the second axis of a matrix [B, N]."""
    nodes: list[gs.Node] = []
    triangles: dict[str, gs.Constant] = {}
    for node in list(graph.nodes):
        nodes.extend(_expand(node, triangles) if node.op == "CumSum" else [node])
    graph.nodes = nodes
    return graph


def _expand(node: gs.Node, triangles: dict[str, gs.Constant]) -> list[gs.Node]:
    x, axis = node.inputs
    (out,) = node.outputs
    name, strict = node.name, bool(node.attrs.get("exclusive", 0))
    if not isinstance(axis, gs.Constant) or int(axis.values) != 1 or node.attrs.get("reverse", 0) or x.shape is None:
        raise InternalError(f"no masked sum for the running sum {name}", code="no-lowering")
    node.inputs.clear()
    node.outputs.clear()
    B, N = x.shape
    made: list[gs.Node] = []
    if isinstance(N, int):
        label = f"const.triangle_{N}{'_strict' if strict else ''}"
        values = np.tri(N, N, -1 if strict else 0, dtype=np.float32)[None]
        triangle: gs.Tensor = triangles.setdefault(label, gs.Constant(label, values))
    else:
        made, triangle = _made_triangle(name, x, strict)
    one = gs.Constant(f"{name}.axis", np.array([1], np.int64))
    row = gs.Variable(f"{name}.row", np.float32, [B, 1, N])
    masked = gs.Variable(f"{name}.masked", np.float32, [B, N, N])
    two = gs.Constant(f"{name}.over", np.array([2], np.int64))
    return [
        *made,
        gs.Node("Unsqueeze", f"{name}.row", {}, [x, one], [row]),
        gs.Node("Mul", f"{name}.masked", {}, [row, triangle], [masked]),
        gs.Node("ReduceSum", name, {"keepdims": 0}, [masked, two], [out]),
    ]


def _made_triangle(name: str, x: gs.Tensor, strict: bool) -> tuple[list[gs.Node], gs.Tensor]:
    """Return nodes that make ones where a column is summed into a row, [N, N] for x [B, N], and their output."""
    names = ("shape", "number", "scalar", "places", "column", "before", "triangle")
    shape, number, scalar, places, column, before, triangle = (gs.Variable(f"{name}.{label}") for label in names)

    def ints(label: str, *values: int, scalar: bool = False) -> gs.Constant:
        return gs.Constant(f"{name}.{label}", np.array(values[0] if scalar else values, np.int64))

    made = [
        gs.Node("Shape", f"{name}.shape", {}, [x], [shape]),
        gs.Node("Slice", f"{name}.number", {}, [shape, ints("from", 1), ints("to", 2), ints("along", 0)], [number]),
        gs.Node("Squeeze", f"{name}.scalar", {}, [number, ints("only", 0)], [scalar]),
        gs.Node("Range", f"{name}.places", {},
                [ints("start", 0, scalar=True), scalar, ints("step", 1, scalar=True)], [places]),
        gs.Node("Unsqueeze", f"{name}.column", {}, [places, ints("last", 1)], [column]),
        gs.Node("Less" if strict else "LessOrEqual", f"{name}.before", {}, [places, column], [before]),
        gs.Node("Cast", f"{name}.triangle", {"to": 1}, [before], [triangle]),
    ]  # fmt: skip
    return made, triangle
