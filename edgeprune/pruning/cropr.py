"""Token Cropr: behind every block a learned query scores the tokens and R of them go; the last block sees all again.

Source: Token Cropr (arXiv 2412.00965) section 3 and its official code (MIT). While training, each module also
aggregates the tokens and solves the task on its own, behind a stop-gradient; for inference only the sum of its queries
is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.pruning.base import (
    Context,
    Method,
    MethodOption,
    Needs,
    Reducer,
    Schedule,
    Scorer,
    Stage,
    StageRequest,
    TopK,
    Where,
)
from edgeprune.pruning.counts import StageCounts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class QueryScorer(Scorer):
    """Product of a token with the sum of the module's queries; neither scaled nor normed.

    Attributes:
        queries: learned queries of a module; 1 for classification.
        training: build the aggregator and the auxiliary head too.
    """

    queries: int = 1
    training: bool = False

    needs = frozenset({Needs.TOKENS})

    def build(self, config: ViTConfig) -> nn.Module:
        """Return the module, keys as in the official code."""
        from edgeprune.pruning.cropr_module import CroprModule

        return CroprModule(config, self.queries, training_parts=self.training)

    def macs(self, config: ViTConfig, tokens: int) -> int:
        """N * D."""
        return tokens * config.embed_dim

    def score(self, context: Context, module: nn.Module | None) -> Tensor:
        """Return scores [B, N]."""
        from edgeprune.pruning.cropr_module import CroprModule

        assert isinstance(module, CroprModule)
        return module.score(context.tokens).float()


def default_blocks(config: ViTConfig, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return every block but the first, and with last-layer fusion but the last, which sees all tokens."""
    return tuple(range(1, config.depth - bool(options["llf"])))


def schedule(config: ViTConfig, request: StageRequest, options: Mapping[str, Any]) -> Schedule:
    """Return the blocks and counts: the first stage removes one token more than the others.

    Raises:
        InputError: `method-option` when too many tokens would go, `stages` for a stage in front of the last block with
            last-layer fusion.
    """
    blocks, R = METHOD.blocks(config, request, options), options["tokens_per_block"]
    if options["llf"] and config.depth - 1 in blocks:
        raise InputError(
            f"a stage in front of the last block, {config.depth - 1}, has no effect: with llf=true that block sees all "
            "tokens",
            code="stages",
            expected=f"block indices up to {config.depth - 2}",
            hint="leave it out, or add --method-option llf=false",
        )
    counts, tokens = [], config.num_patches
    for s in range(len(blocks)):
        kept = tokens - R - (s == 0)
        if kept < 1:
            raise InputError(
                f"tokens_per_block={R} leaves no token at stage {s} of {len(blocks)}",
                code="method-option",
                expected=f"at most {max(1, (config.num_patches - 2) // len(blocks))} for {config.num_patches} tokens",
                hint="use a smaller tokens_per_block, or fewer --stages",
            )
        counts.append(StageCounts(tokens, kept))
        tokens = kept
    return blocks, tuple(counts)


def make_stages(
    config: ViTConfig, blocks: Sequence[int], counts: Sequence[StageCounts], options: Mapping[str, Any]
) -> list[Stage]:
    """Return one stage in front of each block."""
    reducer = Reducer.STASH if options["llf"] else Reducer.DROP
    scorer = QueryScorer(options["queries"])
    return [
        Stage(block, Where.PRE_BLOCK, scorer, TopK(c.kept), reducer, c) for block, c in zip(blocks, counts, strict=True)
    ]


METHOD = Method(
    name="cropr",
    summary="a learned query per block ranks the tokens, R go in front of every block; the last block sees all again",
    source="arXiv 2412.00965",
    rule=None,
    make_stages=make_stages,
    schedule=schedule,
    default_blocks=default_blocks,
    options=(
        MethodOption("tokens_per_block", int, 8, "R, tokens removed at every stage; one more at the first", least=1),
        MethodOption("llf", bool, True, "last-layer fusion: removed tokens come back for the last block"),
        MethodOption("queries", int, 1, "learned queries of a module, as in the checkpoint", least=1),
    ),
    key_prefixes={"cropr.": "prune."},
    training_keys=r"^(cropr|prune)\.\d+\.(cross_attn\.mlp|head\.)",
    notes=(
        "follows the released code (MIT) for classification; scores are taken from the sum of the queries, which ranks "
        "as all queries do",
        "fewer --stages with a larger R are our option for latency at batch 1, not in the paper",
        "dense heads: the model returns token numbers and every token of the last block (`PrunedOutput.dense_tokens`); "
        "no dense head is built",
    ),
)
