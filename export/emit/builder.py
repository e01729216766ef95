"""A thin layer over onnx-graphsurgeon: named nodes with shapes, weights by reference, small constants shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError

Shape = Sequence[int | str | None]  # None: unknown, as the rows of a flattened dynamic batch
BATCH = "batch"  # the name of the dynamic batch dimension


class GraphBuilder:
    """Collects nodes; names are stable and follow the model (`blocks.3.attn.q`).

    Args:
        name: graph name.
        opset: version of the standard operators.
        weights: state_dict as arrays that share memory with the model; nothing is copied here.
        batch: fixed batch, or None for a dynamic one.
    """

    def __init__(self, name: str, opset: int, weights: Mapping[str, np.ndarray], batch: int | None) -> None:
        self.name = name
        self.opset = opset
        self.weights = weights
        self.batch: int | str = BATCH if batch is None else batch
        self.nodes: list[gs.Node] = []
        self._prefix: list[str] = []
        self._taken: set[str] = set()
        self._constants: dict[str, gs.Constant] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of all nodes made inside."""
        self._prefix.append(name)
        try:
            yield
        finally:
            self._prefix.pop()

    def qualified(self, name: str) -> str:
        """Return the full name, made unique with a counter when it is taken."""
        full = ".".join([*self._prefix, name])
        unique, n = full, 1
        while unique in self._taken:
            n += 1
            unique = f"{full}_{n}"
        self._taken.add(unique)
        return unique

    def node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        *,
        shape: Shape | None,
        name: str | None = None,
        dtype: Any = np.float32,
        domain: str = "",
        **attrs: Any,
    ) -> gs.Variable:
        """Add a node with one output and return the output."""
        full = self.qualified(name or op.lower())
        out = gs.Variable(full, dtype=dtype, shape=None if shape is None else list(shape))
        self.nodes.append(gs.Node(op, full, attrs, list(inputs), [out], domain=domain or None))
        return out

    def multi_node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: Sequence[tuple[str, Any, Shape]],
        *,
        name: str,
        domain: str = "",
        **attrs: Any,
    ) -> list[gs.Variable]:
        """Add a node with several outputs, each (suffix, dtype, shape), and return them."""
        full = self.qualified(name)
        outs = [gs.Variable(f"{full}.{suffix}", dtype=dtype, shape=list(shape)) for suffix, dtype, shape in outputs]
        self.nodes.append(gs.Node(op, full, attrs, list(inputs), outs, domain=domain or None))
        return outs

    def constant(self, name: str, values: np.ndarray) -> gs.Constant:
        """Return the constant of that name, made once; equal names mean equal values."""
        if name not in self._constants:
            if name in self._taken:
                raise InternalError(f"constant and node share the name {name}", code="graph-name")
            self._taken.add(name)
            self._constants[name] = gs.Constant(name, values)
        return self._constants[name]

    def unnamed_constant(self, name: str, values: np.ndarray) -> gs.Constant:
        """Return a constant that nobody shares, named in the current scope."""
        return gs.Constant(self.qualified(f"const.{name}"), values)

    def ints(self, *values: int) -> gs.Constant:
        """Return a 1-D int64 constant, for shapes, axes and bounds."""
        return self.constant("const.i64." + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float) -> gs.Constant:
        """Return a float32 scalar constant."""
        return self.constant(f"const.f32.{value!r}", np.array(value, np.float32))

    def reshape(self, x: gs.Tensor, shape: Shape, *, name: str = "reshape", dtype: Any = None) -> gs.Variable:
        """Reshape; at most one dimension may be dynamic (a name or a multiple of it, passed as -1)."""
        dims = [d if isinstance(d, int) else -1 for d in shape]
        return self.node("Reshape", [x, self.ints(*dims)], shape=shape, name=name, dtype=dtype or x.dtype)

    def transpose(self, x: gs.Tensor, perm: Sequence[int], *, name: str = "transpose") -> gs.Variable:
        """Transpose."""
        return self.node("Transpose", [x], shape=[x.shape[p] for p in perm], name=name, perm=list(perm))

    def slice(
        self, x: gs.Tensor, axis: int, start: int, stop: int, *, step: int = 1, name: str = "slice"
    ) -> gs.Variable:
        """Return x[start:stop:step] along a static axis; x itself when that is all of it."""
        if start == 0 and stop == x.shape[axis] and step == 1:
            return x
        shape = list(x.shape)
        shape[axis] = len(range(start, stop, step))
        inputs = [x, self.ints(start), self.ints(stop), self.ints(axis), *([] if step == 1 else [self.ints(step)])]
        return self.node("Slice", inputs, shape=shape, name=name, dtype=x.dtype)

    def gather_rows(self, x: gs.Tensor, rows: gs.Tensor, *, name: str) -> gs.Variable:
        """Return x [B, N, ...] at rows [B, K] int64, image by image: [B, K, ...]."""
        at = self.reshape(rows, [*rows.shape, 1], name=f"{name}.at")
        shape = [*rows.shape, *x.shape[2:]]
        return self.node("GatherND", [x, at], shape=shape, name=name, dtype=x.dtype, batch_dims=1)

    def concat(self, parts: Sequence[gs.Tensor], axis: int, *, name: str = "concat") -> gs.Tensor:
        """Concatenate along a static axis."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return self.node("Concat", parts, shape=shape, name=name, dtype=parts[0].dtype, axis=axis)

    def reduce(self, op: str, x: gs.Tensor, axis: int, *, keepdims: bool, name: str) -> gs.Variable:
        """A Reduce operator over one axis, in the form the opset wants."""
        shape = [d for i, d in enumerate(x.shape) if i != axis]
        if keepdims:
            shape.insert(axis, 1)
        if op == "ReduceSum" or self.opset >= 18:
            return self.node(op, [x, self.ints(axis)], shape=shape, name=name, dtype=x.dtype, keepdims=int(keepdims))
        return self.node(op, [x], shape=shape, name=name, dtype=x.dtype, axes=[axis], keepdims=int(keepdims))

    def expand_batch(self, x: gs.Tensor, like: gs.Tensor, *, name: str) -> gs.Tensor:
        """Return x [1, ...] repeated over the batch of `like` [B, ...]."""
        shape = [self.batch, *x.shape[1:]]
        if self.batch == 1:
            return x
        if isinstance(self.batch, int):
            dims: gs.Tensor = self.ints(self.batch, *x.shape[1:])
        else:
            # the first dimension of `like`, then the static rest
            full = self.node("Shape", [like], shape=[len(like.shape)], name=f"{name}.shape", dtype=np.int64)
            first = self.slice(full, 0, 0, 1, name=f"{name}.batch")
            dims = self.concat([first, self.ints(*x.shape[1:])], 0, name=f"{name}.dims")
        return self.node("Expand", [x, dims], shape=shape, name=name, dtype=x.dtype)

    def graph(self, inputs: Sequence[gs.Variable], outputs: Sequence[gs.Variable]) -> gs.Graph:
        """Return the finished graph."""
        return gs.Graph(
            nodes=self.nodes, inputs=list(inputs), outputs=list(outputs), name=self.name, opset=self.opset,
            producer_name="edgeprune", producer_version="",
        )  # fmt: skip
