"""Plan pass: do not compute rows nobody reads. Exact.

Two places have such rows. The classifier of a token-pooled model without an aux head reads the prefix only, so the last
block needs queries, projection and MLP for that row alone. A block that prunes by its own CLS attention needs only the
CLS query and the keys to choose; the rows it drops need no query, attention output, projection or MLP. When the dropped
rows are fused into one, their attention outputs are still read, but the projection is linear: it is applied to the sum.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.export.plan import Block, Head, Plan, Rows, Step, fuses, with_steps


def eliminate_dead_rows(plan: Plan) -> Plan:
    """Return the plan with `query_rows` and `projected_rows` narrowed to what is read."""
    *front, last, head = plan.steps
    steps = [narrow_to_kept(step) for step in front]
    if not plan.config.head_reads_patches and isinstance(last, Block) and last.stage is None:
        read = plan.config.num_head_tokens
        last = replace(last, query_rows=Rows.HEAD, projected_rows=Rows.HEAD, tokens_out=read)
        head = Head(read)
    return with_steps(plan, [*steps, narrow_to_kept(last), head])


def narrow_to_kept(step: Step) -> Step:
    """Return a block that prunes by its own attention with only the surviving rows computed."""
    if not isinstance(step, Block) or step.stage is None:
        return step
    return replace(step, query_rows=Rows.ALL if fuses(step.stage) else Rows.KEPT, projected_rows=Rows.KEPT)
