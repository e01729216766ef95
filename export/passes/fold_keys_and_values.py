"""Plan pass: where one or two queries read every row, do not form keys and values. Exact up to rounding.

A logit is q . (W_k x + b_k) = (W_k^T q) . x + const, and the constant is the same for every key, so the softmax does
not see it. The output is sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v. Both projections of all T rows
become two products per query and head: 2 H T D + 2 D^2 instead of 2 T D^2 multiply-accumulates.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.export.plan import Block, Plan, Rows, Step, with_steps


def fold_keys_and_values(plan: Plan) -> Plan:
    """Return the plan with blocks that compute the classifier's rows only marked as folded."""

    def fold(step: Step) -> Step:
        if isinstance(step, Block) and step.query_rows is Rows.HEAD:
            return replace(step, folded=True)
        return step

    return with_steps(plan, [fold(step) for step in plan.steps])
