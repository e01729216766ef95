"""Plan to graph: walks the steps and asks the dialect to write each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit import outputs, parts, selection
from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.dialects.plain import PlainDialect
from edgeprune.export.plan import Block, Embed, Head, Plan, Restore, Select


@dataclass
class Emission:
    """What the parts share while a graph grows.

    Attributes:
        rows: the residual stream in the dialect's layout.
        tokens: rows per image, prefix included.
        ids: [B, N] int64 original patch number of each patch token, None until the first stage.
        kept: per stage the original patch numbers [B, K] int64, when the plan asks for token outputs.
        counts: per stage the tokens an image keeps [B] int32, None where it is the same for all images.
        valid: [B, N] bool, slots that hold a token; None when all do.
        size: [B, N] patches each token stands for; None until tokens are merged.
        key_bias: [B, 1, 1, T] added to the logits of every key, from `valid` and `size`; None for nothing.
        scores: by stage, what a block computed for the stage behind it.
        stash: dropped tokens [B, R, D] that come back.
    """

    plan: Plan
    g: GraphBuilder
    dialect: PlainDialect
    rows: gs.Tensor | None = None
    tokens: int = 0
    ids: gs.Tensor | None = None
    kept: list[gs.Tensor] = field(default_factory=list)
    counts: list[gs.Tensor | None] = field(default_factory=list)
    valid: gs.Tensor | None = None
    size: gs.Tensor | None = None
    key_bias: gs.Tensor | None = None
    scores: dict[int, gs.Tensor] = field(default_factory=dict)
    stash: list[gs.Tensor] = field(default_factory=list)

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
) -> gs.Graph:
    """Return the graph of a plan; selections are `edgeprune` nodes that a pass lowers.

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
    for step in plan.steps:
        EMIT[type(step)](e, step)
    logits = e.rows
    assert isinstance(logits, gs.Variable)
    logits.name = "logits"
    return g.graph([images], [logits, *outputs.token_outputs(e)])
