"""Graph pass: the graph of one image becomes that of a batch whose images keep different numbers of tokens.

Rows of all images lie one behind the other wherever a node works row by row (projections, norms, activations, residual
sums): one product for the batch and no padding. Everything else (attention, scores, selection) is there once per image.
Between both, rows are split by the images' lengths and joined again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.runtime.router import KEPT, NO_PATCH

ROW_BY_ROW = frozenset({"Gemm", "LayerNormalization", "Gelu", "Add", "Relu"})


def pack_rows(graph: gs.Graph, batch: int, slots: Sequence[int]) -> gs.Graph:
    """Return the graph for `batch` images; exact.

    Args:
        graph: for one image [1, C, H, W], its residual stream as rows [T, D]; sorted.
        batch: images, at least 2.
        slots: per stage, how wide `kept_indices_<s>` become; -1 fills them up.
    """
    packer = _Packer(graph, batch)
    for node in graph.nodes:
        packer.add(node)
    outputs = [packer.output(tensor, slots) for tensor in graph.outputs]
    return gs.Graph(
        nodes=packer.nodes, inputs=[packer.images], outputs=outputs, name=graph.name, opset=graph.opset,
        producer_name=graph.producer_name, producer_version="",
    )  # fmt: skip


@dataclass
class _Rows:
    """A tensor of the batch, as far as it was needed: `joined` [R, D] with `sizes` [B] int64, and one per image."""

    joined: gs.Variable | None = None
    sizes: gs.Tensor | None = None
    single: list[gs.Variable] | None = None


class _Packer:
    def __init__(self, graph: gs.Graph, batch: int) -> None:
        self.batch = batch
        self.nodes: list[gs.Node] = []
        (images,) = graph.inputs
        shape = [batch, *images.shape[1:]]
        self.images = gs.Variable(images.name, images.dtype, shape)
        one_by_one = [gs.Variable(f"{images.name}.image{i}", images.dtype, images.shape) for i in range(batch)]
        self._node("Split", f"{images.name}.split", [self.images, self._ints("ones", [1] * batch)], one_by_one, axis=0)
        self._rows = {images.name: _Rows(single=one_by_one)}

    def add(self, node: gs.Node) -> None:
        """Add a node of the single image's graph: once where it works row by row, else once per image."""
        if _works_row_by_row(node):
            inputs = [self._joined(x) if isinstance(x, gs.Variable) else x for x in node.inputs]
            (out,) = node.outputs
            made = gs.Variable(out.name, out.dtype, [None, out.shape[1]])
            self._node(node.op, node.name, inputs, [made], domain=node.domain, **node.attrs)
            first = next(x for x in node.inputs if isinstance(x, gs.Variable))
            self._rows[out.name] = _Rows(made, self._rows[first.name].sizes)
            return
        outputs: dict[str, list[gs.Variable]] = {out.name: [] for out in node.outputs}
        for i in range(self.batch):
            inputs = [self._single(x, i) for x in node.inputs]
            made = [gs.Variable(f"{out.name}.image{i}", out.dtype, out.shape) for out in node.outputs]
            self._node(node.op, f"{node.name}.image{i}", inputs, made, domain=node.domain, **node.attrs)
            for out, tensor in zip(node.outputs, made, strict=True):
                outputs[out.name].append(tensor)
        self._rows |= {name: _Rows(single=tensors) for name, tensors in outputs.items()}

    def output(self, tensor: gs.Variable, slots: Sequence[int]) -> gs.Variable:
        """Return an output of the graph for the whole batch."""
        name = tensor.name
        joined = self._rows[name].joined
        if joined is not None:
            joined.shape = [self.batch, *tensor.shape[1:]]
            return joined
        parts = [self._single(tensor, i) for i in range(self.batch)]
        shape = list(tensor.shape)
        if name.startswith(KEPT):
            shape[1] = slots[int(name.removeprefix(KEPT))]
            parts = [self._padded(part, shape[1]) for part in parts]
        out = gs.Variable(name, tensor.dtype, [self.batch, *shape[1:]])
        self._node("Concat", f"{name}.join", parts, [out], axis=0)
        return out

    def _joined(self, tensor: gs.Variable) -> gs.Variable:
        rows = self._rows[tensor.name]
        if rows.joined is None:
            assert rows.single is not None
            rows.joined = gs.Variable(tensor.name, tensor.dtype, [None, tensor.shape[1]])
            self._node("Concat", f"{tensor.name}.join", rows.single, [rows.joined], axis=0)
            rows.sizes = self._sizes(rows.single)
        return rows.joined

    def _single(self, tensor: gs.Tensor, image: int) -> gs.Tensor:
        if tensor.name not in self._rows:  # a constant, or no input at all
            return tensor
        rows = self._rows[tensor.name]
        if rows.single is None:
            assert rows.joined is not None and rows.sizes is not None
            names = (f"{tensor.name}.image{i}" for i in range(self.batch))
            rows.single = [gs.Variable(name, tensor.dtype, tensor.shape) for name in names]
            self._node("Split", f"{tensor.name}.split", [rows.joined, rows.sizes], rows.single, axis=0)
        return rows.single[image]

    def _sizes(self, single: Sequence[gs.Variable]) -> gs.Tensor:
        """Return how many rows each image has, [B] int64."""
        first = single[0]
        if isinstance(first.shape[0], int):
            return self._ints(f"rows_{first.shape[0]}", [first.shape[0]] * self.batch)
        lengths = []
        for tensor in single:
            length = gs.Variable(f"{tensor.name}.length", np.int64, [1])
            self._node("Shape", f"{tensor.name}.length", [tensor], [length], start=0, end=1)
            lengths.append(length)
        sizes = gs.Variable(f"{first.name}.sizes", np.int64, [self.batch])
        self._node("Concat", f"{first.name}.sizes", lengths, [sizes], axis=0)
        return sizes

    def _padded(self, tensor: gs.Tensor, width: int) -> gs.Variable:
        """Return kept tokens [1, K] filled up to [1, width]."""
        name = tensor.name
        out, length, missing, pads = (
            gs.Variable(f"{name}.{label}", dtype, shape)
            for label, dtype, shape in (
                ("padded", tensor.dtype, [1, width]), ("width", np.int64, [1]),
                ("missing", np.int64, [1]), ("pads", np.int64, [4]),
            )
        )  # fmt: skip
        nothing = gs.Constant(f"{name}.nothing", np.array(NO_PATCH, tensor.dtype))
        self._node("Shape", f"{name}.width", [tensor], [length], start=1, end=2)
        self._node("Sub", f"{name}.missing", [self._ints(f"width_{width}", [width]), length], [missing])
        self._node("Concat", f"{name}.pads", [self._ints("zeros", [0, 0, 0]), missing], [pads], axis=0)
        self._node("Pad", f"{name}.pad", [tensor, pads, nothing], [out])
        return out

    def _ints(self, label: str, values: Sequence[int]) -> gs.Constant:
        return gs.Constant(f"const.packed.{label}", np.array(values, np.int64))

    def _node(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], *,
        domain: str | None = None, **attrs: object,
    ) -> None:  # fmt: skip
        self.nodes.append(gs.Node(op, name, attrs, list(inputs), list(outputs), domain=domain))


def _works_row_by_row(node: gs.Node) -> bool:
    """Tell whether a node treats every row [., D] of its first input, and of others that are variable, alike."""
    if node.op not in ROW_BY_ROW:
        return False
    shapes = [x.shape for x in node.inputs if isinstance(x, gs.Variable)]
    rows = all(len(shape) == 2 and isinstance(shape[1], int) for shape in shapes)
    shared = all(len(x.shape) <= 2 for x in node.inputs if isinstance(x, gs.Constant))
    return rows and shared and all(shape == shapes[0] for shape in shapes)
