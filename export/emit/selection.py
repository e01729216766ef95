"""Stages in the graph: in front of a block, inside it, ahead of its queries; how each selector is lowered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from edgeprune.errors import InternalError
from edgeprune.export.emit.builder import precise
from edgeprune.export.emit.gather import (
    Chosen,
    dropped_weights,
    gather_also,
    gather_constant,
    keep_ranked,
    rank_all,
    topk_gather_node,
    weighted_sum,
)
from edgeprune.export.emit.merging import emit_merge
from edgeprune.export.emit.outputs import record
from edgeprune.export.emit.scores import Seen, emit_scores
from edgeprune.export.emit.slots import choose_slots, given_count
from edgeprune.export.plan import Block, Restore, Select, fuses
from edgeprune.pruning.adaptive import Slots
from edgeprune.pruning.base import Constant, Reducer, Stage, TopK
from edgeprune.pruning.tome import Bipartite

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


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
        e.rows, e.tokens = e.dialect.to_rows(e.g, kept), None if e.symbolic else step.tokens_out


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


@precise
def choose(e: Emission, stage: Stage, scores: gs.Tensor | None, tokens: gs.Tensor) -> Chosen:
    """Select from tokens [B, P+N, D] and record what was kept; slots and key bias of the emission follow."""
    K, selector = stage.counts.kept, stage.selector
    if isinstance(selector, Constant):
        chosen = Chosen(gather_constant(e, selector.indices, tokens, e.plan.config.num_prefix_tokens), stage, None)
    elif isinstance(selector, TopK) and e.slots is not None:
        assert scores is not None
        _, ranks = rank_all(e, scores)
        chosen = keep_ranked(e, stage, ranks, given_count(e, stage), tokens)
    elif isinstance(selector, TopK):
        ranked = topk_gather_node(e, scores, tokens, K)
        chosen = Chosen(ranked.kept, stage, ranked.indices)
    elif isinstance(selector, Slots):
        return choose_slots(e, stage, selector, scores, tokens)
    else:
        raise InternalError(f"no lowering for selector {type(selector).__name__}", code="no-lowering")
    record(e, chosen)
    return chosen
