"""Standard operators only, as every engine and quantizer reads them.

MatMul and Add on [B, T, D], attention as two products and a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from edgeprune.export.emit.builder import GraphBuilder


def cut_patches(g: GraphBuilder, images: gs.Tensor, grid: Sequence[int], patch: Sequence[int]) -> gs.Variable:
    """Return images [B, C, H, W] by patches [B, rows, cols, C, ph, pw]."""
    (rows, cols), (ph, pw) = grid, patch
    x = g.reshape(images, [g.batch, images.shape[1], rows, ph, cols, pw], name="cut")
    return g.transpose(x, [0, 2, 4, 1, 3, 5], name="patches")


class PlainDialect:
    """The portable form, and the base other dialects override piece by piece.

    The residual stream ("rows") is [B, T, D] here; a dialect may hold it as [B*T, D]. `to_tokens` and `to_rows`
    convert. Numbers of tokens and queries are None where they are not constants.

    Args:
        precision: of the graph; what is emitted is float32, and `assign_types` writes the precision into it.
    """

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def to_tokens(self, g: GraphBuilder, rows: gs.Tensor, tokens: int | None) -> gs.Tensor:
        """Return rows as [B, T, D]."""
        return rows

    def to_rows(self, g: GraphBuilder, tokens: gs.Tensor) -> gs.Tensor:
        """Return [B, T, D] as the residual stream's layout."""
        return tokens

    def linear(
        self, g: GraphBuilder, name: str, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray | None, key: str
    ) -> gs.Tensor:
        """Return x W^T + b in the layout of x.

        Args:
            g: the graph that grows.
            name: of the node.
            x: [..., in].
            weight: [out, in] as torch stores it.
            bias: [out] or None.
            key: name of the weight; the bias is named after it.
        """
        shape = [*x.shape[:-1], weight.shape[0]]
        y = g.node("MatMul", [x, g.constant(f"{key}.weight.T", weight.T)], shape=shape, name=name)
        if bias is None:
            return y
        return g.node("Add", [y, g.constant(f"{key}.bias", bias)], shape=shape, name=f"{name}.add_bias")

    def layer_norm(
        self,
        g: GraphBuilder,
        name: str,
        x: gs.Tensor,
        weight: np.ndarray,
        bias: np.ndarray,
        eps: float,
        key: str,
    ) -> gs.Tensor:
        """Return LayerNorm over the last axis."""
        inputs = [x, g.constant(f"{key}.weight", weight), g.constant(f"{key}.bias", bias)]
        with g.precise():
            return g.node("LayerNormalization", inputs, shape=x.shape, name=name, axis=-1, epsilon=eps)

    def gelu(self, g: GraphBuilder, name: str, x: gs.Tensor) -> gs.Tensor:
        """Return the exact (erf) GELU."""
        if g.opset >= 20:
            return g.node("Gelu", [x], shape=x.shape, name=name)
        scaled = g.node("Div", [x, g.scalar(math.sqrt(2))], shape=x.shape, name=f"{name}.div")
        erf = g.node("Erf", [scaled], shape=x.shape, name=f"{name}.erf")
        one = g.node("Add", [erf, g.scalar(1.0)], shape=x.shape, name=f"{name}.one")
        half = g.node("Mul", [x, g.scalar(0.5)], shape=x.shape, name=f"{name}.half")
        return g.node("Mul", [half, one], shape=x.shape, name=name)

    def embed_patches(
        self, g: GraphBuilder, images: gs.Tensor, weight: np.ndarray, bias: np.ndarray, grid: Sequence[int]
    ) -> gs.Tensor:
        """Return [B, N, D] of images [B, C, H, W]; weight [D, C, ph, pw].

        One convolution, or a product of cut patches where the standard has no convolution of the precision.
        """
        D, C, ph, pw = weight.shape
        if self.precision == "bf16":
            patches = cut_patches(g, images, grid, (ph, pw))
            patches = g.reshape(patches, [g.batch, grid[0] * grid[1], C * ph * pw], name="flatten")
            return self.linear(g, "proj", patches, weight.reshape(D, -1), bias, "patch_embed.proj.flat")
        key = "patch_embed.proj"
        inputs = [images, g.constant(f"{key}.weight", weight), g.constant(f"{key}.bias", bias)]
        shape = [g.batch, D, *grid]
        maps = g.node("Conv", inputs, shape=shape, name="proj", kernel_shape=[ph, pw], strides=[ph, pw])
        flat = g.reshape(maps, [g.batch, D, grid[0] * grid[1]], name="flatten")
        return g.transpose(flat, [0, 2, 1])

    def convolve(
        self, g: GraphBuilder, name: str, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray, key: str, stride: int
    ) -> gs.Tensor:
        """Return the convolution of maps x [B, C, H, W], padded by half a kernel; sides are multiples of the stride."""
        out, _, *kernel = weight.shape
        shape = [g.batch, out, *(side // stride for side in x.shape[2:])]
        inputs = [x, g.constant(f"{key}.weight", weight), g.constant(f"{key}.bias", bias)]
        pads = [k // 2 for k in kernel] * 2
        with g.precise(self.precision == "bf16"):
            return g.node(
                "Conv", inputs, shape=shape, name=name, kernel_shape=kernel, strides=[stride, stride], pads=pads
            )

    def split_heads(self, g: GraphBuilder, name: str, x: gs.Tensor, heads: int, perm: Sequence[int]) -> gs.Tensor:
        """Return x [B, T, D] as [B, T, H, d] permuted."""
        _, T, D = x.shape
        return g.transpose(g.reshape(x, [g.batch, T, heads, D // heads], name=f"{name}.split"), perm, name=name)

    def keys(self, g: GraphBuilder, k: gs.Tensor, tokens: int | None, heads: int) -> gs.Tensor:
        """Return the keys in the form `attention` and `class_attention` share: [B, H, d, T]."""
        return self.split_heads(g, "k_heads", self.to_tokens(g, k, tokens), heads, [0, 2, 3, 1])

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
        """Return softmax(q k^T / sqrt(d) + bias) v in the layout of rows.

        Args:
            g: the graph that grows.
            q: in the layout of rows.
            keys: as `keys` returns them.
            v: in the layout of rows.
            counts: (queries, keys).
            heads: H.
            bias: [B, 1, 1, T], one for every key, or None.
        """
        queries, tokens = counts
        B, D = g.batch, q.shape[-1]
        q = self.split_heads(g, "q_heads", self.to_tokens(g, q, queries), heads, [0, 2, 1, 3])
        v = self.split_heads(g, "v_heads", self.to_tokens(g, v, tokens), heads, [0, 2, 1, 3])
        q = g.node("Mul", [q, g.scalar((D // heads) ** -0.5)], shape=q.shape, name="q_scaled")
        weights = self.softmax(g, g.node("MatMul", [q, keys], shape=[B, heads, queries, tokens], name="logits"), bias)
        context = g.node("MatMul", [weights, v], shape=[B, heads, queries, D // heads], name="context")
        merged = g.transpose(context, [0, 2, 1, 3], name="merge")
        return self.to_rows(g, g.reshape(merged, [B, queries, D], name="merged"))

    def matmul_transposed(self, g: GraphBuilder, name: str, a: gs.Tensor, b: gs.Tensor, scale: float) -> gs.Tensor:
        """Return scale * a b^T, [B, M, T] of a [B, M, D] and b [B, T, D]."""
        a = g.node("Mul", [a, g.scalar(scale)], shape=a.shape, name=f"{name}.scaled")
        b = g.transpose(b, [0, 2, 1], name=f"{name}.turned")
        return g.node("MatMul", [a, b], shape=[a.shape[0], a.shape[1], b.shape[2]], name=name)

    def softmax(self, g: GraphBuilder, logits: gs.Tensor, bias: gs.Tensor | None) -> gs.Tensor:
        """Return the softmax over keys of logits [..., T] plus a bias that broadcasts to them."""
        if bias is not None:
            logits = g.node("Add", [logits, bias], shape=logits.shape, name="biased")
        return g.node("Softmax", [logits], shape=logits.shape, name="softmax", axis=-1)

    def class_attention(
        self,
        g: GraphBuilder,
        q: gs.Tensor,
        keys: gs.Tensor,
        tokens: int | None,
        heads: int,
        bias: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """Return the CLS query's attention [B, H, T]; q is the query [B, 1, D], bias as in `attention`."""
        B, D = g.batch, q.shape[-1]
        q = g.reshape(q, [B, heads, 1, D // heads], name="heads")
        q = g.node("Mul", [q, g.scalar((D // heads) ** -0.5)], shape=q.shape, name="scaled")
        weights = self.softmax(g, g.node("MatMul", [q, keys], shape=[B, heads, 1, tokens], name="logits"), bias)
        return g.reshape(weights, [B, heads, tokens], name="by_head")

    def mean_attention(
        self,
        g: GraphBuilder,
        q: gs.Tensor,
        keys: gs.Tensor,
        tokens: int | None,
        heads: int,
        bias: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """Return the attention of every query, mean over heads, [B, T, T]; q in the layout of rows."""
        B, D = g.batch, q.shape[-1]
        q = self.split_heads(g, "q_split", self.to_tokens(g, q, tokens), heads, [0, 2, 1, 3])
        q = g.node("Mul", [q, g.scalar((D // heads) ** -0.5)], shape=q.shape, name="scaled")
        keys = self.turned_keys(g, keys, heads)
        weights = self.softmax(g, g.node("MatMul", [q, keys], shape=[B, heads, tokens, tokens], name="logits"), bias)
        return g.reduce("ReduceMean", weights, 1, keepdims=False, name="mean_over_heads")

    def turned_keys(self, g: GraphBuilder, keys: gs.Tensor, heads: int) -> gs.Tensor:
        """Return keys, as `keys` returns them, as [B, H, d, T]."""
        return keys

    def mean_keys(self, g: GraphBuilder, keys: gs.Tensor, heads: int) -> gs.Tensor:
        """Return the mean key over heads [B, T, d]; keys as `keys` returns them."""
        return g.transpose(g.reduce("ReduceMean", keys, 1, keepdims=False, name="mean_key"), [0, 2, 1])
