"""A backbone with its stages in torch: the reference every exported graph is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.models.config import ViTConfig
from edgeprune.models.vit import Block, VisionTransformer
from edgeprune.pruning.base import Context, Needs, Reducer, Selection, Stage, Where

NO_PATCH_ID = -1  # of a fused token, which stands for no single patch, and of a slot without a token


@dataclass
class PrunedOutput:
    """Result of one forward pass.

    Attributes:
        logits: [B, classes].
        kept: per stage [B, K] int64, original patch number of every kept token; -1 for a fused token and for a slot
            past the image's count.
        counts: per stage [B] int64, tokens the image keeps; of an adaptive stage it may exceed the K slots.
        scores: per stage what the scorer gave, [B, N] float32 over the tokens that reached the stage; of a merging
            stage the metric [B, N, d].
        valid: per stage [B, N] bool, which of those were tokens; None when all were.
        inputs: per stage the sequence [B, P+N, D] that reached it, when asked for.
        tokens: [B, P+N, D] output of the last block, for heads of one's own.
        ids: [B, N] int64 original patch number of every patch token in `tokens`, -1 as above.
    """

    logits: Tensor
    kept: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    valid: list[Tensor | None] = field(default_factory=list)
    inputs: list[Tensor] | None = None
    tokens: Tensor | None = None
    ids: Tensor | None = None

    @property
    def overflow(self) -> Tensor:
        """[B] bool: a stage had fewer slots than the image has tokens to keep; its logits are not the method's."""
        over = [count > kept.shape[1] for count, kept in zip(self.counts, self.kept, strict=True)]
        return torch.stack(over).any(0) if over else torch.zeros(len(self.logits), dtype=torch.bool)

    def dense_tokens(self, num_prefix_tokens: int) -> Tensor:
        """Return the patch tokens [B, N, D] of the last block in the order of the patches, for dense prediction.

        Raises:
            ValueError: a patch is missing, because the method drops tokens for good.
        """
        assert self.tokens is not None and self.ids is not None
        order = inverse_permutation(self.ids)
        return self.tokens[:, num_prefix_tokens:].gather(1, order.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1]))


def inverse_permutation(ids: Tensor) -> Tensor:
    """Return [B, N] int64: where patch 0, 1, ... stands in a sequence of patches `ids` [B, N].

    Raises:
        ValueError: when `ids` is not a permutation.
    """
    if not torch.equal(ids.sort(1).values, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)):
        raise ValueError("the sequence does not hold every patch once")
    return ids.argsort(1)


@dataclass
class Stream:
    """The sequence on its way through the blocks.

    Attributes:
        x: [B, P+N, D].
        ids: [B, N] original patch number of each patch token.
        valid: [B, N] bool, slots that hold a token; None when all do.
        size: [B, N] patches each token stands for; None until tokens are merged.
        weigh_keys: attention counts a token as often as its size says (proportional attention).
        stash: dropped tokens that come back, with their numbers.
    """

    x: Tensor
    ids: Tensor
    valid: Tensor | None = None
    size: Tensor | None = None
    weigh_keys: bool = False
    stash: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def key_bias(self, num_prefix_tokens: int) -> Tensor | None:
        """Return what is added to the logits of every key, [B, 1, 1, P+N], or None."""
        bias = None
        if self.size is not None and self.weigh_keys:
            bias = self.size.log()
        if self.valid is not None:
            bias = (self.x.new_zeros(self.valid.shape) if bias is None else bias).masked_fill(~self.valid, -torch.inf)
        return None if bias is None else F.pad(bias, (num_prefix_tokens, 0))[:, None, None]


class PrunedViT(VisionTransformer):
    """A ViT that drops tokens at its stages.

    Weights keep timm's keys; the weights of a stage live under `prune.<index>.`. Tokens are gathered; of adaptive
    stages the slots that hold no token are hidden from every attention, so an image's logits never depend on its
    batch, unless the method asks for counts of the batch.

    Args:
        config: the backbone.
        stages: in execution order; empty gives the dense model.
    """

    ranges_of_batch = False  # quantized layers take theirs over all images they are called with

    def __init__(self, config: ViTConfig, stages: Sequence[Stage] = ()) -> None:
        super().__init__(config)
        self.stages = tuple(stages)
        self.prune = nn.ModuleDict()
        for stage in self.stages:
            module = stage.scorer.build(config)
            if module is not None:
                self.prune[str(stage.index)] = module

    @property
    def exact_in_batch(self) -> bool:
        """Whether an image's logits are the same in every batch."""
        return not self.ranges_of_batch and all(stage.selector.exact_in_batch for stage in self.stages)

    def scorer_module(self, stage: Stage) -> nn.Module | None:
        """Return the module that holds a stage's weights, or None when it has none."""
        return dict(self.prune.items()).get(str(stage.index))

    def with_stages(self, stages: Sequence[Stage]) -> PrunedViT:
        """Return a model of the same weights with other stages, whose weights this one must have."""
        other = copy.copy(self)
        other.stages = tuple(stages)
        return other

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalised images [B, C, H, W]."""
        return self.run(images).logits

    def run(self, images: Tensor, *, keep_inputs: bool = False) -> PrunedOutput:
        """Return logits and, per stage, the kept tokens and their scores."""
        x = self.embed(images)
        s = Stream(x, torch.arange(self.config.num_patches, device=x.device).expand(len(x), -1))
        out = PrunedOutput(logits=x, inputs=[] if keep_inputs else None)
        at = {(stage.block, stage.where): stage for stage in self.stages}
        seen = Context(x)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if i == len(self.blocks) - 1:
                restore(s)
            if before := at.get((i, Where.PRE_BLOCK)):
                self.reduce(before, s, seen, out)
            ahead = at.get((i + 1, Where.PRE_BLOCK))
            seen = self.step(block, s, at.get((i, Where.MID_BLOCK)), ahead, out)
        out.tokens, out.ids = s.x, s.ids
        out.logits = self.classify(s.x, s.valid if s.size is None else s.size)
        return out

    def step(self, block: Block, s: Stream, inside: Stage | None, ahead: Stage | None, out: PrunedOutput) -> Context:
        """Pass the stream through a block with a stage inside or without; return what a stage `ahead` of it reads."""
        P = self.config.num_prefix_tokens
        needs = frozenset[Needs]().union(*(stage.scorer.needs for stage in (inside, ahead) if stage is not None))
        q, k, v = block.attn.heads(block.norm1(s.x))
        bias = s.key_bias(P)
        seen = self.observe(block, q, k, v, s.valid, bias, needs)
        if inside is not None and inside.reducer is Reducer.DROP and Needs.CONTEXT not in needs:
            positions = self.reduce(inside, s, seen, out)  # what is dropped asks nothing and is not computed
            rows = F.pad(positions + P, (P, 0))
            rows[:, :P] = torch.arange(P, device=rows.device)
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
            inside = None
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if Needs.CONTEXT in needs:
            seen.context = context[:, :, P:]
        s.x = block.add_attention(s.x, block.attn.merge(context))
        if inside is not None:
            self.reduce(inside, s, seen, out)
        s.x = block.add_mlp(s.x)
        return seen

    def observe(
        self,
        block: Block,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        bias: Tensor | None,
        needs: frozenset[Needs],
    ) -> Context:
        """Return what scorers need of an attention; `tokens` and `context` are filled in later."""
        P = self.config.num_prefix_tokens
        seen = Context(tokens=q, valid=valid)
        if Needs.CLASS_ATTENTION in needs:
            seen.class_attention = block.attn.probabilities(q[:, :, :1], k, bias=bias)[:, :, 0, P:]
        if Needs.MEAN_ATTENTION in needs:
            received = block.attn.probabilities(q, k, bias=bias).mean(1)
            asks = None if valid is None else F.pad(valid, (P, 0), value=True).to(received.dtype)
            mean = received.mean(1) if asks is None else (asks[:, None] @ received)[:, 0] / asks.sum(1, keepdim=True)
            seen.mean_attention = mean[:, P:]
        if Needs.KEYS in needs:
            seen.keys = k[:, :, P:]
        if Needs.VALUES in needs:
            seen.values = v[:, :, P:]
        return seen

    def reduce(self, stage: Stage, s: Stream, seen: Context, out: PrunedOutput) -> Tensor:
        """Shorten the stream by a stage and return the positions [B, K] int64 of the tokens that stay."""
        P, module = self.config.num_prefix_tokens, self.scorer_module(stage)
        patches = s.x[:, P:]
        seen.tokens, seen.valid = patches, s.valid
        scores = stage.scorer.score(seen, module)
        chosen = stage.selector.select(scores, s.valid, module)
        if out.inputs is not None:
            out.inputs.append(s.x)
        out.scores.append(scores)
        out.valid.append(s.valid)
        if stage.reducer is Reducer.MERGE:
            self.merge(stage, s, scores, chosen, out)
            return chosen.positions
        kept, ids = take(patches, chosen.positions), s.ids.gather(1, chosen.positions)
        valid = None
        if stage.selector.adaptive and not stage.selector.fill:
            slots = torch.arange(ids.shape[1], device=ids.device)
            valid = slots < chosen.counts[:, None]
            ids = ids.masked_fill(~valid, NO_PATCH_ID)
        out.kept.append(ids)
        out.counts.append(chosen.counts)
        parts = [s.x[:, :P], kept]
        if stage.reducer is Reducer.FUSE:
            parts.append(scores.scatter(1, chosen.positions, 0.0).unsqueeze(1) @ patches)
            ids = torch.cat([ids, ids.new_full((len(ids), 1), NO_PATCH_ID)], 1)
        elif stage.reducer is Reducer.STASH:
            stay = torch.zeros_like(s.ids, dtype=torch.bool).scatter(1, chosen.positions, True)
            rest = stay.to(torch.int8).argsort(dim=1, stable=True)[:, : s.ids.shape[1] - ids.shape[1]]
            s.stash.append((take(patches, rest), s.ids.gather(1, rest)))
        s.x, s.ids, s.valid = torch.cat(parts, 1), ids, valid
        return chosen.positions

    def merge(self, stage: Stage, s: Stream, metric: Tensor, chosen: Selection, out: PrunedOutput) -> None:
        """Average every token that goes into its destination, weighted by size."""
        from edgeprune.pruning.tome import Bipartite, merge_tokens

        assert isinstance(stage.selector, Bipartite)
        P = self.config.num_prefix_tokens
        size = torch.ones_like(s.ids, dtype=s.x.dtype) if s.size is None else s.size
        patches, s.size = merge_tokens(stage.selector.pair(metric), s.x[:, P:], size)
        s.x, s.ids = torch.cat([s.x[:, :P], patches], 1), s.ids.gather(1, chosen.positions)
        s.weigh_keys = stage.selector.weigh_keys
        out.kept.append(s.ids)
        out.counts.append(chosen.counts)


def take(patches: Tensor, positions: Tensor) -> Tensor:
    """Return the rows [B, K, D] of patches [B, N, D] at positions [B, K]."""
    return patches.gather(1, positions.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def restore(s: Stream) -> None:
    """Bring every stashed token back behind the kept ones, each as it was when it was dropped."""
    if s.stash:
        s.x = torch.cat([s.x, *(tokens for tokens, _ in s.stash)], 1)
        s.ids = torch.cat([s.ids, *(ids for _, ids in s.stash)], 1)
        s.stash.clear()
