"""The plan: a pruned model as a short list of typed steps, small enough to print.

Every step says how many rows reach it and which rows anybody reads afterwards; passes narrow the second. Multiply-
accumulates are counted from the same steps the graph is made of; a scorer counts as its paper counts it. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from edgeprune.models.config import ViTConfig
from edgeprune.models.macs import embed_macs, head_macs
from edgeprune.pruning.base import Needs, Reducer, Stage, Where
from edgeprune.pruning.counts import StageCounts


class Counts(str, Enum):
    """Where a graph takes the number of rows that leave a stage from."""

    SLOTS = "slots"  # constants: as many as an image may need; what it does not need is hidden
    COMPUTED = "computed"  # the scores of the one image of the batch
    GIVEN = "given"  # the input `slots`, int64 [stages]


class Rows(str, Enum):
    """Which rows of a block's output are computed."""

    ALL = "all"
    KEPT = "kept"  # prefix and the tokens the block's own stage keeps
    HEAD = "head"  # what the classifier reads


@dataclass(frozen=True)
class Embed:
    """Patches to tokens, prefix and position embeddings."""

    tokens: int


@dataclass(frozen=True)
class Select:
    """A stage in front of a block: scores, selection, shorter sequence.

    A stage that ranks by attention takes the scores the block before has computed.
    """

    stage: Stage
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Restore:
    """Stashed tokens come back behind the kept ones."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Block:
    """A transformer block, with a stage between attention and MLP or without.

    Attributes:
        stage: the stage applied inside the block; dead-row elimination also moves one from behind the block here.
        scores_for: the stage behind the block whose scores this block's attention gives.
        tokens_in: rows that reach the block; keys and values are computed for all of them.
        tokens_out: rows that leave it.
        query_rows: rows whose query and attention output are computed.
        projected_rows: rows that pass the output projection; the MLP sees these, or what the stage leaves of them.
        folded: few queries read all rows, so the key and value projections are applied to the queries and to the
            weighted sums instead of to every row.
    """

    index: int
    tokens_in: int
    tokens_out: int
    stage: Stage | None = None
    scores_for: Stage | None = None
    query_rows: Rows = Rows.ALL
    projected_rows: Rows = Rows.ALL
    folded: bool = False


@dataclass(frozen=True)
class Head:
    """Final norm, pooling and classifier."""

    tokens_in: int


Step = Embed | Select | Restore | Block | Head


@dataclass(frozen=True)
class Plan:
    """Everything the emitter needs besides weights and dialect.

    Attributes:
        batch: smallest and largest batch; equal for a fixed one.
        token_outputs: the graph also returns what each stage kept.
        counts: where the number of rows behind a stage comes from; unless constant, the steps say how many at most.
        split: the graph is to be cut behind the scores of the first stage, see `cut_graph`.
        packed: images whose rows the graph is to pack, see `pack_rows`; 0 for a graph as it is.
    """

    config: ViTConfig
    steps: tuple[Step, ...]
    batch: tuple[int, int] = (1, 1)
    token_outputs: bool = False
    counts: Counts = Counts.SLOTS
    split: bool = False
    packed: int = 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in execution order."""
        found = (step.stage for step in self.steps if isinstance(step, (Select, Block)))
        return tuple(stage for stage in found if stage is not None)

    def macs(self) -> int:
        """Multiply-accumulates of one image: projections, attention products, predictors and classifier."""
        return sum(count for _, count in self.macs_by_step())

    def macs_by_step(self) -> Iterator[tuple[Step, int]]:
        """Yield every step with its multiply-accumulates for one image."""
        for step in self.steps:
            yield step, _step_macs(self.config, step)

    def describe(self) -> list[str]:
        """Return one line per step, for people."""
        return [f"{_describe(step):<72} {count / 1e6:9.1f} MMACs" for step, count in self.macs_by_step()]


def build_plan(
    config: ViTConfig,
    stages: Sequence[Stage],
    *,
    batch: tuple[int, int] = (1, 1),
    token_outputs: bool = False,
    counts: Counts = Counts.SLOTS,
    split: bool = False,
    packed: int = 0,
) -> Plan:
    """Return the plan of a pruned model before any pass: every row is computed.

    Args:
        config: the backbone.
        stages: in execution order, counts resolved.
        batch: smallest and largest batch.
        token_outputs: return kept tokens too.
        counts: where the number of rows behind a stage comes from; a computed one wants a batch of one image.
        split: prepare the graph to be cut.
        packed: number of images to pack.
    """
    P = config.num_prefix_tokens
    at = {(stage.block, stage.where): stage for stage in stages}
    tokens = P + config.num_patches
    stashed = sum(s.counts.tokens_in - s.counts.kept for s in stages if s.reducer is Reducer.STASH)
    steps: list[Step] = [Embed(tokens)]
    for index in range(config.depth):
        if stashed and index == config.depth - 1:
            steps.append(Restore(tokens, tokens + stashed))
            tokens += stashed
        before, inside = at.get((index, Where.PRE_BLOCK)), at.get((index, Where.MID_BLOCK))
        if before is not None:
            steps.append(Select(before, tokens, P + before.counts.tokens_out))
            tokens = P + before.counts.tokens_out
        after = tokens if inside is None else P + inside.counts.tokens_out
        behind = at.get((index + 1, Where.PRE_BLOCK))
        scores_for = behind if behind is not None and behind.attention_block == index else None
        steps.append(Block(index, tokens, after, inside, scores_for))
        tokens = after
    steps.append(Head(tokens))
    return Plan(config, tuple(steps), batch, token_outputs, counts, split, packed)


def macs_at(config: ViTConfig, stages: Sequence[Stage], counts: Sequence[int]) -> int:
    """Return the multiply-accumulates of an image that keeps so many tokens, as the literature counts them.

    Args:
        config: the backbone.
        stages: in execution order; none of them fuses, stashes or merges.
        counts: tokens the image keeps per stage; those that exceed a stage's slots are not computed.
    """
    own, tokens = [], config.num_patches
    for stage, count in zip(stages, counts, strict=True):
        kept = min(count, stage.counts.kept, tokens)
        own.append(replace(stage, counts=StageCounts(tokens, kept)))
        tokens = kept
    return build_plan(config, own).macs()


def rows_count(config: ViTConfig, block: Block, rows: Rows) -> int:
    """Return how many rows of one image a choice of rows means in a block."""
    if rows is Rows.HEAD:
        return config.num_head_tokens
    return block.tokens_out if rows is Rows.KEPT else block.tokens_in


def _step_macs(config: ViTConfig, step: Step) -> int:
    D = config.embed_dim
    if isinstance(step, Embed):
        return embed_macs(config)
    if isinstance(step, Select):
        return step.stage.scorer.macs(config, step.stage.counts.tokens_in)
    if isinstance(step, Restore):
        return 0
    if isinstance(step, Head):
        return head_macs(config, step.tokens_in - config.num_prefix_tokens)
    queries = rows_count(config, step, step.query_rows)
    projected = rows_count(config, step, step.projected_rows)
    mlp = min(projected, step.tokens_out)
    if step.folded:
        attention = 3 * queries * D * D + 2 * queries * config.num_heads * step.tokens_in * D
    else:
        attention = 2 * step.tokens_in * D * D + queries * D * D + 2 * queries * step.tokens_in * D
    scoring = 0
    if step.query_rows is Rows.KEPT and step.stage is not None and Needs.CLASS_ATTENTION in step.stage.scorer.needs:
        scoring = D * D + step.tokens_in * D  # the CLS query and its products, ahead of the selection
    return attention + scoring + projected * D * D + 2 * mlp * D * config.mlp_dim


def _describe(step: Step) -> str:
    if isinstance(step, Embed):
        return f"embed    -> {step.tokens} tokens"
    if isinstance(step, Head):
        return f"head     <- {step.tokens_in} tokens"
    if isinstance(step, Restore):
        return f"restore  {step.tokens_in} -> {step.tokens_out} in front of the last block"
    if isinstance(step, Select):
        return f"select   {step.tokens_in} -> {step.tokens_out} in front of block {step.stage.block}"
    text = f"block {step.index:<2} {step.tokens_in}"
    if step.stage is not None:
        text += f" -> {step.tokens_out}"
    if step.query_rows is not Rows.ALL or step.projected_rows is not Rows.ALL:
        folded = ", keys and values folded" if step.folded else ""
        text += f"  (queries: {step.query_rows.value}, projected: {step.projected_rows.value}{folded})"
    return text


def with_steps(plan: Plan, steps: Sequence[Step]) -> Plan:
    """Return the plan with other steps."""
    return replace(plan, steps=tuple(steps))


def fuses(stage: Stage | None) -> bool:
    """Return whether a stage makes a token of the dropped ones."""
    return stage is not None and stage.reducer is Reducer.FUSE and stage.counts.fused > 0
