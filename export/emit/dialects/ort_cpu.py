"""The form measured fastest on ONNX Runtime's CPU provider (see benchmarks/README.md and DECISIONS.md).

Gemm on [B*T, D], MultiHeadAttention, erf Gelu, plain LayerNormalization and Add. SkipLayerNormalization and packed
attention are slower there and never emitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.builder import GraphBuilder
from edgeprune.export.emit.dialects.plain import PlainDialect, cut_patches

MICROSOFT = "com.microsoft"


class OrtCpuDialect(PlainDialect):
    """Rows are [B*T, D]."""

    def to_tokens(self, g: GraphBuilder, rows: gs.Tensor, tokens: int | None) -> gs.Tensor:
        """Return rows [B*T, D] as [B, T, D]."""
        return g.reshape(rows, [g.batch, tokens, rows.shape[-1]], name="tokens")

    def to_rows(self, g: GraphBuilder, tokens: gs.Tensor) -> gs.Tensor:
        """Return [B, T, D] as [B*T, D]."""
        B, T, D = tokens.shape
        return g.reshape(tokens, [B * T if isinstance(B, int) and isinstance(T, int) else None, D], name="rows")

    def linear(
        self, g: GraphBuilder, name: str, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray | None, key: str
    ) -> gs.Tensor:
        """Return one Gemm of x [rows, in]."""
        inputs = [x, g.constant(f"{key}.weight", weight)]
        if bias is not None:
            inputs.append(g.constant(f"{key}.bias", bias))
        return g.node("Gemm", inputs, shape=[x.shape[0], weight.shape[0]], name=name, transB=1)

    def gelu(self, g: GraphBuilder, name: str, x: gs.Tensor) -> gs.Tensor:
        """Return ONNX Runtime's exact GELU."""
        return g.node("Gelu", [x], shape=x.shape, name=name, domain=MICROSOFT)

    def embed_patches(
        self, g: GraphBuilder, images: gs.Tensor, weight: np.ndarray, bias: np.ndarray, grid: Sequence[int]
    ) -> gs.Tensor:
        """Return [B, N, D]: patches cut by a transpose, projected by one Gemm."""
        D, C, ph, pw = weight.shape
        (rows, cols), B = grid, g.batch
        x = cut_patches(g, images, grid, (ph, pw))
        count = B * rows * cols if isinstance(B, int) else None
        x = g.reshape(x, [count, C * ph * pw], name="flatten")
        x = self.linear(g, "proj", x, weight.reshape(D, -1), bias, "patch_embed.proj.flat")
        return g.reshape(x, [B, rows * cols, D], name="tokens")

    def keys(self, g: GraphBuilder, k: gs.Tensor, tokens: int | None, heads: int) -> gs.Tensor:
        """Return the keys [B, T, D]; heads stay merged."""
        return self.to_tokens(g, k, tokens)

    def attention(
        self,
        g: GraphBuilder,
        q: gs.Tensor,
        keys: gs.Tensor,
        v: gs.Tensor,
        counts: tuple[int | None, int | None],
        heads: int,
        bias: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """Return ONNX Runtime's fused attention."""
        queries, tokens = counts
        inputs = [self.to_tokens(g, q, queries), keys, self.to_tokens(g, v, tokens)]
        if bias is not None:  # the kernel wants one bias per query
            zeros = g.zeros([1, 1, queries, 1], {2: (inputs[0], 1)}, name="bias_zeros")
            bias = g.node("Add", [bias, zeros], shape=[g.batch, 1, queries, tokens], name="bias")
            inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]
        shape = [g.batch, queries, q.shape[-1]]
        context = g.node("MultiHeadAttention", inputs, shape=shape, name="context", domain=MICROSOFT, num_heads=heads)
        return self.to_rows(g, context)

    def matmul_transposed(self, g: GraphBuilder, name: str, a: gs.Tensor, b: gs.Tensor, scale: float) -> gs.Tensor:
        """Return scale * a b^T in one product that reads b as it lies."""
        shape = [a.shape[0], a.shape[1], b.shape[1]]
        return g.node("FusedMatMul", [a, b], shape=shape, name=name, domain=MICROSOFT, transB=1, alpha=scale)

    def turned_keys(self, g: GraphBuilder, keys: gs.Tensor, heads: int) -> gs.Tensor:
        """Return keys [B, T, D] as [B, H, d, T]."""
        return self.split_heads(g, "k_split", keys, heads, [0, 2, 3, 1])

    def mean_keys(self, g: GraphBuilder, keys: gs.Tensor, heads: int) -> gs.Tensor:
        """Return the mean key over heads [B, T, d]."""
        _, T, D = keys.shape
        split = g.reshape(keys, [g.batch, T, heads, D // heads], name="k_split")
        return g.reduce("ReduceMean", split, 2, keepdims=False, name="mean_key")

    def class_attention(
        self,
        g: GraphBuilder,
        q: gs.Tensor,
        keys: gs.Tensor,
        tokens: int | None,
        heads: int,
        bias: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """Return the CLS query's attention [B, H, T].

        The query is spread over a block-diagonal [H, D], so that the keys [B, T, D] are used as they are: splitting
        them into heads would cost a transpose larger than the product.
        """
        B, D = g.batch, q.shape[-1]
        diagonal = np.repeat(np.eye(heads, dtype=np.float32), D // heads, axis=1)[None]
        mask = g.constant(f"const.heads_{heads}_{D}", diagonal)
        spread = g.node("Mul", [q, mask], shape=[B, heads, D], name="spread")
        logits = self.matmul_transposed(g, "logits", spread, keys, (D // heads) ** -0.5)
        return self.softmax(g, logits, None if bias is None else g.reshape(bias, [B, 1, tokens], name="key_bias"))
