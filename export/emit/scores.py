"""Scorers in the graph; a new one is a function here and a line in `SCORERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError
from edgeprune.export.emit.gather import weighted_sum
from edgeprune.pruning.asvit import HEAD_EPS, HeadWeightedScorer
from edgeprune.pruning.ats import ValueScorer
from edgeprune.pruning.base import Constant, Scorer, Stage
from edgeprune.pruning.cropr import QueryScorer
from edgeprune.pruning.dynamicvit import PREDICTOR_NORM_EPS, PredictorScorer
from edgeprune.pruning.evit import ClassAttentionScorer
from edgeprune.pruning.sait import CLS, ImportanceScorer
from edgeprune.pruning.tome import KeyMetric

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


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


def emit_scores(e: Emission, stage: Stage, seen: Seen) -> gs.Tensor | None:
    """Return scores [B, N] float32 (the metric [B, N, d] of a merging stage), or None when the selector needs none."""
    if isinstance(stage.selector, Constant):
        return None
    emitter = SCORERS.get(type(stage.scorer))
    if emitter is None:
        raise InternalError(f"no lowering for scorer {type(stage.scorer).__name__}", code="no-lowering")
    with e.g.precise():
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
    with e.g.precise(False):
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
    g, T = e.g, e.tokens
    weights, key = g.weights, f"prune.{stage.index}"

    def linear(name: str, x: gs.Tensor, layer: str, weight: np.ndarray, bias: np.ndarray | None) -> gs.Tensor:
        return e.dialect.linear(g, name, x, weight, bias, f"{key}.{layer}")

    with g.precise(False):
        x = predictor_features(e, stage, seen, linear)
    w4, b4 = weights[f"{key}.out_conv.4.weight"], weights[f"{key}.out_conv.4.bias"]
    x = linear("fc3", x, "out_conv.4.difference", w4[:1] - w4[1:], b4[:1] - b4[1:])
    return g.reshape(e.dialect.to_tokens(g, x, T), [g.batch, T], name="scores")


def predictor_features(e: Emission, stage: Stage, seen: Seen, linear: Callable[..., gs.Tensor]) -> gs.Tensor:
    """Return what the predictor's last layer reads, in the layout of rows."""
    g, T, weights, key = e.g, e.tokens, e.g.weights, f"prune.{stage.index}"
    half = e.plan.config.embed_dim // 2
    h = e.layer_norm("norm", seen.rows, f"{key}.in_conv.0", PREDICTOR_NORM_EPS)
    w1, b1 = weights[f"{key}.in_conv.1.weight"], weights[f"{key}.in_conv.1.bias"]
    local = e.dialect.gelu(g, "local.gelu", linear("local", h, "in_conv.1.local", w1[:half], b1[:half]))
    shared = e.dialect.gelu(g, "global.gelu", linear("global", h, "in_conv.1.global", w1[half:], b1[half:]))
    mean = mean_of_patches(e, e.dialect.to_tokens(g, shared, T))
    w2, b2 = weights[f"{key}.out_conv.0.weight"], weights[f"{key}.out_conv.0.bias"]
    mean = g.reshape(mean, [g.batch, half], name="global.row")
    mean = linear("fc1_global", mean, "out_conv.0.global", w2[:, half:], b2)
    x = e.dialect.to_tokens(g, linear("fc1", local, "out_conv.0.local", w2[:, :half], None), T)
    x = g.node("Add", [x, g.reshape(mean, [g.batch, 1, half], name="fc1_global_row")], shape=x.shape, name="fc1_sum")
    x = e.dialect.gelu(g, "fc1.gelu", e.dialect.to_rows(g, x))
    return e.dialect.gelu(g, "fc2.gelu", e.linear("fc2", x, f"{key}.out_conv.2"))


def mean_of_patches(e: Emission, tokens: gs.Tensor) -> gs.Tensor:
    """Return the mean of the patch tokens of tokens [B, T, D], [B, 1, D]: one product instead of a strided sum."""
    g, P, N = e.g, e.plan.config.num_prefix_tokens, e.patches
    if N is not None:
        row = np.concatenate([np.zeros((1, 1, P)), np.full((1, 1, N), 1 / N)], axis=2).astype(np.float32)
        return weighted_sum(e, g.constant(f"const.mean_{P}_{N}", row), tokens, "global.mean")
    patches = g.slice(tokens, 1, P, None, name="global.patches")
    return g.reduce("ReduceMean", patches, 1, keepdims=True, name="global.mean")


SCORERS: dict[type[Scorer], Callable[[Emission, Stage, Seen], gs.Tensor]] = {
    ClassAttentionScorer: emit_class_attention,
    PredictorScorer: emit_predictor,
    ValueScorer: emit_value_scores,
    HeadWeightedScorer: emit_head_weighted,
    ImportanceScorer: emit_importance,
    QueryScorer: emit_query_scores,
    KeyMetric: emit_key_metric,
}
