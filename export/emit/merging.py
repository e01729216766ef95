"""Merging in the graph: tokens are averaged into those most like them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.builder import precise
from edgeprune.export.emit.outputs import record_positions
from edgeprune.export.emit.slots import set_key_bias
from edgeprune.pruning.base import Stage
from edgeprune.pruning.tome import Bipartite

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


@precise
def emit_merge(e: Emission, stage: Stage, metric: gs.Tensor, tokens: gs.Tensor) -> gs.Tensor:
    """Average r tokens of tokens [B, P+N, D] into others and return [B, P+N-r, D]; sizes and key bias follow.

    Nothing is scattered: a one-hot matrix [B, destinations, r] adds the moving tokens up.
    """
    assert isinstance(stage.selector, Bipartite)
    g, P, r, (B, N) = e.g, e.plan.config.num_prefix_tokens, stage.selector.r, metric.shape[:2]
    source, destination = stage.selector.starts
    D, S, R = tokens.shape[2], len(range(source, N, 2)), len(range(destination, N, 2))

    def halves(x: gs.Tensor, offset: int, name: str) -> tuple[gs.Variable, gs.Variable]:
        end = x.shape[1]
        return (
            g.slice(x, 1, offset + source, end, step=2, name=f"{name}.sources"),
            g.slice(x, 1, offset + destination, end, step=2, name=f"{name}.destinations"),
        )

    a, b = halves(metric, 0, "metric")
    alike = g.node("MatMul", [a, g.transpose(b, [0, 2, 1], name="metric.turned")], shape=[B, S, R], name="alike")
    best = g.reduce("ReduceMax", alike, 2, keepdims=False, name="best")
    goal = g.node("ArgMax", [alike], shape=[B, S], name="goal", dtype=np.int64, axis=2, keepdims=0)
    outputs = [("values", np.float32, [B, S]), ("ranks", np.int64, [B, S])]
    _, order = g.multi_node("TopK", [best, g.ints(S)], outputs, name="pairs", axis=1, largest=1, sorted=1)
    merged = g.slice(order, 1, 0, r, name="merged")
    goal = g.gather_rows(goal, merged, name="merged_goal")
    x_a, x_b = halves(tokens, P, "tokens")
    size_a = size_b = None
    moving, weight = x_a, None
    if e.size is not None:
        size_a, size_b = halves(g.reshape(e.size, [B, N, 1], name="size_column"), 0, "size")
        moving = g.node("Mul", [x_a, size_a], shape=x_a.shape, name="weighted.sources")
        x_b = g.node("Mul", [x_b, size_b], shape=x_b.shape, name="weighted.destinations")
        weight = g.gather_rows(size_a, merged, name="merged_size")
    moving = g.gather_rows(moving, merged, name="moving")
    places = g.constant(f"const.places_column_{R}", np.arange(R, dtype=np.int64)[None, :, None])
    goal = g.reshape(goal, [B, 1, r], name="goal_row")
    hits = g.node("Equal", [places, goal], shape=[B, R, r], name="hits", dtype=bool)
    hits = g.node("Cast", [hits], shape=[B, R, r], name="one_hot", to=1)
    total = g.node("Add", [x_b, g.node("MatMul", [hits, moving], shape=[B, R, D], name="arrived")],
                   shape=[B, R, D], name="total")  # fmt: skip
    if weight is None:
        gained = g.reduce("ReduceSum", hits, 2, keepdims=True, name="gained")
    else:
        gained = g.node("MatMul", [hits, weight], shape=[B, R, 1], name="gained")
    size = g.node("Add", [g.scalar(1.0) if size_b is None else size_b, gained], shape=[B, R, 1], name="size")
    mean = g.node("Div", [total, size], shape=[B, R, D], name="mean")
    parts, sizes = [g.slice(tokens, 1, 0, P, name="prefix")] if P else [], []
    alone = None
    if r < S:
        outputs = [("values", np.int64, [B, S - r]), ("ranks", np.int64, [B, S - r])]
        rest = g.slice(order, 1, r, S, name="rest")
        alone, _ = g.multi_node("TopK", [rest, g.ints(S - r)], outputs, name="alone", axis=1, largest=0, sorted=1)
        parts.append(g.gather_rows(x_a, alone, name="alone_rows"))
        if size_a is None:
            ones = g.constant(f"const.ones_column_{S - r}", np.ones((1, S - r, 1), np.float32))
            sizes.append(g.expand_batch(ones, size, name="alone_size"))
        else:
            sizes.append(g.gather_rows(size_a, alone, name="alone_size"))
    e.size = g.reshape(g.concat([*sizes, size], 1, name="sizes"), [B, N - r], name="size_row")
    if stage.selector.weigh_keys:
        set_key_bias(e, g.node("Log", [e.size], shape=[B, N - r], name="log_size"))
    if e.plan.token_outputs:
        stay = [] if alone is None else [_place(e, alone, source)]
        others = np.arange(destination, N, 2, dtype=np.int64)[None]
        stay.append(g.expand_batch(g.unnamed_constant("destinations", others), tokens, name="destinations"))
        record_positions(e, g.concat(stay, 1, name="stay"))
    e.counts.append(None)
    return g.concat([*parts, mean], 1, name="merged_tokens")


def _place(e: Emission, half: gs.Tensor, start: int) -> gs.Tensor:
    """Return places in the sequence [B, K] int64 of places in every second token from `start` on."""
    g = e.g
    doubled = g.node("Mul", [half, g.constant("const.i64_2", np.array([2], np.int64))], shape=half.shape,
                     name="doubled", dtype=np.int64)  # fmt: skip
    first = g.constant(f"const.i64_start_{start}", np.array([start], np.int64))
    return g.node("Add", [doubled, first], shape=half.shape, name="places", dtype=np.int64)
