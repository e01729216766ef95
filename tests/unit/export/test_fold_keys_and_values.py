from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.export.passes.eliminate_dead_rows import eliminate_dead_rows
from edgeprune.export.passes.fold_keys_and_values import fold_keys_and_values
from edgeprune.export.plan import Block, Plan, build_plan
from tests.helpers.lowering import lowered, noise, random_model, relative_error, small, stages_of

NARROW = (eliminate_dead_rows,)
FOLD = (eliminate_dead_rows, fold_keys_and_values)


def plan_of(method: str = "dynamicvit", **fields: Any) -> Plan:
    config = small(**fields)
    return build_plan(config, stages_of(config, method, 0.5, "1"))


def folded(plan: Plan) -> list[bool]:
    return [step.folded for step in plan.steps if isinstance(step, Block)]


def test_last_block_is_folded_when_the_classifier_reads_its_prefix() -> None:
    assert folded(fold_keys_and_values(eliminate_dead_rows(plan_of()))) == [False, False, False, True]


def test_block_that_computes_every_row_is_left() -> None:
    plan = plan_of()
    assert fold_keys_and_values(plan) == plan
    pooled = eliminate_dead_rows(plan_of(global_pool="avg"))
    assert fold_keys_and_values(pooled) == pooled


def test_folding_saves_macs_and_says_so() -> None:
    before = eliminate_dead_rows(plan_of(image_size=(64, 64)))
    after = fold_keys_and_values(before)
    T, D, H = 1 + 32, 32, 2
    assert before.macs() - after.macs() == (2 * T * D * D + D * D + 2 * T * D) - (3 * D * D + 2 * H * T * D)
    assert "folded" in after.describe()[-2] and "folded" not in before.describe()[-2]


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("batch", [(3, 3), (1, 4)], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"distilled": True}, {"qkv_bias": False}, {"reg_tokens": 2}],
    ids=["CLS", "distilled", "no bias", "reg"],
)
def test_folding_keeps_the_logits(tmp_path: Path, fields: dict[str, Any], batch: tuple[int, int], target: str) -> None:
    config = small(**{"depth": 2, **fields})
    model = random_model(config, stages_of(config, "dynamicvit", 0.5, "1"))
    with_fold, without = (
        lowered(model, tmp_path / str(len(passes)), target=target, batch=batch, passes=passes)
        for passes in (FOLD, NARROW)
    )
    assert "blocks.1.attn.k" not in {node.name for node in with_fold.model.graph.node}
    for size in set(batch):
        images = noise(config, size)
        assert relative_error(with_fold.run(images)["logits"], without.run(images)["logits"]) <= 1e-6
