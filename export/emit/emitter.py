"""Plan to graph: walks the steps and asks the dialect to write each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit import outputs, parts, selection
from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.cut import cut_graph
from edgeprune.export.emit.dialects.plain import PlainDialect
from edgeprune.export.passes.assign_types import assign_types
from edgeprune.export.plan import Block, Counts, Embed, Head, Plan, Restore, Rows, Select, rows_count


@dataclass
class Emission:
    """What the parts share while a graph grows.

    Attributes:
        rows: the residual stream in the dialect's layout.
        tokens: rows per image, prefix included; None where the number is not a constant.
        ids: [B, N] int64 original patch number of each patch token, None until the first stage.
        kept: per stage the original patch numbers [B, K] int64, when the plan asks for token outputs.
        counts: per stage the tokens an image keeps [B] int32, None where it is the same for all images.
        valid: [B, N] bool, slots that hold a token; None when all do.
        size: [B, N] patches each token stands for; None until tokens are merged.
        key_bias: [B, 1, 1, T] added to the logits of every key, from `valid` and `size`; None for nothing.
        scores: by stage, what a block computed for the stage behind it.
        stash: dropped tokens [B, R, D] that come back.
        slots: the input [S] int64 that gives the number of tokens each stage keeps.
        cut: what the stem tells the router; nodes that read it belong to the rest.
    """

    plan: Plan
    g: GraphBuilder
    dialect: PlainDialect
    rows: gs.Tensor | None = None
    tokens: int | None = 0
    ids: gs.Tensor | None = None
    kept: list[gs.Tensor] = field(default_factory=list)
    counts: list[gs.Tensor | None] = field(default_factory=list)
    valid: gs.Tensor | None = None
    size: gs.Tensor | None = None
    key_bias: gs.Tensor | None = None
    scores: dict[int, gs.Tensor] = field(default_factory=dict)
    stash: list[gs.Tensor] = field(default_factory=list)
    slots: gs.Variable | None = None
    cut: list[gs.Variable] = field(default_factory=list)

    @property
    def symbolic(self) -> bool:
        """Whether the number of rows behind a stage is not a constant."""
        return self.plan.counts is not Counts.SLOTS

    @property
    def patches(self) -> int | None:
        """Patch tokens per image, None where the number is not a constant."""
        return None if self.tokens is None else self.tokens - self.plan.config.num_prefix_tokens

    def rows_of(self, step: Block, rows: Rows) -> int | None:
        """Return how many rows of one image a choice of rows means in a block, None when it is not a constant."""
        if self.symbolic and (rows is Rows.KEPT or (rows is Rows.ALL and self.tokens is None)):
            return None
        return rows_count(self.plan.config, step, rows)

    def pass_block(self, step: Block) -> None:
        """Take note of the rows that leave a block."""
        shortened = self.tokens is None or step.stage is not None
        unknown = self.symbolic and shortened and step.projected_rows is not Rows.HEAD
        self.tokens = None if unknown else step.tokens_out

    def linear(self, name: str, x: gs.Tensor, key: str, part: tuple[str, slice] | None = None) -> gs.Tensor:
        """Return the linear layer `key`, or a slice of its outputs named by `part`."""
        weight, bias = self.g.weights[f"{key}.weight"], self.g.weights.get(f"{key}.bias")
        if part is not None:
            label, rows = part
            key, weight, bias = f"{key}.{label}", weight[rows], None if bias is None else bias[rows]
        return self.dialect.linear(self.g, name, x, weight, bias, key)

    def layer_norm(self, name: str, x: gs.Tensor, key: str, eps: float) -> gs.Tensor:
        """Return the LayerNorm `key`."""
        weights = self.g.weights
        return self.dialect.layer_norm(self.g, name, x, weights[f"{key}.weight"], weights[f"{key}.bias"], eps, key)

    def as_tokens(self) -> gs.Tensor:
        """Return the stream as [B, T, D]."""
        return self.dialect.to_tokens(self.g, self.rows, self.tokens)


EMIT: dict[type, Callable[..., None]] = {
    Embed: parts.emit_embed,
    Select: selection.emit_select,
    Restore: selection.emit_restore,
    Block: parts.emit_block,
    Head: parts.emit_head,
}


def emit_graph(
    plan: Plan, dialect: PlainDialect, weights: Mapping[str, np.ndarray], *, name: str, opset: int
) -> tuple[gs.Graph, ...]:
    """Return the graph of a plan, or stem and rest of a split one; selections are `edgeprune` nodes that a pass lowers.

    Args:
        plan: after its passes.
        dialect: how parts are written.
        weights: state_dict of `PrunedViT` as arrays sharing the model's memory.
        name: graph name.
        opset: version of the standard operators.
    """
    config, (low, high) = plan.config, plan.batch
    g = GraphBuilder(name, opset, weights, batch=low if low == high else None)
    images = gs.Variable("images", np.float32, [g.batch, config.in_chans, *config.image_size])
    e = Emission(plan, g, dialect, rows=images)
    inputs = [images]
    if plan.counts is Counts.GIVEN and plan.stages:
        e.slots = gs.Variable("slots", np.int64, [len(plan.stages)])
        inputs.append(e.slots)
    for step in plan.steps:
        EMIT[type(step)](e, step)
    logits = e.rows
    assert isinstance(logits, gs.Variable)
    logits.name = "logits"
    graph = g.graph(inputs, [logits, *outputs.token_outputs(e)])
    graph = assign_types(graph, dialect.precision, g.precise_nodes)
    return cut_graph(graph, [*e.cut, *inputs[1:]]) if plan.split else (graph,)
