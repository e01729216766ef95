"""Stages whose number of tokens depends on the image: slots, counts, hidden keys, sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.gather import Chosen, topk_gather_node
from edgeprune.export.emit.outputs import record
from edgeprune.pruning.adaptive import NOT_KEPT, Slots, Threshold
from edgeprune.pruning.ats import CdfSampling
from edgeprune.pruning.base import Stage

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission

HIDDEN = -1e4  # logit of a key that is no token; its weight is exactly 0


def choose_slots(e: Emission, stage: Stage, selector: Slots, scores: gs.Tensor | None, tokens: gs.Tensor) -> Chosen:
    """Select as many tokens as an image keeps; the slots behind them are hidden from every later attention."""
    assert scores is not None
    g, K, N = e.g, selector.k, stage.counts.tokens_in
    if isinstance(selector, CdfSampling):
        scores = emit_sampling(e, selector, scores)
    elif e.valid is not None:
        scores = g.node("Where", [e.valid, scores, g.scalar(NOT_KEPT)], shape=scores.shape, name="there")
    if isinstance(selector, Threshold) and selector.threshold is None:
        threshold = float(g.weights[f"prune.{stage.index}.keep_threshold"])
    else:
        threshold = selector.limit(None)
    ranked = topk_gather_node(e, scores, tokens, K, selector.mode, threshold)
    count = ranked.count
    if isinstance(selector, Threshold):
        count = emit_count_rule(e, selector, count)
    if e.valid is not None:
        there = g.node("Cast", [e.valid], shape=[g.batch, N], name="there_int", dtype=np.int32, to=6)
        there = g.reduce("ReduceSum", there, 1, keepdims=False, name="tokens_there")
        count = g.node("Min", [count, there], shape=[g.batch], name="count_there", dtype=np.int32)
    slots = g.constant(f"const.slots_{K}", np.arange(K, dtype=np.int32)[None])
    column = g.reshape(count, [g.batch, 1], name="count_column")
    valid = g.node("Less", [slots, column], shape=[g.batch, K], name="valid", dtype=bool)
    chosen = Chosen(ranked.kept, stage, ranked.indices)
    record(e, chosen, count, valid)
    e.valid = valid
    bias = g.node("Where", [valid, g.scalar(0.0), g.scalar(HIDDEN)], shape=[g.batch, K], name="slot_bias")
    set_key_bias(e, bias)
    return chosen


def emit_count_rule(e: Emission, selector: Threshold, count: gs.Tensor) -> gs.Tensor:
    """Apply the least count and the mean over the batch to counts [B] int32."""
    g = e.g
    if selector.least:
        least = g.constant(f"const.i32.{selector.least}", np.array([selector.least], np.int32))
        count = g.node("Max", [count, least], shape=[g.batch], name="count_at_least", dtype=np.int32)
    if selector.batch_mean:
        total = g.reduce("ReduceSum", count, 0, keepdims=True, name="count_sum")
        zeros = g.node("Sub", [count, count], shape=[g.batch], name="zeros", dtype=np.int32)
        ones = g.node("Add", [zeros, g.constant("const.i32.1", np.array([1], np.int32))], shape=[g.batch],
                      name="ones", dtype=np.int32)  # fmt: skip
        images = g.reduce("ReduceSum", ones, 0, keepdims=True, name="images")
        mean = g.node("Div", [total, images], shape=[1], name="count_mean", dtype=np.int32)
        count = g.node("Add", [zeros, mean], shape=[g.batch], name="count_of_batch", dtype=np.int32)
    return count


def set_key_bias(e: Emission, bias: gs.Tensor) -> None:
    """Keep the bias of patch keys [B, N] as [B, 1, 1, P+N]."""
    g, P = e.g, e.plan.config.num_prefix_tokens
    if P:
        zeros = g.constant(f"const.zeros_row_{P}", np.zeros((1, P), np.float32))
        bias = g.concat([g.expand_batch(zeros, bias, name="prefix_bias"), bias], 1, name="row_bias")
    e.key_bias = g.reshape(bias, [g.batch, 1, 1, bias.shape[1]], name="key_bias")


def emit_sampling(e: Emission, selector: CdfSampling, scores: gs.Tensor) -> gs.Tensor:
    """Return scores [B, N]: sampled tokens ranked by place, the others `NOT_KEPT`; see `CdfSampling`."""
    g, (B, N), J = e.g, (e.g.batch, scores.shape[1]), selector.k

    def node(op: str, inputs: list[gs.Tensor], name: str, width: int = N, **attrs: Any) -> gs.Variable:
        dtype = bool if op in ("IsNaN", "Greater", "LessOrEqual", "And", "Or", "Not") else np.float32
        return g.node(op, inputs, shape=[B, width], name=name, dtype=dtype, **attrs)

    def least(x: gs.Tensor, name: str) -> gs.Variable:
        return g.reduce("ReduceMin", x, 1, keepdims=True, name=name)

    zero, far, tiny = g.scalar(0.0), g.scalar(10.0), g.scalar(1e-30)
    share = node("Where", [node("IsNaN", [scores], "missing"), zero, scores], "present")
    if e.valid is not None:
        share = node("Where", [e.valid, share, zero], "there")
    total = g.reduce("ReduceSum", share, 1, keepdims=True, name="total")
    share = node("Div", [share, node("Max", [total, tiny], "total_positive", 1)], "share")
    order, here = None, e.valid
    if selector.stretched:
        key = share if e.valid is None else node("Where", [e.valid, share, g.scalar(-1.0)], "key")
        outputs = [("values", np.float32, [B, N]), ("ranks", np.int64, [B, N])]
        sorted_key, order = g.multi_node(
            "TopK", [key, g.ints(N)], outputs, name="ascending", axis=1, largest=0, sorted=1
        )
        share = node("Max", [sorted_key, zero], "sorted_share")
        if here is not None:
            here = g.node("GreaterOrEqual", [sorted_key, zero], shape=[B, N], name="sorted_there", dtype=bool)
    sums = node("CumSum", [share, g.constant("const.axis_1", np.array(1, np.int64))], "sums")

    def away(x: gs.Tensor, name: str) -> gs.Tensor:
        return x if here is None else node("Where", [here, x, far], name)

    ramp = np.arange(J, dtype=np.float32)[None]
    usable = node("Greater", [total, zero], "has_mass", 1)
    if selector.stretched:
        lowest = least(away(sums, "sums_there"), "lowest")
        span = node("Sub", [g.slice(sums, 1, N - 1, N, name="highest"), lowest], "span", 1)
        sums = node("Sub", [sums, lowest], "shifted")
        sums = node("Div", [sums, node("Max", [span, tiny], "span_positive", 1)], "stretched")
        first = least(away(node("Where", [node("Greater", [sums, zero], "above"), sums, far], "positive"),
                           "positive_there"), "first")  # fmt: skip
        usable = node("And", [usable, g.node("Less", [first, far], shape=[B, 1], name="has_first", dtype=bool)],
                      "usable", 1)  # fmt: skip
        gap = node("Sub", [g.scalar(1.0), first], "gap", 1)
        steps = node("Mul", [g.constant(f"const.ramp_{J}", ramp / np.float32(max(J - 1, 1))), gap], "steps", J)
        points = node("Add", [steps, first], "points", J)
    else:
        points = g.expand_batch(
            g.constant(f"const.points_{J}", (2 * ramp + 1) / np.float32(2 * J)), scores, name="points"
        )
    sums = away(sums, "sums_of_tokens")
    distance = g.node(
        "Sub", [g.reshape(points, [B, J, 1], name="points_column"), g.reshape(sums, [B, 1, N], name="sums_row")],
        shape=[B, J, N], name="difference",
    )  # fmt: skip
    distance = g.node("Abs", [distance], shape=[B, J, N], name="distance")
    nearest = g.node("ArgMin", [distance], shape=[B, J], name="nearest", dtype=np.int64, axis=2, keepdims=0)
    if order is not None:
        nearest = g.gather_rows(order, nearest, name="nearest_positions")
    places = g.constant(f"const.places_{N}", np.arange(N, dtype=np.int64)[None, None])
    nearest = g.reshape(nearest, [B, J, 1], name="nearest_column")
    hits = g.node("Equal", [nearest, places], shape=[B, J, N], name="hits", dtype=bool)
    hits = g.node("Cast", [hits], shape=[B, J, N], name="hits_float", to=1)
    sampled = node("Greater", [g.reduce("ReduceMax", hits, 1, keepdims=False, name="hit"), g.scalar(0.5)], "sampled")
    sampled = node("Or", [sampled, node("Not", [usable], "useless", 1)], "kept")
    if e.valid is not None:
        sampled = node("And", [sampled, e.valid], "kept_there")
    ranks = g.constant(f"const.places_down_{N}", np.arange(N, 0, -1, dtype=np.float32)[None])
    return node("Where", [sampled, ranks, g.scalar(NOT_KEPT)], "by_place")
