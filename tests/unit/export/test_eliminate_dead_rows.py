"""The plan passes are exact: fewer rows and products are computed and the outputs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeprune.export.lint.tokens_shrink import infer_shapes
from edgeprune.export.passes.eliminate_dead_rows import eliminate_dead_rows
from edgeprune.export.pipeline import PLAN_PASSES
from edgeprune.export.plan import Block, Head, Plan, Rows, build_plan
from edgeprune.models.registry import get_model_config
from tests.helpers.lowering import Lowered, lowered, noise, random_model, reference, relative_error, small, stages_of
from tests.helpers.reference_vit import LVVIT

TARGETS = ["onnx", "ort-cpu"]
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "dense": ("dense", {}),
    "dynamicvit": ("dynamicvit", {}),
    "evit fused": ("evit", {}),
    "evit unfused": ("evit", {"fuse": "false"}),
    "random": ("random", {}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "average pooling": {"global_pool": "avg"},
    "average pooling, fc_norm, registers": {
        "global_pool": "avg",
        "fc_norm": True,
        "reg_tokens": 2,
        "no_embed_class": True,
    },
    "layer scale": {"layer_scale": True},
    "no qkv bias": {"qkv_bias": False},
    "oblong image": {"image_size": (32, 48)},
    "oblong patch": {"patch_size": (4, 8)},
    "LV-ViT": LVVIT,
}


def both(folder: Path, fields: dict[str, Any], method: str, target: str, batch: tuple[int, int], **stages: Any) -> Any:
    """Return the graph after the plan passes, the one without any, and the torch model."""
    config = small(**{"depth": 3, **fields})
    name, options = METHODS[method]
    text = stages.get("text", "1")
    model = random_model(config, stages_of(config, name, stages.get("keep_rate", 0.6), text, **options))
    passes = stages.get("passes", PLAN_PASSES)
    made = [lowered(model, folder / str(len(p)), target=target, batch=batch, passes=p) for p in (passes, ())]
    return (*made, model)


def assert_same_outputs(a: Lowered, b: Lowered, model: Any, *, exact: bool = False) -> None:
    low, high = a.plan.batch
    for size in {low, high}:
        images = noise(model.config, size, seed=size)
        ours, theirs, torch_says = a.run(images), b.run(images), reference(model, images)
        assert ours.keys() == theirs.keys() >= torch_says.keys()
        for name in ours.keys() - {"logits"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        for name in torch_says.keys() - {"logits"}:
            np.testing.assert_array_equal(ours[name], torch_says[name], err_msg=name)
        if exact:
            np.testing.assert_array_equal(ours["logits"], theirs["logits"])
        assert relative_error(ours["logits"], theirs["logits"]) <= 1e-6
        assert relative_error(ours["logits"], torch_says["logits"]) <= 1e-5


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["dense", "evit fused", "evit unfused"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_stay_the_same(tmp_path: Path, fields: dict[str, Any], method: str, target: str) -> None:
    assert_same_outputs(*both(tmp_path, {"depth": 2, **fields}, method, target, (1, 1), text="0"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(3, 3), (1, 4)], ids=["fixed", "dynamic"])
def test_outputs_stay_the_same_in_a_batch(tmp_path: Path, method: str, target: str, batch: tuple[int, int]) -> None:
    assert_same_outputs(*both(tmp_path, {"reg_tokens": 1}, method, target, batch))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["dynamicvit", "evit fused", "evit unfused"])
@pytest.mark.parametrize("text", ["2", "0:0.8,1:0.5,2:0.2"])
def test_outputs_stay_the_same_wherever_stages_stand(tmp_path: Path, method: str, target: str, text: str) -> None:
    assert_same_outputs(*both(tmp_path, {}, method, target, (1, 1), text=text))


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_stay_the_same_without_class_token(tmp_path: Path, target: str) -> None:
    fields = {"class_token": False, "global_pool": "avg"}
    assert_same_outputs(*both(tmp_path, fields, "dynamicvit", target, (2, 2)), exact=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fields", [{}, {"layer_scale": True}], ids=["plain", "layer scale"])
def test_unfused_rows_are_bit_identical(tmp_path: Path, target: str, fields: dict[str, Any]) -> None:
    """The same products are formed for the rows that stay, only fewer of them; the last block has a stage here."""
    without, with_dead, model = both(tmp_path, fields, "evit unfused", target, (3, 3), text="0,2")
    assert_same_outputs(without, with_dead, model, exact=True)


@pytest.mark.parametrize("target", TARGETS)
def test_fusing_before_the_projection_is_exact_when_weights_are_large(tmp_path: Path, target: str) -> None:
    """The bias enters the fused row by its share, not once: a large bias shows a wrong share."""
    config = small(depth=2)
    model = random_model(config, stages_of(config, "evit", 0.5, "1"))
    model.blocks[1].attn.proj.bias.data.mul_(50)
    narrow, whole = (lowered(model, tmp_path / str(len(p)), target=target, passes=p) for p in (PLAN_PASSES, ()))
    assert_same_outputs(narrow, whole, model)


# ------------------------------------------------------------------------------------------------ the plan


def plan_of(
    fields: dict[str, Any], method: str, text: str | None = None, *, token_outputs: bool = False
) -> tuple[Plan, Plan]:
    config = small(**fields)
    name, options = METHODS[method]
    plan = build_plan(config, stages_of(config, name, 0.5, text, **options), token_outputs=token_outputs)
    return plan, eliminate_dead_rows(plan)


def rows_of(plan: Plan) -> list[tuple[Rows, Rows]]:
    return [(b.query_rows, b.projected_rows) for b in plan.steps if isinstance(b, Block)]


ALL, KEPT, HEAD = (Rows.ALL, Rows.ALL), (Rows.KEPT, Rows.KEPT), (Rows.HEAD, Rows.HEAD)


def test_last_block_computes_what_the_classifier_reads() -> None:
    for fields, read in (({}, 1), ({"distilled": True}, 2), ({"reg_tokens": 3}, 1)):
        before, after = plan_of(fields, "dense")
        assert rows_of(before) == [ALL] * 4
        assert rows_of(after) == [ALL] * 3 + [HEAD]
        assert after.steps[-1] == Head(read)
        assert isinstance(after.steps[-2], Block) and after.steps[-2].tokens_out == read


@pytest.mark.parametrize("fields", [{"global_pool": "avg"}, {"aux_head": True}], ids=["average", "aux head"])
def test_classifier_of_every_row_leaves_the_last_block_whole(fields: dict[str, Any]) -> None:
    before, after = plan_of(fields, "dense")
    assert after == before


def test_pruning_block_computes_the_survivors() -> None:
    assert rows_of(plan_of({}, "evit unfused", "1,2")[1]) == [ALL, KEPT, KEPT, HEAD]


def test_fusing_block_still_attends_with_every_row() -> None:
    assert rows_of(plan_of({}, "evit fused", "1,2")[1]) == [ALL, *[(Rows.ALL, Rows.KEPT)] * 2, HEAD]


def test_stage_in_the_last_block_keeps_its_tokens_when_the_graph_names_them() -> None:
    before, after = plan_of({}, "evit unfused", "3", token_outputs=True)
    assert rows_of(after) == [ALL] * 3 + [KEPT]
    assert after.steps[-1] == before.steps[-1]


def test_stage_in_the_last_block_that_nobody_reads_is_left_out() -> None:
    _, after = plan_of({}, "evit unfused", "3")
    assert rows_of(after) == [ALL] * 3 + [HEAD]
    assert after.stages == ()


def test_selection_in_front_of_blocks_leaves_only_the_last_to_narrow() -> None:
    before, after = plan_of({}, "dynamicvit")
    assert rows_of(after) == [ALL] * 3 + [HEAD]
    assert after.steps[:-2] == before.steps[:-2]


@pytest.mark.parametrize("method", METHODS)
def test_pass_changes_nothing_the_second_time(method: str) -> None:
    _, after = plan_of({}, method)
    assert eliminate_dead_rows(after) == after


@pytest.mark.parametrize("method", METHODS)
def test_pass_saves_macs_and_says_so(method: str) -> None:
    before, after = plan_of({}, method, None if method == "dense" else "1,2")
    assert after.macs() < before.macs()
    assert any("queries: head" in line for line in after.describe())
    assert not any("queries:" in line for line in before.describe())
    assert after.stages == before.stages


def test_saving_on_deit_small_is_that_of_the_formula() -> None:
    """The last block: queries, products, projection and MLP of one row instead of 197; keys and values stay."""
    config = get_model_config("deit_small_patch16_224")
    before = build_plan(config, ())
    T, D = 197, 384
    saved = (T - 1) * (D * D + 2 * T * D + D * D + 8 * D * D)
    assert before.macs() - eliminate_dead_rows(before).macs() == saved


# ------------------------------------------------------------------------------------------------ the graph


def computed_rows(made: Lowered, name: str) -> int:
    """Return the rows of one image that a node computes, from inferred shapes."""
    shape = infer_shapes(made.model, 1)[name]
    rows = shape[-2]
    assert rows is not None
    return rows


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_graph_with_dead_rows_computes_them_all(tmp_path: Path, method: str, target: str) -> None:
    text = None if method == "dense" else "0,1"
    without, with_dead, model = both(tmp_path, {}, method, target, (1, 1), text=text)
    for index in range(3):
        tokens_in = [s.tokens_in for s in with_dead.plan.steps if isinstance(s, Block)][index]
        tokens_out = [s.tokens_out for s in with_dead.plan.steps if isinstance(s, Block)][index]
        for node, rows in (("attn.q", tokens_in), ("attn.proj", tokens_in), ("mlp.fc1", tokens_out)):
            assert computed_rows(with_dead, f"blocks.{index}.{node}") == rows, (index, node)
    assert computed_rows(without, "blocks.2.attn.q") == 1
    assert computed_rows(without, "blocks.2.mlp.fc1") == 1
    assert len(model.stages) == (0 if method == "dense" else 2)


@pytest.mark.parametrize("target", TARGETS)
def test_pruning_block_of_the_graph_computes_the_survivors(tmp_path: Path, target: str) -> None:
    unfused, _, _ = both(tmp_path / "unfused", {}, "evit unfused", target, (1, 1), text="1", keep_rate=0.5)
    fused, _, _ = both(tmp_path / "fused", {}, "evit fused", target, (1, 1), text="1", keep_rate=0.5)
    nodes = [f"blocks.1.{n}" for n in ("attn.k", "attn.v", "attn.q", "attn.proj", "mlp.fc1")]
    assert [computed_rows(unfused, n) for n in nodes] == [17, 17, 9, 9, 9]
    assert [computed_rows(fused, n) for n in nodes] == [17, 17, 17, 10, 10]


def test_weights_of_both_graphs_are_the_same_tensors(tmp_path: Path) -> None:
    narrow = (eliminate_dead_rows,)
    without, with_dead, _ = both(tmp_path, {}, "evit unfused", "ort-cpu", (1, 1), passes=narrow)

    def large(model: onnx.ModelProto) -> set[str]:
        return {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}

    assert large(without.model) == large(with_dead.model)
