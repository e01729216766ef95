"""Stages in the graph: scores, the `edgeprune` selection ops, fusion of dropped tokens, token outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError
from edgeprune.export.ops import DOMAIN, PLUGIN_FIELDS, topk_gather
from edgeprune.export.plan import Block, Restore, Select, fuses
from edgeprune.pruning.adaptive import NOT_KEPT, Slots, Threshold
from edgeprune.pruning.asvit import HEAD_EPS, HeadWeightedScorer
from edgeprune.pruning.ats import CdfSampling, ValueScorer
from edgeprune.pruning.base import Constant, Reducer, Scorer, Stage, TopK
from edgeprune.pruning.cropr import QueryScorer
from edgeprune.pruning.dynamicvit import PREDICTOR_NORM_EPS, PredictorScorer
from edgeprune.pruning.evit import ClassAttentionScorer
from edgeprune.pruning.model import NO_PATCH_ID
from edgeprune.pruning.sait import CLS, ImportanceScorer
from edgeprune.pruning.tome import Bipartite, KeyMetric

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission

HIDDEN = -1e4  # logit of a key that is no token; its weight is exactly 0


@dataclass
class Seen:
    """What scorers may read where a stage stands.

    Attributes:
        rows: the residual stream in the dialect's layout, e.tokens rows per image.
        normed, queries, values: norm1 of the stream and what is projected from it, inside or behind a block only.
        keys: as the dialect keeps them.
        context: what the attention puts out before its projection, of all rows.
        block: index of the block.
    """

    rows: gs.Tensor
    normed: gs.Tensor | None = None
    keys: gs.Tensor | None = None
    values: gs.Tensor | None = None
    queries: gs.Tensor | None = None
    context: gs.Tensor | None = None
    block: int = -1


@dataclass
class Chosen:
    """The outcome of a selection: kept rows [B, P+K, D] and their positions, [B, K] int32 or constant."""

    kept: gs.Tensor
    stage: Stage
    indices: gs.Tensor | None


def emit_select(e: Emission, step: Select) -> None:
    """A stage in front of a block."""
    with e.g.scope(f"select.{step.stage.index}"):
        scores = e.scores.pop(step.stage.index, None)
        if scores is None:
            scores = emit_scores(e, step.stage, Seen(e.rows))
        tokens = e.as_tokens()
        if step.stage.reducer is Reducer.STASH:
            kept = emit_stash(e, step.stage, scores, tokens)
        else:
            kept = choose(e, step.stage, scores, tokens).kept
        e.rows, e.tokens = e.dialect.to_rows(e.g, kept), step.tokens_out


def emit_stash(e: Emission, stage: Stage, scores: gs.Tensor | None, tokens: gs.Tensor) -> gs.Tensor:
    """Rank all tokens, put the worst aside and return the others: one ranking, so that no token is in both parts."""
    g, K, N = e.g, stage.counts.kept, stage.counts.tokens_in
    rows = e.plan.config.num_prefix_tokens + K
    if isinstance(stage.selector, Constant):
        rest = sorted(set(range(N)) - set(stage.selector.indices))
        chosen = choose(e, stage, scores, tokens)
        e.stash.append(gather_constant(e, rest, tokens, prefix=0))
        return chosen.kept
    ranked = topk_gather_node(e, scores, tokens, N)
    record(e, Chosen(ranked.kept, stage, g.slice(ranked.indices, 1, 0, K, name="indices")))
    e.stash.append(g.slice(ranked.kept, 1, rows, tokens.shape[1], name="stashed"))
    return g.slice(ranked.kept, 1, 0, rows, name="kept")


def emit_restore(e: Emission, step: Restore) -> None:
    """Stashed tokens come back."""
    with e.g.scope("restore"):
        tokens = e.g.concat([e.as_tokens(), *e.stash], 1, name="all_tokens")
        e.rows, e.tokens = e.dialect.to_rows(e.g, tokens), step.tokens_out
        e.stash.clear()


def emit_scores_ahead(e: Emission, stage: Stage, seen: Seen) -> None:
    """Score inside a block for the stage behind it."""
    with e.g.scope(f"select.{stage.index}"):
        scores = emit_scores(e, stage, seen)
        if scores is not None:
            e.scores[stage.index] = scores


def emit_keep(e: Emission, step: Block, streams: Sequence[gs.Tensor], seen: Seen) -> list[gs.Tensor]:
    """Choose inside a block ahead of the queries and return every stream with the kept rows only."""
    assert step.stage is not None
    with e.g.scope("select"):
        scores = emit_scores(e, step.stage, seen)
        first, *others = (e.dialect.to_tokens(e.g, rows, e.tokens) for rows in streams)
        chosen = choose(e, step.stage, scores, first)
        kept = [chosen.kept, *(gather_also(e, chosen, tokens) for tokens in others)]
        return [e.dialect.to_rows(e.g, tokens) for tokens in kept]


def emit_mid_block(e: Emission, step: Block, x: gs.Tensor, seen: Seen) -> gs.Tensor:
    """Choose after the attention residual and return the shorter stream; every row was computed."""
    assert step.stage is not None
    with e.g.scope("select"):
        scores = emit_scores(e, step.stage, seen)
        tokens = e.dialect.to_tokens(e.g, x, e.tokens)
        if isinstance(step.stage.selector, Bipartite):
            assert scores is not None
            return e.dialect.to_rows(e.g, emit_merge(e, step.stage, scores, tokens))
        chosen = choose(e, step.stage, scores, tokens)
        kept = chosen.kept
        if step.stage.reducer is Reducer.FUSE:
            weights, _ = dropped_weights(e, chosen, scores)
            kept = e.g.concat([kept, weighted_sum(e, weights, tokens, "fused")], 1, name="kept_and_fused")
        return e.dialect.to_rows(e.g, kept)


def emit_keep_before_projection(e: Emission, step: Block, x: gs.Tensor, seen: Seen) -> tuple[gs.Tensor, gs.Tensor]:
    """Choose on the attention's output before its projection, which is linear, and fuse there.

    The fused row of the official form is sum_i a_i (x_i + W o_i + b). Here the sums of x and o are formed first; since
    the projection adds b once instead of sum_i a_i times, (sum_i a_i - 1) b is added to the fused residual.
    """
    from edgeprune.export.emit.parts import branch_weights

    assert step.stage is not None
    g, block = e.g, f"blocks.{step.index}"
    with g.scope("select"):
        scores = emit_scores(e, step.stage, seen)
        x_tokens, o_tokens = (e.dialect.to_tokens(g, rows, e.tokens) for rows in (x, seen.context))
        chosen = choose(e, step.stage, scores, x_tokens)
        if not fuses(step.stage):
            return e.dialect.to_rows(g, chosen.kept), e.dialect.to_rows(g, gather_also(e, chosen, o_tokens))
        weights, total = dropped_weights(e, chosen, scores)
        _, bias = branch_weights(e, f"{block}.attn.proj", f"{block}.ls1.gamma")
        excess = g.node("Sub", [total, g.scalar(1.0)], shape=total.shape, name="excess")
        shape = [g.batch, 1, len(bias)]
        correction = g.node(
            "Mul",
            [excess, g.constant(f"{block}.attn.proj.bias.effective", bias)],
            shape=shape,
            name="correction",
        )
        x_fused = g.node(
            "Add",
            [weighted_sum(e, weights, x_tokens, "x_fused"), correction],
            shape=shape,
            name="x_fused_row",
        )
        o_fused = weighted_sum(e, weights, o_tokens, "o_fused")
        kept = (
            g.concat([chosen.kept, x_fused], 1, name="x_rows"),
            g.concat([gather_also(e, chosen, o_tokens), o_fused], 1, name="o_rows"),
        )
        return e.dialect.to_rows(g, kept[0]), e.dialect.to_rows(g, kept[1])


@dataclass
class Ranked:
    """The outputs of a `TopKGather` node: kept [B, P+K, D], indices [B, K] int32, count [B] int32."""

    kept: gs.Tensor
    indices: gs.Tensor
    count: gs.Tensor


def topk_gather_node(
    e: Emission, scores: gs.Tensor | None, tokens: gs.Tensor, k: int, mode: int = 0, threshold: float = 0.0
) -> Ranked:
    """Return the k best of tokens [B, P+N, D] by scores [B, N]."""
    assert scores is not None
    P = e.plan.config.num_prefix_tokens
    kept_shape, indices_shape, count_shape = topk_gather.output_shapes(scores.shape, tokens.shape, k, P)
    outputs = [("kept", np.float32, kept_shape), ("indices", np.int32, indices_shape), ("count", np.int32, count_shape)]
    attrs = {"k": k, "num_prefix_tokens": P, "order": 0, "mode": mode, "threshold": threshold, **PLUGIN_FIELDS}
    inputs = [scores, tokens]
    return Ranked(*e.g.multi_node("TopKGather", inputs, outputs, name="topk_gather", domain=DOMAIN, **attrs))


def choose(e: Emission, stage: Stage, scores: gs.Tensor | None, tokens: gs.Tensor) -> Chosen:
    """Select from tokens [B, P+N, D] and record what was kept; slots and key bias of the emission follow."""
    K, selector = stage.counts.kept, stage.selector
    if isinstance(selector, Constant):
        chosen = Chosen(gather_constant(e, selector.indices, tokens, e.plan.config.num_prefix_tokens), stage, None)
    elif isinstance(selector, TopK):
        ranked = topk_gather_node(e, scores, tokens, K)
        chosen = Chosen(ranked.kept, stage, ranked.indices)
    elif isinstance(selector, Slots):
        return choose_slots(e, stage, selector, scores, tokens)
    else:
        raise InternalError(f"no lowering for selector {type(selector).__name__}", code="no-lowering")
    record(e, chosen)
    return chosen


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

    def node(op: str, inputs: list[gs.Tensor], name: str, width: int = N, **attrs: object) -> gs.Variable:
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
    if S > r:
        outputs = [("values", np.int64, [B, S - r]), ("ranks", np.int64, [B, S - r])]
        alone, _ = g.multi_node(
            "TopK", [g.slice(order, 1, r, S, name="rest"), g.ints(S - r)], outputs, name="alone", axis=1, largest=0, sorted=1
        )  # fmt: skip
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


def gather_also(e: Emission, chosen: Chosen, tokens: gs.Tensor) -> gs.Tensor:
    """Return the rows of another tensor [B, P+N, D] at the chosen positions, [B, P+K, D]."""
    if chosen.indices is None:
        assert isinstance(chosen.stage.selector, Constant)
        return gather_constant(e, chosen.stage.selector.indices, tokens, e.plan.config.num_prefix_tokens)
    P = e.plan.config.num_prefix_tokens
    attrs = {"num_prefix_tokens": P, **PLUGIN_FIELDS}
    inputs, shape = [tokens, chosen.indices], list(chosen.kept.shape)
    return e.g.node("GatherTokens", inputs, shape=shape, name="gather_tokens", domain=DOMAIN, **attrs)


def gather_constant(e: Emission, indices: Sequence[int], tokens: gs.Tensor, prefix: int) -> gs.Tensor:
    """Return the first `prefix` rows and the patch rows at constant positions."""
    P = e.plan.config.num_prefix_tokens
    rows = np.array([*range(prefix), *(P + i for i in indices)], np.int64)
    shape = [e.g.batch, len(rows), tokens.shape[-1]]
    index = e.g.unnamed_constant("rows", rows)
    return e.g.node("Gather", [tokens, index], shape=shape, name="gather", axis=1)


def dropped_weights(e: Emission, chosen: Chosen, scores: gs.Tensor | None) -> tuple[gs.Tensor, gs.Tensor]:
    """Return the scores of dropped tokens over all rows [B, 1, T], zero elsewhere, and their sum [B, 1, 1]."""
    assert scores is not None and chosen.indices is not None
    g, P = e.g, e.plan.config.num_prefix_tokens
    K, N = chosen.stage.counts.kept, chosen.stage.counts.tokens_in
    zeros = g.expand_batch(g.constant(f"const.zeros_{K}", np.zeros((1, K), np.float32)), scores, name="zeros")
    rest = g.node("ScatterElements", [scores, chosen.indices, zeros], shape=[g.batch, N], name="dropped", axis=1)
    rest = g.reshape(rest, [g.batch, 1, N], name="dropped_row")
    total = g.reduce("ReduceSum", rest, 2, keepdims=True, name="dropped_sum")
    prefix = g.constant(f"const.zeros_1_{P}", np.zeros((1, 1, P), np.float32))
    return g.concat([g.expand_batch(prefix, scores, name="prefix_zeros"), rest], 2, name="weights"), total


def weighted_sum(e: Emission, weights: gs.Tensor, tokens: gs.Tensor, name: str) -> gs.Tensor:
    """Return weights [B, 1, T] times tokens [B, T, D]: [B, 1, D]."""
    return e.g.node("MatMul", [weights, tokens], shape=[e.g.batch, 1, tokens.shape[-1]], name=name)


def emit_scores(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor | None:
    """Return scores [B, N] float32 (the metric [B, N, d] of a merging stage), or None when the selector needs none."""
    if isinstance(stage.selector, Constant):
        return None
    emitter = SCORERS.get(type(stage.scorer))
    if emitter is None:
        raise InternalError(f"no lowering for scorer {type(stage.scorer).__name__}", code="no-lowering")
    scores = emitter(e, stage, seen)  # [B, T, ...]
    scores = e.g.slice(scores, 1, e.plan.config.num_prefix_tokens, e.tokens, name="patch_scores")
    if isinstance(stage.scorer, ImportanceScorer):
        total = e.g.reduce("ReduceSum", scores, 1, keepdims=True, name="patch_total")
        scores = e.g.node("Div", [scores, total], shape=scores.shape, name="patch_shares")
    return scores


def class_rows(e: Emission, seen: Seen) -> gs.Tensor:
    """Return the CLS query's attention [B, H, T]."""
    from edgeprune.export.emit.parts import first_rows

    assert seen.normed is not None and seen.keys is not None
    D, heads = e.plan.config.embed_dim, e.plan.config.num_heads
    key = f"blocks.{seen.block}.attn.qkv"
    q = e.linear("q_cls", first_rows(e, seen.normed, 1), key, ("q", slice(0, D)))
    return e.dialect.class_attention(e.g, e.dialect.to_tokens(e.g, q, 1), seen.keys, e.tokens, heads, e.key_bias)


def emit_class_attention(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """Mean over heads of the CLS query's attention, [B, T]."""
    return e.g.reduce("ReduceMean", class_rows(e, seen), 1, keepdims=False, name="scores")


def lengths_by_head(e: Emission, rows: gs.Tensor | None, name: str) -> gs.Tensor:
    """Return the length of every head's part of rows, [B, T, H]."""
    assert rows is not None
    g, (H, d), T = e.g, (e.plan.config.num_heads, e.plan.config.head_dim), e.tokens
    split = g.reshape(e.dialect.to_tokens(g, rows, T), [g.batch, T, H, d], name=f"{name}.by_head")
    return g.reduce("ReduceL2", split, 3, keepdims=False, name=f"{name}.lengths")


def emit_value_scores(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """ATS: the CLS query's attention times the length of the value, [B, T]."""
    assert isinstance(stage.scorer, ValueScorer)
    g, T = e.g, e.tokens
    attention = class_rows(e, seen)
    if stage.scorer.per_head:
        lengths = g.transpose(lengths_by_head(e, seen.values, "values"), [0, 2, 1], name="lengths")
        product = g.node("Mul", [attention, lengths], shape=attention.shape, name="product")
        return g.reduce("ReduceSum", product, 1, keepdims=False, name="scores")
    lengths = g.reduce("ReduceL2", e.dialect.to_tokens(g, seen.values, T), 2, keepdims=False, name="lengths")
    attention = g.reduce("ReduceSum", attention, 1, keepdims=False, name="attention")
    return g.node("Mul", [attention, lengths], shape=[g.batch, T], name="scores")


def emit_head_weighted(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """AS-ViT: the CLS query's attention, heads weighted by the length of their output for the token, [B, T]."""
    g = e.g
    lengths = lengths_by_head(e, seen.context, "outputs")
    total = g.reduce("ReduceSum", lengths, 2, keepdims=True, name="length_sum")
    total = g.node("Add", [total, g.scalar(HEAD_EPS)], shape=total.shape, name="length_sum_positive")
    weights = g.node("Div", [lengths, total], shape=lengths.shape, name="head_weights")
    attention = g.transpose(class_rows(e, seen), [0, 2, 1], name="attention")
    product = g.node("Mul", [weights, attention], shape=lengths.shape, name="product")
    return g.reduce("ReduceSum", product, 2, keepdims=False, name="scores")


def emit_importance(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """SaiT: the attention a token receives, of the CLS query or the mean over all queries, [B, T]."""
    assert isinstance(stage.scorer, ImportanceScorer)
    if stage.scorer.tis == CLS:
        return emit_class_attention(e, stage, seen)
    g, T, heads = e.g, e.tokens, e.plan.config.num_heads
    attention = e.dialect.mean_attention(g, seen.queries, seen.keys, T, heads, e.key_bias)
    if e.valid is None:
        return g.reduce("ReduceMean", attention, 1, keepdims=False, name="scores")
    P = e.plan.config.num_prefix_tokens
    asks = g.node("Cast", [e.valid], shape=e.valid.shape, name="asks", to=1)
    ones = g.constant(f"const.ones_{P}", np.ones((1, P), np.float32))
    asks = g.concat([g.expand_batch(ones, asks, name="prefix_asks"), asks], 1, name="queries_there")
    # a common factor does not matter: the scores are normalised
    asks = g.reshape(asks, [g.batch, 1, T], name="queries_row")
    received = g.node("MatMul", [asks, attention], shape=[g.batch, 1, T], name="received")
    return g.reshape(received, [g.batch, T], name="scores")


def emit_query_scores(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """Cropr: every row times the sum of the queries, [B, T]."""
    key = f"prune.{stage.index}.cross_attn.queries"
    folded = e.g.weights[key].sum(1)
    scores = e.dialect.linear(e.g, "query", seen.rows, folded, None, f"{key}.sum")
    return e.g.reshape(e.dialect.to_tokens(e.g, scores, e.tokens), [e.g.batch, e.tokens], name="scores")


def emit_key_metric(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """ToMe: the mean key over heads, of length 1, [B, T, d]."""
    g = e.g
    metric = e.dialect.mean_keys(g, seen.keys, e.plan.config.num_heads)
    length = g.reduce("ReduceL2", metric, 2, keepdims=True, name="key_length")
    length = g.node("Max", [length, g.scalar(1e-12)], shape=length.shape, name="key_length_positive")
    return g.node("Div", [metric, length], shape=metric.shape, name="metric")


def emit_predictor(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """DynamicViT's predictor over all rows, [B, T]; the prefix's scores are computed and not read.

    Exact rewritings: the global half enters the next layer as one row per image instead of being repeated; the two
    logits become their difference.
    """
    g, D, T = e.g, e.plan.config.embed_dim, e.tokens
    weights, key, half = g.weights, f"prune.{stage.index}", D // 2
    N, P = stage.counts.tokens_in, e.plan.config.num_prefix_tokens

    def linear(name: str, x: gs.Tensor, layer: str, weight: np.ndarray, bias: np.ndarray | None) -> gs.Tensor:
        return e.dialect.linear(g, name, x, weight, bias, f"{key}.{layer}")

    h = e.layer_norm("norm", seen.rows, f"{key}.in_conv.0", PREDICTOR_NORM_EPS)
    w1, b1 = weights[f"{key}.in_conv.1.weight"], weights[f"{key}.in_conv.1.bias"]
    local = e.dialect.gelu(g, "local.gelu", linear("local", h, "in_conv.1.local", w1[:half], b1[:half]))
    shared = e.dialect.gelu(g, "global.gelu", linear("global", h, "in_conv.1.global", w1[half:], b1[half:]))
    mean_row = np.concatenate([np.zeros((1, 1, P)), np.full((1, 1, N), 1 / N)], axis=2).astype(np.float32)
    mean = weighted_sum(
        e, g.constant(f"const.mean_{P}_{N}", mean_row), e.dialect.to_tokens(g, shared, T), "global.mean"
    )
    w2, b2 = weights[f"{key}.out_conv.0.weight"], weights[f"{key}.out_conv.0.bias"]
    mean = g.reshape(mean, [g.batch, half], name="global.row")
    mean = linear("fc1_global", mean, "out_conv.0.global", w2[:, half:], b2)
    x = e.dialect.to_tokens(g, linear("fc1", local, "out_conv.0.local", w2[:, :half], None), T)
    x = g.node("Add", [x, g.reshape(mean, [g.batch, 1, half], name="fc1_global_row")], shape=x.shape, name="fc1_sum")
    x = e.dialect.gelu(g, "fc1.gelu", e.dialect.to_rows(g, x))
    x = e.dialect.gelu(g, "fc2.gelu", e.linear("fc2", x, f"{key}.out_conv.2"))
    w4, b4 = weights[f"{key}.out_conv.4.weight"], weights[f"{key}.out_conv.4.bias"]
    x = linear("fc3", x, "out_conv.4.difference", w4[:1] - w4[1:], b4[:1] - b4[1:])
    return g.reshape(e.dialect.to_tokens(g, x, T), [g.batch, T], name="scores")


SCORERS: dict[type[Scorer], Callable[[Emission, Stage, Seen], gs.Tensor]] = {
    ClassAttentionScorer: emit_class_attention,
    PredictorScorer: emit_predictor,
    ValueScorer: emit_value_scores,
    HeadWeightedScorer: emit_head_weighted,
    ImportanceScorer: emit_importance,
    QueryScorer: emit_query_scores,
    KeyMetric: emit_key_metric,
}


def record(e: Emission, chosen: Chosen, count: gs.Tensor | None = None, valid: gs.Tensor | None = None) -> None:
    """Keep the original patch numbers of a stage [B, K] int64 for the token outputs, and its counts."""
    e.counts.append(count)
    if not e.plan.token_outputs:
        return
    g, counts = e.g, chosen.stage.counts
    if chosen.indices is None:
        assert isinstance(chosen.stage.selector, Constant)
        indices = np.array([chosen.stage.selector.indices], np.int64)
        positions = g.expand_batch(g.unnamed_constant("positions", indices), chosen.kept, name="positions_batch")
    else:
        positions = g.node(
            "Cast", [chosen.indices], shape=[g.batch, counts.kept], name="positions", dtype=np.int64, to=7
        )
    record_positions(e, positions, valid)
    if chosen.stage.reducer is Reducer.FUSE:
        fused = g.constant("const.no_patch", np.array([[NO_PATCH_ID]], np.int64))
        e.ids = g.concat([e.ids, g.expand_batch(fused, chosen.kept, name="fused_id")], 1, name="patch_ids_fused")


def record_positions(e: Emission, positions: gs.Tensor, valid: gs.Tensor | None = None) -> None:
    """Follow patch numbers through positions [B, K] int64; slots that are not `valid` [B, K] get -1."""
    g, ids = e.g, positions
    if e.ids is not None:
        ids = g.gather_rows(e.ids, positions, name="patch_ids")
    if valid is not None:
        none = g.constant("const.no_patch", np.array([[NO_PATCH_ID]], np.int64))
        ids = g.node("Where", [valid, ids, none], shape=ids.shape, name="patch_ids_there", dtype=np.int64)
    e.kept.append(ids)
    e.ids = ids


def token_outputs(e: Emission) -> list[gs.Variable]:
    """Return the outputs besides the logits.

    With token outputs `kept_indices_<s>` [B, K] int32 per stage; with them or an adaptive stage `kept_counts` [B, S]
    int32; with an adaptive stage `overflow` [B] int32, 1 where a stage had too few slots.
    """
    g, stages = e.g, e.plan.stages
    outputs = []
    for s, ids in enumerate(e.kept):
        out = g.node("Cast", [ids], shape=ids.shape, name=f"kept_indices_{s}", dtype=np.int32, to=6)
        outputs.append(out)
    adaptive = any(count is not None for count in e.counts)
    if not stages or not (e.plan.token_outputs or adaptive):
        return outputs
    shape = [g.batch, len(stages)]
    slots = g.constant("const.kept_counts", np.array([[stage.counts.kept for stage in stages]], np.int32))
    if not adaptive:
        expanded = g.expand_batch(slots, e.rows, name="kept_counts_batch")
        return [*outputs, g.node("Identity", [expanded], shape=shape, name="kept_counts", dtype=np.int32)]
    columns = []
    for stage, count in zip(stages, e.counts, strict=True):
        if count is None:
            fixed = g.constant(f"const.count_{stage.counts.kept}", np.array([[stage.counts.kept]], np.int32))
            columns.append(g.expand_batch(fixed, e.rows, name="count"))
        else:
            columns.append(g.reshape(count, [g.batch, 1], name="count"))
    counts = g.concat(columns, 1, name="counts")
    counts = g.node("Identity", [counts], shape=shape, name="kept_counts", dtype=np.int32)
    over = g.node("Greater", [counts, slots], shape=shape, name="over", dtype=bool)
    over = g.node("Cast", [over], shape=shape, name="over_int", dtype=np.int32, to=6)
    over = g.reduce("ReduceMax", over, 1, keepdims=False, name="overflow")
    return [*outputs, counts, over]
