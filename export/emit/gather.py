"""Nodes that take tokens out of a sequence: the `edgeprune` ops, constant positions, what becomes of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.builder import precise
from edgeprune.export.ops import DOMAIN, PLUGIN_FIELDS, topk_gather
from edgeprune.pruning.base import Constant, Stage

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


@dataclass
class Chosen:
    """The outcome of a selection: kept rows [B, P+K, D] and their positions, [B, K] int32 or int64, or constant.

    Where K is no constant, `rows` are the kept rows as `gather_flat` takes them.
    """

    kept: gs.Tensor
    stage: Stage
    indices: gs.Tensor | None
    rows: gs.Tensor | None = None


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


def rank_all(e: Emission, scores: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """Return scores [B, N] sorted, best first, NaN last, and their positions int64: the op's ranking for any N."""
    g, shape = e.g, scores.shape
    missing = g.node("IsNaN", [scores], shape=shape, name="missing", dtype=bool)
    ranked = g.node("Where", [missing, g.scalar(topk_gather.NAN_SCORE), scores], shape=shape, name="ranked")
    outputs = [("values", np.float32, shape), ("ranks", np.int64, shape)]
    inputs = [ranked, g.length(ranked, 1, name="tokens_here")]
    values, ranks = g.multi_node("TopK", inputs, outputs, name="ranking", axis=1, largest=1, sorted=1)
    return values, ranks


def keep_ranked(e: Emission, stage: Stage, ranks: gs.Tensor, k: gs.Tensor, tokens: gs.Tensor) -> Chosen:
    """Keep the first k [1] int64 of ranks [B, N] int64."""
    g, B, P = e.g, e.g.batch, e.plan.config.num_prefix_tokens
    indices = g.slice(ranks, 1, 0, k, name="indices")
    if not isinstance(B, int):
        positions = g.cast(indices, np.int32, name="positions_int32")
        return Chosen(gather_tokens_node(e, tokens, positions), stage, positions)
    rows = g.node("Add", [indices, g.constant(f"const.i64_first_{P}", np.array([P], np.int64))], shape=[B, None],
                  name="patch_rows", dtype=np.int64)  # fmt: skip
    prefix = g.constant(f"const.prefix_rows_{B}_{P}", np.tile(np.arange(P, dtype=np.int64), (B, 1)))
    rows = g.concat([prefix, rows], 1, name="rows_of_image") if P else rows
    if B == 1:
        rows = g.reshape(rows, [None], name="rows")
    else:
        images = g.constant(f"const.images_{B}", np.arange(B, dtype=np.int64)[:, None])
        starts = g.node("Mul", [images, g.length(tokens, 1, name="sequence")], shape=[B, 1], name="starts",
                        dtype=np.int64)  # fmt: skip
        rows = g.node("Add", [rows, starts], shape=[B, None], name="rows_of_batch", dtype=np.int64)
    return Chosen(gather_flat(e, tokens, rows), stage, indices, rows)


def gather_flat(e: Emission, tokens: gs.Tensor, rows: gs.Tensor) -> gs.Tensor:
    """Return [B, P+K, D]: rows [B, P+K] int64 of the sequences of tokens [B, T, D] one behind the other.

    Of a single sequence the rows are [P+K].
    """
    (B, _, D), single = tokens.shape, len(rows.shape) == 1
    sequences = tokens if single else e.g.reshape(tokens, [None, D], name="sequences")
    return e.g.node("Gather", [sequences, rows], shape=[B, None, D], name="kept_rows", axis=int(single))


def gather_also(e: Emission, chosen: Chosen, tokens: gs.Tensor) -> gs.Tensor:
    """Return the rows of another tensor [B, P+N, D] at the chosen positions, [B, P+K, D]."""
    if chosen.indices is None:
        assert isinstance(chosen.stage.selector, Constant)
        return gather_constant(e, chosen.stage.selector.indices, tokens, e.plan.config.num_prefix_tokens)
    if chosen.rows is not None:
        return gather_flat(e, tokens, chosen.rows)
    return gather_tokens_node(e, tokens, chosen.indices)


def gather_tokens_node(e: Emission, tokens: gs.Tensor, indices: gs.Tensor) -> gs.Tensor:
    """Return the prefix and the patch tokens at indices [B, K] int32 of tokens [B, P+N, D]."""
    P = e.plan.config.num_prefix_tokens
    K = indices.shape[1]
    shape = [tokens.shape[0], None if K is None else P + K, tokens.shape[2]]
    attrs = {"num_prefix_tokens": P, **PLUGIN_FIELDS}
    return e.g.node("GatherTokens", [tokens, indices], shape=shape, name="gather_tokens", domain=DOMAIN, **attrs)


def gather_constant(e: Emission, indices: Sequence[int], tokens: gs.Tensor, prefix: int) -> gs.Tensor:
    """Return the first `prefix` rows and the patch rows at constant positions."""
    P = e.plan.config.num_prefix_tokens
    rows = np.array([*range(prefix), *(P + i for i in indices)], np.int64)
    shape = [e.g.batch, len(rows), tokens.shape[-1]]
    index = e.g.unnamed_constant("rows", rows)
    return e.g.node("Gather", [tokens, index], shape=shape, name="gather", axis=1)


@precise
def dropped_weights(e: Emission, chosen: Chosen, scores: gs.Tensor | None) -> tuple[gs.Tensor, gs.Tensor]:
    """Return the scores of dropped tokens over all rows [B, 1, T], zero elsewhere, and their sum [B, 1, 1]."""
    assert scores is not None and chosen.indices is not None
    g, P = e.g, e.plan.config.num_prefix_tokens
    N, K = scores.shape[1], chosen.indices.shape[1]
    if K is None:
        zeros = g.zeros([g.batch, None], {1: (chosen.indices, 1)}, name="zeros")
    else:
        zeros = g.expand_batch(g.zeros([1, K]), scores, name="zeros")
    rest = g.node("ScatterElements", [scores, chosen.indices, zeros], shape=[g.batch, N], name="dropped", axis=1)
    rest = g.reshape(rest, [g.batch, 1, N], name="dropped_row")
    total = g.reduce("ReduceSum", rest, 2, keepdims=True, name="dropped_sum")
    return g.concat([g.expand_batch(g.zeros([1, 1, P]), scores, name="prefix_zeros"), rest], 2, name="weights"), total


def weighted_sum(e: Emission, weights: gs.Tensor, tokens: gs.Tensor, name: str) -> gs.Tensor:
    """Return weights [B, 1, T] times tokens [B, T, D]: [B, 1, D]."""
    return e.g.node("MatMul", [weights, tokens], shape=[e.g.batch, 1, tokens.shape[-1]], name=name)
