"""Plan pass: do not compute rows nobody reads. Exact.

Two places have such rows. The classifier of a token-pooled model without an aux head reads the prefix only, so the last
block needs queries, projection and MLP for that row alone. A block that prunes by its own CLS attention needs only the
CLS query and the keys to choose; the rows it drops need no query, attention output, projection or MLP. When the dropped
rows are fused into one, their attention outputs are still read, but the projection is linear: it is applied to the sum.
A stage in front of a block that ranks by the attention of the block before is such a stage of that block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgeprune.export.plan import Block, Counts, Head, Plan, Rows, Select, Step, fuses, with_steps
from edgeprune.pruning.base import Needs, Reducer, Stage


def eliminate_dead_rows(plan: Plan) -> Plan:
    """Return the plan with `query_rows` and `projected_rows` narrowed to what is read."""
    *front, last, head = (narrow_to_kept(step) for step in move_stages_forward(plan.steps))
    if not plan.config.head_reads_patches and isinstance(last, Block):
        read = plan.config.num_head_tokens
        if last.stage is None or stage_is_dead(plan, last.stage):
            rows = Rows.HEAD
            last = replace(last, query_rows=rows, projected_rows=rows, tokens_out=read, stage=None)
            head = Head(read)
    return with_steps(plan, [*front, last, head])


def move_stages_forward(steps: Sequence[Step]) -> Iterator[Step]:
    """Yield the steps with every stage that ranks by the attention of the block before moved into that block.

    Projection and MLP work row by row, so what the stage drops need not pass them.
    """
    moved: set[int] = set()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, Block) and step.scores_for is not None and step.stage is None:
            assert isinstance(following, Select)
            moved.add(following.stage.index)
            yield replace(step, stage=step.scores_for, scores_for=None, tokens_out=following.tokens_out)
        elif not (isinstance(step, Select) and step.stage.index in moved):
            yield step


def stage_is_dead(plan: Plan, stage: Stage) -> bool:
    """Return whether nobody reads what a stage in the last block of a token-pooled model chooses.

    A graph that is told how many tokens its stages keep has all of them.
    """
    return not plan.token_outputs and not stage.selector.adaptive and plan.counts is Counts.SLOTS


def narrow_to_kept(step: Step) -> Step:
    """Return a block that prunes by its own attention with only the surviving rows computed.

    A stage that reads what every query asks or gets, or fuses it, needs every query; one that merges needs every row.
    """
    if not isinstance(step, Block) or step.stage is None or step.stage.reducer is Reducer.MERGE:
        return step
    every = fuses(step.stage) or bool(step.stage.scorer.needs & {Needs.CONTEXT, Needs.MEAN_ATTENTION})
    return replace(step, query_rows=Rows.ALL if every else Rows.KEPT, projected_rows=Rows.KEPT)
