from __future__ import annotations

import pytest

from edgeprune.export.plan import Block, Embed, Head, Plan, Rows, Select, build_plan, macs_at, rows_count
from edgeprune.models.registry import get_model_config
from tests.helpers.lowering import small, stages_of

SIZES = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"}

# Giga multiply-accumulates, dense and by keep rate: literature and official code.
DENSE = {"T": 1.25, "S": 4.60, "B": 17.56}
DYNAMICVIT = {
    "T": {0.9: 1.09, 0.8: 0.93, 0.7: 0.80, 0.6: 0.69, 0.5: 0.60},
    "S": {0.9: 4.04, 0.8: 3.46, 0.7: 2.98, 0.6: 2.56, 0.5: 2.23},
    "B": {0.9: 15.51, 0.8: 13.32, 0.7: 11.48, 0.6: 9.87, 0.5: 8.56},
}
EVIT_FUSED = {
    "T": {0.9: 1.09, 0.7: 0.82, 0.5: 0.63},
    "S": {0.9: 4.02, 0.7: 3.03, 0.5: 2.31},
    "B": {0.9: 15.40, 0.7: 11.61, 0.5: 8.82},
}
ROUNDING = 0.005  # the tables have two decimals


def giga(size: str, method: str, rate: float) -> float:
    config = get_model_config(SIZES[size])
    return build_plan(config, stages_of(config, method, rate)).macs() / 1e9


def rows(table: dict[str, dict[float, float]]) -> list[tuple[str, float, float]]:
    return [(size, rate, macs) for size, by_rate in table.items() for rate, macs in by_rate.items()]


def steps(plan: Plan, kind: type) -> list[object]:
    return [step for step in plan.steps if isinstance(step, kind)]


@pytest.mark.parametrize(("size", "macs"), DENSE.items())
def test_dense_macs_are_published(size: str, macs: float) -> None:
    assert giga(size, "dense", 1.0) == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(("size", "rate", "macs"), rows(DYNAMICVIT))
def test_dynamicvit_macs_are_those_of_the_table(size: str, rate: float, macs: float) -> None:
    assert giga(size, "dynamicvit", rate) == pytest.approx(macs, rel=0.01, abs=ROUNDING)


@pytest.mark.parametrize(("size", "rate", "macs"), rows(EVIT_FUSED))
def test_evit_macs_are_those_of_the_table(size: str, rate: float, macs: float) -> None:
    assert giga(size, "evit", rate) == pytest.approx(macs, rel=0.01, abs=ROUNDING)


def test_predictors_of_deit_small_cost_a_tenth_of_a_giga() -> None:
    config = get_model_config(SIZES["S"])
    plan = build_plan(config, stages_of(config, "dynamicvit", 0.7))
    cost = sum(macs for step, macs in plan.macs_by_step() if isinstance(step, Select))
    assert cost == 429 * (1.625 * 384**2 + 384 / 2) == pytest.approx(0.103e9, rel=0.01)  # 196 + 137 + 96 tokens


def test_macs_of_a_block_follow_the_formula() -> None:
    config = small()
    T, D = 17, 32
    ((_, macs),) = [(s, m) for s, m in build_plan(config, ()).macs_by_step() if isinstance(s, Block) and s.index == 2]
    assert macs == 12 * T * D * D + 2 * T * T * D


def test_macs_are_the_sum_of_the_steps() -> None:
    config = small(distilled=True)
    plan = build_plan(config, stages_of(config, "dynamicvit"))
    assert plan.macs() == sum(macs for _, macs in plan.macs_by_step())
    assert dict(plan.macs_by_step())[Head(plan.steps[-1].tokens_in)] == 2 * 5 * 32


def test_dynamicvit_rows_shrink_in_front_of_blocks() -> None:
    config = get_model_config(SIZES["S"])
    plan = build_plan(config, stages_of(config, "dynamicvit", 0.7))
    assert [b.tokens_in for b in steps(plan, Block)] == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3
    assert [(s.tokens_in, s.tokens_out) for s in steps(plan, Select)] == [(197, 138), (138, 97), (97, 68)]
    assert plan.steps[0] == Embed(197)
    assert plan.steps[-1] == Head(68)


def test_evit_rows_shrink_inside_blocks() -> None:
    config = get_model_config(SIZES["S"])
    plan = build_plan(config, stages_of(config, "evit", 0.7))
    assert [b.tokens_out for b in steps(plan, Block)] == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    assert not steps(plan, Select)


@pytest.mark.parametrize(("fields", "prefix"), [({}, 1), ({"distilled": True}, 2), ({"reg_tokens": 4}, 5)])
def test_prefix_is_added_to_every_count(fields: dict[str, object], prefix: int) -> None:
    config = small(**fields)
    plan = build_plan(config, stages_of(config, "dynamicvit", 0.5))
    assert [b.tokens_in - prefix for b in steps(plan, Block)] == [16, 8, 4, 2]


def test_plan_knows_its_stages() -> None:
    config = small()
    for method in ("dynamicvit", "evit"):
        stages = stages_of(config, method)
        assert build_plan(config, stages).stages == stages
    assert build_plan(config, ()).stages == ()


def test_description_names_blocks_rows_and_cost() -> None:
    config = get_model_config(SIZES["S"])
    lines = build_plan(config, stages_of(config, "dynamicvit", 0.7)).describe()
    assert len(lines) == 1 + 12 + 3 + 1
    assert "197 tokens" in lines[0] and "head" in lines[-1]
    assert any("138 -> 97" in line and "block 6" in line for line in lines)
    assert all(line.endswith("MMACs") for line in lines)


def test_rows_of_a_block_are_counted_by_who_reads_them() -> None:
    config = small(distilled=True)
    block = Block(1, tokens_in=18, tokens_out=10)
    assert [rows_count(config, block, r) for r in (Rows.ALL, Rows.KEPT, Rows.HEAD)] == [18, 10, 2]


def test_macs_at_every_slot_are_those_of_the_plan_and_fall_with_the_counts() -> None:
    config = small()
    stages = stages_of(config, "ats", 0.75, "1,2")
    slots = [stage.counts.kept for stage in stages]
    full = build_plan(config, stages).macs()
    assert macs_at(config, stages, slots) == full
    assert macs_at(config, stages, [slots[0] + 9, slots[1]]) == full  # what overflows is not computed
    assert macs_at(config, stages, [3, 9]) == macs_at(config, stages, [3, 3])  # later stages add nothing
    D, M = config.embed_dim, config.mlp_dim
    fewer = full - macs_at(config, stages, [slots[0], slots[1] - 1])
    # one token less in the MLP of block 2, whole in block 3; its query and attention are counted in block 2
    inside, after = 2 * D * M, 4 * D * D + 2 * D * M + 2 * D * ((1 + slots[1]) ** 2 - slots[1] ** 2)
    assert fewer == inside + after
