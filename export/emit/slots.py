"""Stages whose number of tokens depends on the image: slots, counts, hidden keys, sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.gather import Chosen, gather_tokens_node, keep_ranked, rank_all, topk_gather_node
from edgeprune.export.emit.outputs import record
from edgeprune.export.plan import Counts
from edgeprune.pruning.adaptive import NOT_KEPT, Slots, Threshold
from edgeprune.pruning.ats import CdfSampling
from edgeprune.pruning.base import Stage

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission

HIDDEN = -1e4  # logit of a key that is no token; its weight is exactly 0


def choose_slots(e: Emission, stage: Stage, selector: Slots, scores: gs.Tensor | None, tokens: gs.Tensor) -> Chosen:
    """Select as many tokens as an image keeps; slots behind them, if there are, are hidden from every later attention.

    Where the graph is cut, the stem ranks all tokens and counts, and the rest takes the first ones.
    """
    assert scores is not None
    g, K = e.g, selector.k
    if isinstance(selector, CdfSampling):
        scores = emit_sampling(e, selector, scores)
    elif e.valid is not None:
        scores = g.node("Where", [e.valid, scores, g.scalar(NOT_KEPT)], shape=scores.shape, name="there")
    cuts = e.plan.split and not e.cut
    threshold = limit_of(e, stage, selector)
    if e.symbolic:
        values, ranks = rank_all(e, scores)
        count = emit_count(e, selector, scores, values, threshold)
    else:
        ranked = topk_gather_node(e, scores, tokens, stage.counts.tokens_in if cuts else K, selector.mode, threshold)
        ranks, count = ranked.indices, ranked.count
    if isinstance(selector, Threshold):
        count = emit_count_rule(e, selector, count)
    if e.valid is not None:
        there = g.cast(e.valid, np.int32, name="there_int")
        there = g.reduce("ReduceSum", there, 1, keepdims=False, name="tokens_there")
        count = g.node("Min", [count, there], shape=[g.batch], name="count_there", dtype=np.int32)
    if cuts:
        ranks.name, count.name = "token_ranks", "token_count"
        e.cut = [ranks, count]
    if e.symbolic:
        kept = computed_count(e, stage, count) if e.slots is None else given_count(e, stage)
        chosen = keep_ranked(e, stage, ranks, kept, tokens)
    elif cuts:
        indices = g.slice(ranks, 1, 0, K, name="indices")
        chosen = Chosen(gather_tokens_node(e, tokens, indices), stage, indices)
    else:
        chosen = Chosen(ranked.kept, stage, ranks)
    e.valid = e.key_bias = None
    assert chosen.indices is not None
    if e.plan.counts is not Counts.COMPUTED and not selector.fill:
        slots = g.places(chosen.indices.shape[1], chosen.indices, 1, np.int32, name="slots")
        column = g.reshape(count, [g.batch, 1], name="count_column")
        e.valid = g.node("Less", [slots, column], shape=[g.batch, slots.shape[1]], name="valid", dtype=bool)
        bias = g.node("Where", [e.valid, g.scalar(0.0), g.scalar(HIDDEN)], shape=e.valid.shape, name="slot_bias")
        set_key_bias(e, bias)
    record(e, chosen, count, e.valid)
    return chosen


def limit_of(e: Emission, stage: Stage, selector: Slots) -> float:
    """Return the threshold of a selector; a learned one is read from the weights."""
    if isinstance(selector, Threshold) and selector.threshold is None:
        return float(e.g.weights[f"prune.{stage.index}.keep_threshold"])
    return selector.limit(None)


def emit_count(e: Emission, selector: Slots, scores: gs.Tensor, ranked: gs.Tensor, threshold: float) -> gs.Tensor:
    """Return how many tokens stay, [B] int32, of scores [B, N] and the same sorted: what `TopKGather` counts."""
    g = e.g
    limit = g.constant(f"const.f32.limit_{threshold!r}", np.array(threshold, np.float32))
    if selector.mode == 1:
        above = g.node("Greater", [scores, limit], shape=scores.shape, name="above", dtype=bool)
        return g.reduce("ReduceSum", g.cast(above, np.int32, name="above_int"), 1, keepdims=False, name="count_above")
    mass = g.node("Max", [ranked, g.scalar(0.0)], shape=ranked.shape, name="mass")
    axis = g.constant("const.axis_1", np.array(1, np.int64))
    before = g.node("CumSum", [mass, axis], shape=mass.shape, name="mass_before", exclusive=1)
    within = g.node("Less", [before, limit], shape=mass.shape, name="within", dtype=bool)
    count = g.reduce("ReduceSum", g.cast(within, np.int32, name="within_int"), 1, keepdims=False, name="count_within")
    one = g.constant("const.i32.1", np.array([1], np.int32))
    return g.node("Max", [count, one], shape=count.shape, name="count_positive", dtype=np.int32)


def given_count(e: Emission, stage: Stage) -> gs.Tensor:
    """Return the number of tokens a stage is told to keep, [1] int64."""
    assert e.slots is not None
    at = e.plan.stages.index(stage)
    return e.g.slice(e.slots, 0, at, at + 1, name="given")


def computed_count(e: Emission, stage: Stage, count: gs.Tensor) -> gs.Tensor:
    """Return the number of tokens the only image of the batch keeps, [1] int64: its count, but no more than slots."""
    most = e.g.constant(f"const.i32.{stage.counts.kept}", np.array([stage.counts.kept], np.int32))
    kept = e.g.node("Min", [count, most], shape=[1], name="count_at_most", dtype=np.int32)
    return e.g.cast(kept, np.int64, name="count_kept")


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
        bias = g.concat([g.expand_batch(g.zeros([1, P]), bias, name="prefix_bias"), bias], 1, name="row_bias")
    e.key_bias = g.reshape(bias, [g.batch, 1, 1, bias.shape[1]], name="key_bias")


def emit_sampling(e: Emission, selector: CdfSampling, scores: gs.Tensor) -> gs.Tensor:
    """Return scores [B, N]: sampled tokens ranked by place, the others by share; see `CdfSampling.prepare`."""
    g, (B, N), J = e.g, (e.g.batch, scores.shape[1]), selector.points

    def node(op: str, inputs: list[gs.Tensor], name: str, width: int | None = N, **attrs: Any) -> gs.Variable:
        dtype = bool if op in ("IsNaN", "Greater", "LessOrEqual", "And", "Or", "Not") else np.float32
        return g.node(op, inputs, shape=[B, width], name=name, dtype=dtype, **attrs)

    def least(x: gs.Tensor, name: str) -> gs.Variable:
        return g.reduce("ReduceMin", x, 1, keepdims=True, name=name)

    zero, far, tiny = g.scalar(0.0), g.scalar(10.0), g.scalar(1e-30)
    share = node("Where", [node("IsNaN", [scores], "missing"), zero, scores], "present")
    if e.valid is not None:
        share = node("Where", [e.valid, share, zero], "there")
    total = g.reduce("ReduceSum", share, 1, keepdims=True, name="total")
    share = of_all = node("Div", [share, node("Max", [total, tiny], "total_positive", 1)], "share")
    order, here = None, e.valid
    if selector.stretched:
        key = share if e.valid is None else node("Where", [e.valid, share, g.scalar(-1.0)], "key")
        outputs = [("values", np.float32, [B, N]), ("ranks", np.int64, [B, N])]
        sorted_key, order = g.multi_node(
            "TopK", [key, g.length(key, 1, name="tokens_here")], outputs, name="ascending", axis=1, largest=0, sorted=1
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
        span = node("Sub", [g.slice(sums, 1, -1, None, name="highest"), lowest], "span", 1)
        sums = node("Sub", [sums, lowest], "shifted")
        sums = node("Div", [sums, node("Max", [span, tiny], "span_positive", 1)], "stretched")
        first = least(away(node("Where", [node("Greater", [sums, zero], "above"), sums, far], "positive"),
                           "positive_there"), "first")  # fmt: skip
        usable = node("And", [usable, g.node("Less", [first, far], shape=[B, 1], name="has_first", dtype=bool)],
                      "usable", 1)  # fmt: skip
        gap = node("Sub", [g.scalar(1.0), first], "gap", 1)
        steps = node("Mul", [g.constant(f"const.ramp_{J}", ramp / np.float32(max(J - 1, 1))), gap], "steps", J)
        points = g.reshape(node("Add", [steps, first], "points", J), [B, J, 1], name="points_column")
    else:
        points = g.constant(f"const.points_{J}", ((2 * ramp + 1) / np.float32(2 * J))[:, :, None])
    sums = away(sums, "sums_of_tokens")
    distance = g.node("Sub", [points, g.reshape(sums, [B, 1, N], name="sums_row")], shape=[B, J, N], name="difference")
    distance = g.node("Abs", [distance], shape=[B, J, N], name="distance")
    nearest = g.node("ArgMin", [distance], shape=[B, J], name="nearest", dtype=np.int64, axis=2, keepdims=0)
    if order is not None:
        nearest = g.gather_rows(order, nearest, name="nearest_positions")
    places = g.places(N, scores, 1, np.int64, name="places")
    nearest = g.reshape(nearest, [B, J, 1], name="nearest_column")
    hits = g.node("Equal", [nearest, places], shape=[B, J, N], name="hits", dtype=bool)
    hits = g.node("Cast", [hits], shape=[B, J, N], name="hits_float", to=1)
    sampled = node("Greater", [g.reduce("ReduceMax", hits, 1, keepdims=False, name="hit"), g.scalar(0.5)], "sampled")
    sampled = node("Or", [sampled, node("Not", [usable], "useless", 1)], "kept")
    if e.valid is not None:
        sampled = node("And", [sampled, e.valid], "kept_there")
    if N is None:
        number = g.length(scores, 1, name="number")
        ranks = g.node("Sub", [number, places], shape=[1, N], name="places_down", dtype=np.int64)
        ranks = g.cast(ranks, np.float32, name="by_place_only")
    else:
        ranks = g.constant(f"const.places_down_{N}", np.arange(N, 0, -1, dtype=np.float32)[None])
    others = node("Sub", [of_all, g.scalar(1.0)], "others")
    ranks = node("Where", [sampled, ranks, others], "by_place")
    return ranks if e.valid is None else node("Where", [e.valid, ranks, g.scalar(NOT_KEPT)], "by_place_there")
