"""The parts of the backbone: embedding, block, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit import selection
from edgeprune.export.emit.builder import precise
from edgeprune.export.emit.scores import Seen
from edgeprune.export.plan import Block, Embed, Head, Rows
from edgeprune.models.config import AUX_WEIGHT, BATCH_NORM_EPS, STEM_CONVOLUTIONS

if TYPE_CHECKING:
    from edgeprune.export.emit.emitter import Emission


def emit_embed(e: Emission, step: Embed) -> None:
    """Patches, prefix tokens, position embeddings."""
    g, config, weights = e.g, e.plan.config, e.g.weights
    P = config.num_prefix_tokens
    pos = weights["pos_embed"]
    pos_prefix, pos_patches = (0.0, pos) if config.no_embed_class else (pos[:, :P], pos[:, P:])
    with g.scope("patch_embed"):
        proj = (weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"])
        maps = emit_stem(e, e.rows) if config.stem == "lvvit" else e.rows
        x = e.dialect.embed_patches(g, maps, *proj, config.grid)
        x = g.node("Add", [x, g.constant("pos_embed.patches", pos_patches)], shape=x.shape, name="pos")
        if P:
            names = [name for name in ("cls_token", "dist_token", "reg_token") if name in weights]
            prefix = np.concatenate([weights[name] for name in names], axis=1) + pos_prefix
            x = g.concat([g.expand_batch(g.constant("prefix", prefix), e.rows, name="prefix"), x], 1, name="tokens")
    e.tokens = step.tokens
    e.rows = e.dialect.to_rows(g, x)


def emit_stem(e: Emission, images: gs.Tensor) -> gs.Tensor:
    """The convolutions in front of the patch projection: maps [B, STEM_WIDTH, H / 2, W / 2] of images."""
    x = images
    for i, (_, stride) in enumerate(STEM_CONVOLUTIONS, 1):
        weight, bias = folded_batch_norm(e, f"patch_embed.conv{i}", f"patch_embed.bn{i}")
        x = e.dialect.convolve(e.g, f"conv{i}", x, weight, bias, f"patch_embed.conv{i}", stride)
        x = e.g.node("Relu", [x], shape=x.shape, name=f"relu{i}")
    return x


def folded_batch_norm(e: Emission, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [out, in, kh, kw] and bias [out] of a convolution with the BatchNorm behind it folded in."""
    weights = e.g.weights
    gain, shift, mean, variance = (
        weights[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + BATCH_NORM_EPS)
    weight = weights[f"{conv}.weight"] * scale[:, None, None, None]
    return weight.astype(np.float32), (shift - mean * scale).astype(np.float32)


def emit_block(e: Emission, step: Block) -> None:
    """One transformer block; keys and values for all rows, the rest only for the rows the plan asks for."""
    config, block = e.plan.config, f"blocks.{step.index}"
    with e.g.scope(block):
        normed = e.layer_norm("norm1", e.rows, f"{block}.norm1", config.norm_eps)
        if step.folded:
            x, queries = (first_rows(e, rows, config.num_head_tokens) for rows in (e.rows, normed))
            emit_rest(e, step, x, emit_folded_attention(e, step, queries, normed))
            return
        bias = e.key_bias
        keys = e.dialect.keys(e.g, project(e, step, normed, "k"), e.tokens, config.num_heads)
        values = project(e, step, normed, "v")
        seen = Seen(e.rows, normed, keys, values, block=step.index)
        x, queries = e.rows, normed
        if step.query_rows is Rows.HEAD:
            x, queries = (first_rows(e, rows, config.num_head_tokens) for rows in (x, queries))
        elif step.query_rows is Rows.KEPT:
            x, queries = selection.emit_keep(e, step, [x, queries], seen)
        counts = (e.rows_of(step, step.query_rows), e.tokens)
        seen.queries = project(e, step, queries, "q")
        with e.g.scope("attn"):
            context = e.dialect.attention(e.g, seen.queries, keys, values, counts, config.num_heads, bias)
        seen.context = context
        if step.scores_for is not None:
            selection.emit_scores_ahead(e, step.scores_for, seen)
        if step.stage is not None and step.query_rows is Rows.ALL and step.projected_rows is Rows.KEPT:
            x, context = selection.emit_keep_before_projection(e, step, x, seen)
        emit_rest(e, step, x, context, seen)


def emit_rest(
    e: Emission,
    step: Block,
    x: gs.Tensor,
    context: gs.Tensor,
    seen: Seen | None = None,
) -> None:
    """What follows the attention product: projection, residual, a stage on all rows, MLP."""
    block = f"blocks.{step.index}"
    x = add(e, x, branch(e, "attn.proj", context, f"{block}.attn.proj", f"{block}.ls1.gamma"), "attn.residual")
    if step.stage is not None and step.projected_rows is Rows.ALL:
        assert seen is not None
        x = selection.emit_mid_block(e, step, x, seen)
    e.pass_block(step)
    h = e.layer_norm("norm2", x, f"{block}.norm2", e.plan.config.norm_eps)
    h = e.dialect.gelu(e.g, "mlp.gelu", e.linear("mlp.fc1", h, f"{block}.mlp.fc1"))
    e.rows = add(e, x, branch(e, "mlp.fc2", h, f"{block}.mlp.fc2", f"{block}.ls2.gamma"), "mlp.residual")


def emit_folded_attention(e: Emission, step: Block, queries: gs.Tensor, normed: gs.Tensor) -> gs.Tensor:
    """Attention of the classifier's rows over all rows without keys and values; see `fold_keys_and_values`.

    Args:
        e: the graph that grows.
        step: the block.
        queries: normed rows that ask, R = batch * num_head_tokens of them.
        normed: all normed rows.

    Returns:
        what the output projection takes, in the layout of rows.
    """
    g, dialect, config = e.g, e.dialect, e.plan.config
    D, H, d, P = config.embed_dim, config.num_heads, config.head_dim, config.num_head_tokens
    R = g.batch * P if isinstance(g.batch, int) else None
    key = f"blocks.{step.index}.attn.qkv"
    weight, bias = g.weights[f"{key}.weight"].reshape(3, H, d, D), g.weights.get(f"{key}.bias")

    def by_head(x: gs.Tensor, width: int, name: str) -> gs.Tensor:
        """[.., H * width] -> [H, R, width]."""
        return g.transpose(g.reshape(x, [R, H, width], name=f"{name}.split"), [1, 0, 2], name=name)

    q = project(e, step, queries, "q")
    with g.scope("attn"):
        tokens = dialect.to_tokens(g, normed, e.tokens)
        q = by_head(q, d, "q_by_head")
        folded = g.node("MatMul", [q, g.constant(f"{key}.k.by_head", weight[1])], shape=[H, R, D], name="q_folded")
        folded = g.reshape(g.transpose(folded, [1, 0, 2], name="q_rows"), [g.batch, P * H, D], name="q_tokens")
        logits = dialect.matmul_transposed(g, "logits", folded, tokens, d**-0.5)
        key_bias = None if e.key_bias is None else g.reshape(e.key_bias, [g.batch, 1, e.tokens], name="key_bias")
        weights = dialect.softmax(g, logits, key_bias)
        mixed = g.node("MatMul", [weights, tokens], shape=[g.batch, P * H, D], name="mixed")
        mixed = by_head(mixed, D, "mixed_by_head")
        value_weight = g.constant(f"{key}.v.by_head", weight[2].transpose(0, 2, 1))
        context = g.node("MatMul", [mixed, value_weight], shape=[H, R, d], name="values")
        context = g.reshape(g.transpose(context, [1, 0, 2], name="merge"), [g.batch, P, D], name="merged")
        if bias is not None:
            context = g.node(
                "Add", [context, g.constant(f"{key}.v.bias", bias[2 * D :])], shape=context.shape, name="bias"
            )
        return dialect.to_rows(g, context)


def emit_head(e: Emission, step: Head) -> None:
    """Final norm, pooling, classifier; leaves the logits [B, classes] in `e.rows`."""
    g, config = e.g, e.plan.config
    norm = "fc_norm" if config.fc_norm else "norm"
    pooled = [g.batch, config.embed_dim]
    with g.scope("head"):
        if config.global_pool == "avg":
            rows = e.rows if config.fc_norm else e.layer_norm("norm", e.rows, norm, config.norm_eps)
            x = average(e, e.dialect.to_tokens(g, rows, e.tokens))
            x = e.layer_norm("norm", x, norm, config.norm_eps) if config.fc_norm else x
            e.rows = e.linear("logits", x, "head")
            return
        if config.aux_head:
            x = e.dialect.to_tokens(g, e.layer_norm("norm", e.rows, norm, config.norm_eps), e.tokens)
            cls = g.reshape(g.slice(x, 1, 0, 1, name="cls_row"), pooled, name="cls")
            e.rows = add(e, e.linear("logits_cls", cls, "head"), best_token(e, x), "logits")
            return
        rows = e.rows if e.tokens == config.num_head_tokens else first_rows(e, e.rows, config.num_head_tokens)
        x = e.dialect.to_tokens(g, e.layer_norm("norm", rows, norm, config.norm_eps), config.num_head_tokens)
        cls = g.reshape(g.slice(x, 1, 0, 1, name="cls_row"), pooled, name="cls")
        e.rows = e.linear("logits", cls, "head")
        if config.distilled:
            dist = g.reshape(g.slice(x, 1, 1, 2, name="dist_row"), pooled, name="dist")
            total = add(e, e.rows, e.linear("logits_dist", dist, "head_dist"), "sum")
            e.rows = g.node("Mul", [total, g.scalar(0.5)], shape=total.shape, name="mean")


def average(e: Emission, tokens: gs.Tensor) -> gs.Tensor:
    """Return the mean [B, D] of the tokens [B, T, D] that are pooled: those an image has, weighted by size."""
    g, config = e.g, e.plan.config
    P, prefix_too = config.num_prefix_tokens, config.pool_include_prefix
    pooled = g.slice(tokens, 1, 0 if prefix_too else P, e.tokens, name="patches")
    if e.valid is None and e.size is None:
        if e.tokens is not None:
            return g.reduce("ReduceMean", pooled, 1, keepdims=False, name="pool")
        number = g.cast(g.length(pooled, 1, name="number"), np.float32, name="number_float")  # 0 where nothing stays
        number = g.node("Max", [number, g.scalar(1.0)], shape=[1], name="number_or_one")
        with g.precise():
            total = g.reduce("ReduceSum", pooled, 1, keepdims=False, name="pool_sum")
            return g.node("Div", [total, number], shape=total.shape, name="pool")
    share_row = pooled_shares(e, pooled)
    pooled = g.node("MatMul", [share_row, pooled], shape=[g.batch, 1, config.embed_dim], name="pool")
    return g.reshape(pooled, [g.batch, config.embed_dim], name="pooled")


@precise
def pooled_shares(e: Emission, pooled: gs.Tensor) -> gs.Tensor:
    """Return the share of each pooled token in the mean, [B, 1, tokens]."""
    g, P, share = e.g, e.plan.config.num_prefix_tokens, e.size
    if share is None:
        share = g.node("Cast", [e.valid], shape=[g.batch, e.patches], name="share", to=1)
    if e.plan.config.pool_include_prefix:
        ones = g.constant(f"const.ones_{P}", np.ones((1, P), np.float32))
        share = g.concat([g.expand_batch(ones, share, name="prefix_share"), share], 1, name="shares")
    total = g.reduce("ReduceSum", share, 1, keepdims=True, name="total")
    total = g.node("Max", [total, g.scalar(1.0)], shape=total.shape, name="total_or_one")
    share = g.node("Div", [share, total], shape=share.shape, name="normalised")
    return g.reshape(share, [g.batch, 1, pooled.shape[1]], name="share_row")


@precise
def best_token(e: Emission, tokens: gs.Tensor) -> gs.Tensor:
    """Return what the aux head adds to the logits [B, classes]: its weighted maximum over the patches of [B, T, D]."""
    g, P = e.g, e.plan.config.num_prefix_tokens
    patches = e.dialect.to_rows(g, g.slice(tokens, 1, P, e.tokens, name="patches"))
    with g.precise(False):
        logits = e.linear("token_logits", patches, "aux_head")
    scores = e.dialect.to_tokens(g, logits, e.patches)
    if e.valid is not None:
        there = g.reshape(e.valid, [g.batch, e.patches, 1], name="there", dtype=bool)
        scores = g.node("Where", [there, scores, g.scalar(-3e38)], shape=scores.shape, name="token_logits_there")
    if e.tokens is None:
        nothing = g.constant("const.no_token_logits", np.full((1, 1, scores.shape[2]), -3e38, np.float32))
        scores = g.concat(
            [scores, g.expand_batch(nothing, scores, name="no_token_row")], 1, name="token_logits_or_none"
        )
    best = g.reduce("ReduceMax", scores, 1, keepdims=False, name="best_token")
    if e.valid is not None or e.tokens is None:  # an image without a token gets nothing added
        none = g.node("Less", [best, g.scalar(-2e38)], shape=best.shape, name="no_token", dtype=bool)
        best = g.node("Where", [none, g.scalar(0.0), best], shape=best.shape, name="best_token_or_none")
    return g.node("Mul", [best, g.scalar(AUX_WEIGHT)], shape=best.shape, name="best_token_weighted")


def project(e: Emission, step: Block, x: gs.Tensor, which: str) -> gs.Tensor:
    """Return the query, key or value projection ("q", "k", "v") of normed rows."""
    D, at = e.plan.config.embed_dim, "qkv".index(which)
    part = (which, slice(at * D, (at + 1) * D))
    return e.linear(f"attn.{which}", x, f"blocks.{step.index}.attn.qkv", part)


def branch(e: Emission, name: str, x: gs.Tensor, key: str, gamma: str) -> gs.Tensor:
    """Return the linear layer that ends a branch, the layer scale or residual scale folded into it."""
    weight, bias = branch_weights(e, key, gamma)
    return e.dialect.linear(e.g, name, x, weight, bias, key)


def branch_weights(e: Emission, key: str, gamma: str) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of the layer that ends a branch, scaled by the layer or residual scale if there is one."""
    weight, bias, scale = e.g.weights[f"{key}.weight"], e.g.weights[f"{key}.bias"], e.g.weights.get(gamma)
    if e.plan.config.residual_scale != 1:
        divisor = np.float32(e.plan.config.residual_scale)
        return weight / divisor, bias / divisor
    return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)


def first_rows(e: Emission, rows: gs.Tensor, count: int) -> gs.Tensor:
    """Return the first rows of every image in the layout of the stream."""
    tokens = e.dialect.to_tokens(e.g, rows, e.tokens)
    return e.dialect.to_rows(e.g, e.g.slice(tokens, 1, 0, count, name="first_rows"))


def add(e: Emission, a: gs.Tensor, b: gs.Tensor, name: str) -> gs.Tensor:
    """Return a + b, equal shapes."""
    return e.g.node("Add", [a, b], shape=a.shape, name=name)
