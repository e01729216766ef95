"""Stages in the graph: scores, the `edgeprune` selection ops, fusion of dropped tokens, token outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError
from edgeprune.export.ops import DOMAIN, PLUGIN_FIELDS, topk_gather
from edgeprune.export.plan import Block, Select
from edgeprune.pruning.base import Constant, Reducer, Scorer, Stage, TopK
from edgeprune.pruning.dynamicvit import PREDICTOR_NORM_EPS, PredictorScorer
from edgeprune.pruning.evit import ClassAttentionScorer
from edgeprune.pruning.model import NO_PATCH_ID

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


@dataclass
class Seen:
    """What scorers may read where a stage stands.

    Attributes:
        rows: the residual stream in the dialect's layout, e.tokens rows per image.
        normed: norm1 of the stream and `keys` of all rows, inside a block only.
        block: index of the block, inside a block only.
    """

    rows: gs.Tensor
    normed: gs.Tensor | None = None
    keys: gs.Tensor | None = None
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
        scores = emit_scores(e, step.stage, Seen(e.rows))
        chosen = choose(e, step.stage, scores, e.as_tokens())
        record(e, chosen)
        e.rows, e.tokens = e.dialect.to_rows(e.g, chosen.kept), step.tokens_out


def emit_keep(
    e: Emission, step: Block, streams: Sequence[gs.Tensor], normed: gs.Tensor, keys: gs.Tensor
) -> list[gs.Tensor]:
    """Choose inside a block ahead of the queries and return every stream with the kept rows only."""
    assert step.stage is not None
    with e.g.scope("select"):
        scores = emit_scores(e, step.stage, Seen(e.rows, normed, keys, step.index))
        first, *others = (e.dialect.to_tokens(e.g, rows, e.tokens) for rows in streams)
        chosen = choose(e, step.stage, scores, first)
        record(e, chosen)
        kept = [chosen.kept, *(gather_also(e, chosen, tokens) for tokens in others)]
        return [e.dialect.to_rows(e.g, tokens) for tokens in kept]


def emit_mid_block(e: Emission, step: Block, x: gs.Tensor, normed: gs.Tensor, keys: gs.Tensor) -> gs.Tensor:
    """Choose after the attention residual and return the shorter stream; every row was computed."""
    assert step.stage is not None
    with e.g.scope("select"):
        scores = emit_scores(e, step.stage, Seen(x, normed, keys, step.index))
        tokens = e.dialect.to_tokens(e.g, x, e.tokens)
        chosen = choose(e, step.stage, scores, tokens)
        record(e, chosen)
        kept = chosen.kept
        if step.stage.reducer is Reducer.FUSE:
            weights, _ = dropped_weights(e, chosen, scores)
            kept = e.g.concat([kept, weighted_sum(e, weights, tokens, "fused")], 1, name="kept_and_fused")
        return e.dialect.to_rows(e.g, kept)


def emit_fuse_before_projection(
    e: Emission, step: Block, x: gs.Tensor, context: gs.Tensor, normed: gs.Tensor, keys: gs.Tensor
) -> tuple[gs.Tensor, gs.Tensor]:
    """Choose and fuse on the attention's output before its projection, which is linear.

    The fused row of the official form is sum_i a_i (x_i + W o_i + b). Here the sums of x and o are formed first; since
    the projection adds b once instead of sum_i a_i times, (sum_i a_i - 1) b is added to the fused residual.
    """
    from edgeprune.export.emit.parts import branch_weights

    assert step.stage is not None
    g, block = e.g, f"blocks.{step.index}"
    with g.scope("select"):
        scores = emit_scores(e, step.stage, Seen(x, normed, keys, step.index))
        x_tokens, o_tokens = (e.dialect.to_tokens(g, rows, e.tokens) for rows in (x, context))
        chosen = choose(e, step.stage, scores, x_tokens)
        record(e, chosen)
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


def choose(e: Emission, stage: Stage, scores: gs.Tensor | None, tokens: gs.Tensor) -> Chosen:
    """Select from tokens [B, P+N, D]."""
    g, P = e.g, e.plan.config.num_prefix_tokens
    K = stage.counts.kept
    if isinstance(stage.selector, Constant):
        return Chosen(gather_constant(e, stage.selector, tokens), stage, None)
    if not isinstance(stage.selector, TopK) or scores is None:
        raise InternalError(f"no lowering for selector {type(stage.selector).__name__}", code="no-lowering")
    kept_shape, indices_shape, count_shape = topk_gather.output_shapes(scores.shape, tokens.shape, K, P)
    outputs = [("kept", np.float32, kept_shape), ("indices", np.int32, indices_shape), ("count", np.int32, count_shape)]
    attrs = {"k": K, "num_prefix_tokens": P, "order": 0, "mode": 0, "threshold": 0.0, **PLUGIN_FIELDS}
    kept, indices, _ = g.multi_node("TopKGather", [scores, tokens], outputs, name="topk_gather", domain=DOMAIN, **attrs)
    return Chosen(kept, stage, indices)


def gather_also(e: Emission, chosen: Chosen, tokens: gs.Tensor) -> gs.Tensor:
    """Return the rows of another tensor [B, P+N, D] at the chosen positions, [B, P+K, D]."""
    if chosen.indices is None:
        assert isinstance(chosen.stage.selector, Constant)
        return gather_constant(e, chosen.stage.selector, tokens)
    P = e.plan.config.num_prefix_tokens
    attrs = {"num_prefix_tokens": P, **PLUGIN_FIELDS}
    inputs, shape = [tokens, chosen.indices], list(chosen.kept.shape)
    return e.g.node("GatherTokens", inputs, shape=shape, name="gather_tokens", domain=DOMAIN, **attrs)


def gather_constant(e: Emission, selector: Constant, tokens: gs.Tensor) -> gs.Tensor:
    """Return the prefix and the rows at constant positions."""
    P = e.plan.config.num_prefix_tokens
    rows = np.array([*range(P), *(P + i for i in selector.indices)], np.int64)
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
    """Return scores [B, N] float32, or None when the selector needs none."""
    if isinstance(stage.selector, Constant):
        return None
    emitter = SCORERS.get(type(stage.scorer))
    if emitter is None:
        raise InternalError(f"no lowering for scorer {type(stage.scorer).__name__}", code="no-lowering")
    scores = emitter(e, stage, seen)  # [B, T]
    return e.g.slice(scores, 1, e.plan.config.num_prefix_tokens, e.tokens, name="patch_scores")


def emit_class_attention(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor:
    """Mean over heads of the CLS query's attention, [B, T]."""
    from edgeprune.export.emit.parts import first_rows

    assert seen.normed is not None and seen.keys is not None
    D, heads = e.plan.config.embed_dim, e.plan.config.num_heads
    key = f"blocks.{seen.block}.attn.qkv"
    q = e.linear("q_cls", first_rows(e, seen.normed, 1), key, ("q", slice(0, D)))
    return e.dialect.class_attention(e.g, e.dialect.to_tokens(e.g, q, 1), seen.keys, e.tokens, heads)


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
}


def record(e: Emission, chosen: Chosen) -> None:
    """Keep the original patch numbers of a stage for the token outputs, [B, K] int64."""
    if not e.plan.token_outputs:
        return
    g, counts = e.g, chosen.stage.counts
    if isinstance(chosen.stage.selector, Constant):
        indices = np.array([chosen.stage.selector.indices], np.int64)
        positions = g.expand_batch(g.unnamed_constant("positions", indices), chosen.kept, name="positions_batch")
    else:
        positions = g.node(
            "Cast", [chosen.indices], shape=[g.batch, counts.kept], name="positions", dtype=np.int64, to=7
        )
    if e.ids is None:
        ids = positions
    else:
        at = g.reshape(positions, [g.batch, counts.kept, 1], name="positions_at")
        shape = [g.batch, counts.kept]
        ids = g.node("GatherND", [e.ids, at], shape=shape, name="patch_ids", dtype=np.int64, batch_dims=1)
    e.kept.append(ids)
    if chosen.stage.reducer is Reducer.FUSE:
        fused = g.constant("const.fused_id", np.array([[NO_PATCH_ID]], np.int64))
        ids = g.concat([ids, g.expand_batch(fused, chosen.kept, name="fused_id")], 1, name="patch_ids_fused")
    e.ids = ids


def token_outputs(e: Emission) -> list[gs.Variable]:
    """Return `kept_indices_<s>` [B, K] int32 per stage and `kept_counts` [B, S] int32."""
    g = e.g
    outputs = []
    for s, ids in enumerate(e.kept):
        out = g.node("Cast", [ids], shape=ids.shape, name=f"kept_indices_{s}", dtype=np.int32, to=6)
        outputs.append(out)
    if outputs:
        counts = np.array([[stage.counts.kept for stage in e.plan.stages]], np.int32)
        expanded = g.expand_batch(g.constant("const.kept_counts", counts), e.rows, name="kept_counts_batch")
        outputs.append(
            g.node("Identity", [expanded], shape=[g.batch, counts.shape[1]], name="kept_counts", dtype=np.int32)
        )
    return outputs
