"""A thin layer over onnx-graphsurgeon: named nodes with shapes, weights by reference, small constants shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from edgeprune.errors import InternalError

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission

Shape = Sequence[int | str | None]  # None: unknown, as the rows of a flattened dynamic batch
BATCH = "batch"  # the name of the dynamic batch dimension
END = np.iinfo(np.int64).max  # where a slice of a dimension of unknown length stops


P = ParamSpec("P")
R = TypeVar("R")


def precise(part: Callable[Concatenate[Emission, P], R]) -> Callable[Concatenate[Emission, P], R]:
    """Keep what a part of the graph computes in float32 in every precision; see `GraphBuilder.precise`."""

    @wraps(part)
    def inside(e: Emission, *args: P.args, **kwargs: P.kwargs) -> R:
        with e.g.precise():
            return part(e, *args, **kwargs)

    return inside


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
        self.precise_nodes: set[str] = set()  # stay float32 in every precision
        self._precise = False
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

    @contextmanager
    def precise(self, on: bool = True) -> Iterator[None]:
        """Keep what nodes made inside compute in float32 in every precision, or do not inside such a part."""
        before, self._precise = self._precise, on
        try:
            yield
        finally:
            self._precise = before

    @property
    def is_precise(self) -> bool:
        """Whether nodes made now stay float32 in every precision."""
        return self._precise

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
        self._add(gs.Node(op, full, attrs, list(inputs), [out], domain=domain or None))
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
        self._add(gs.Node(op, full, attrs, list(inputs), outs, domain=domain or None))
        return outs

    def _add(self, node: gs.Node) -> None:
        self.nodes.append(node)
        if self._precise:
            self.precise_nodes.add(node.name)

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
        """Reshape; besides the batch, if it stays in front, at most one dimension may be dynamic (passed as -1)."""
        dims = [d if isinstance(d, int) else -1 for d in shape]
        if dims.count(-1) > 1 and shape[0] == x.shape[0]:
            dims[0] = 0  # as it is
        return self.node("Reshape", [x, self.ints(*dims)], shape=shape, name=name, dtype=dtype or x.dtype)

    def transpose(self, x: gs.Tensor, perm: Sequence[int], *, name: str = "transpose") -> gs.Variable:
        """Transpose."""
        return self.node("Transpose", [x], shape=[x.shape[p] for p in perm], name=name, perm=list(perm))

    def slice(
        self, x: gs.Tensor, axis: int, start: int, stop: int | gs.Tensor | None, *, step: int = 1, name: str = "slice"
    ) -> gs.Variable:
        """Return x[start:stop:step] along an axis; x itself when that is all of it.

        A stop of None means the end; a stop that is computed is an int64 tensor [1]. A negative start counts from the
        end and goes with a stop of None.
        """
        length = x.shape[axis]
        if isinstance(length, int) and stop is None:
            start, stop = start % length, length
        if start == 0 and step == 1 and not isinstance(stop, gs.Tensor) and stop in (None, length):
            return x
        shape = list(x.shape)
        shape[axis] = len(range(start, stop, step)) if isinstance(stop, int) else -start if start < 0 else None
        end = stop if isinstance(stop, gs.Tensor) else self.ints(END if stop is None else stop)
        inputs = [x, self.ints(start), end, self.ints(axis), *([] if step == 1 else [self.ints(step)])]
        return self.node("Slice", inputs, shape=shape, name=name, dtype=x.dtype)

    def length(self, x: gs.Tensor, axis: int, *, name: str) -> gs.Tensor:
        """Return the length of an axis as an int64 tensor [1]."""
        if isinstance(x.shape[axis], int):
            return self.ints(x.shape[axis])
        full = self.node("Shape", [x], shape=[len(x.shape)], name=f"{name}.shape", dtype=np.int64)
        return self.slice(full, 0, axis, axis + 1, name=name)

    def zeros(
        self, shape: Shape, unknown: Mapping[int, tuple[gs.Tensor, int]] | None = None, *, name: str = ""
    ) -> gs.Tensor:
        """Return float32 zeros; where the shape says None, as long as an axis (tensor, axis) of another tensor."""
        unknown = unknown or {}
        if None not in shape:
            label = "_".join(map(str, shape))
            return self.constant(f"const.zeros_{label}", np.zeros([d for d in shape if isinstance(d, int)], np.float32))
        dims = [
            self.ints(d) if isinstance(d, int) else self.length(*unknown[i], name=f"{name}.length")
            for i, d in enumerate(shape)
        ]
        whole = self.concat(dims, 0, name=f"{name}.shape")
        return self.node("ConstantOfShape", [whole], shape=shape, name=name)

    def places(self, count: int | None, like: gs.Tensor, axis: int, dtype: Any, *, name: str) -> gs.Tensor:
        """Return 0, 1, ... [1, N] for the N of an axis; a constant when it is known."""
        if isinstance(count, int):
            return self.constant(f"const.places_{np.dtype(dtype).name}_{count}", np.arange(count, dtype=dtype)[None])
        number = self.reshape(self.length(like, axis, name=f"{name}.number"), [], name=f"{name}.scalar")
        bounds = [self.constant("const.i64_scalar_0", np.array(0, np.int64)), number]
        step = self.constant("const.i64_scalar_1", np.array(1, np.int64))
        places = self.node("Range", [bounds[0], bounds[1], step], shape=[None], name=f"{name}.range", dtype=np.int64)
        places = self.reshape(places, [1, None], name=f"{name}.row")
        return places if dtype == np.int64 else self.cast(places, dtype, name=name)

    def cast(self, x: gs.Tensor, dtype: Any, *, name: str) -> gs.Variable:
        """Return x as another type."""
        to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [x], shape=x.shape, name=name, dtype=dtype, to=int(to))

    def gather_rows(self, x: gs.Tensor, rows: gs.Tensor, *, name: str) -> gs.Variable:
        """Return x [B, N, ...] at rows [B, K] int64, image by image: [B, K, ...]."""
        at = self.reshape(rows, [*rows.shape, 1], name=f"{name}.at")
        shape = [*rows.shape, *x.shape[2:]]
        return self.node("GatherND", [x, at], shape=shape, name=name, dtype=x.dtype, batch_dims=1)

    def concat(self, parts: Sequence[gs.Tensor], axis: int, *, name: str = "concat") -> gs.Tensor:
        """Concatenate along a static axis."""
        if len(parts) == 1:
            return parts[0]
        shape, along = list(parts[0].shape), [p.shape[axis] for p in parts]
        shape[axis] = None if None in along else sum(along)
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
