"""What the graph says of its choices: original patch numbers, counts, overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.gather import Chosen
from edgeprune.pruning.base import Constant, Reducer
from edgeprune.pruning.model import NO_PATCH_ID

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


def record(e: Emission, chosen: Chosen, count: gs.Tensor | None = None, valid: gs.Tensor | None = None) -> None:
    """Keep the original patch numbers of a stage [B, K] int64 for the token outputs, and its counts."""
    e.counts.append(count)
    if not e.plan.token_outputs:
        return
    g = e.g
    if chosen.indices is None:
        assert isinstance(chosen.stage.selector, Constant)
        indices = np.array([chosen.stage.selector.indices], np.int64)
        positions = g.expand_batch(g.unnamed_constant("positions", indices), chosen.kept, name="positions_batch")
    else:
        known = chosen.indices.dtype == np.int64
        positions = chosen.indices if known else g.cast(chosen.indices, np.int64, name="positions")
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
    int32; with an adaptive stage `overflow` [B] int32, 1 where a stage had too few slots. A graph that is told its
    numbers of slots does not know `overflow`, nor does the rest of one that is cut: whoever runs them does.
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
    if not adaptive and e.slots is not None:
        slots = g.reshape(g.cast(e.slots, np.int32, name="slots_int32"), [1, len(stages)], name="slots_row")
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
    if e.slots is not None or e.plan.split:
        return [*outputs, counts]
    over = g.node("Greater", [counts, slots], shape=shape, name="over", dtype=bool)
    over = g.node("Cast", [over], shape=shape, name="over_int", dtype=np.int32, to=6)
    over = g.reduce("ReduceMax", over, 1, keepdims=False, name="overflow")
    return [*outputs, counts, over]
