"""Nodes that take tokens out of a sequence: the `edgeprune` ops, constant positions, what becomes of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.ops import DOMAIN, PLUGIN_FIELDS, topk_gather
from edgeprune.pruning.base import Constant, Stage

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


@dataclass
class Chosen:
    """The outcome of a selection: kept rows [B, P+K, D] and their positions, [B, K] int32 or constant."""

    kept: gs.Tensor
    stage: Stage
    indices: gs.Tensor | None


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
