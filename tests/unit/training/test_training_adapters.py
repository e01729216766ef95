from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from edgeprune.models.config import ViTConfig
from edgeprune.models.macs import dense_macs
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.training import losses
from edgeprune.training.adapters import (
    ADAPTERS,
    Batch,
    RandomGather,
    Setup,
    closed_share,
    gmacs,
    last_class_attention,
    reference_gmacs,
    with_stages,
)
from edgeprune.training.masking import gumbel_decision, masked_forward
from edgeprune.training.recipes import DIGITS_RECIPES, FOLDER_RECIPES, PRESETS, Recipe
from tests.helpers.reference_vit import randomize, tiny, tiny_lvvit

RECIPE = Recipe(source="test", epochs=1, batch_size=4, lr=1e-3, label_smoothing=0.0)
CONFIG = tiny(depth=6)


OWN_COUNTS = {"cropr": {"tokens_per_block": "2"}, "tome": {"r": "2"}}


def setup(
    name: str, keep_rate: float = 0.6, recipe: Recipe = RECIPE, config: ViTConfig = CONFIG, **options: Any
) -> tuple[Setup, PrunedViT]:
    """Return a method's setup and a model with the parts only training reads."""
    method = get_method(name)
    where = StageRequest(1.0 if name in OWN_COUNTS else keep_rate)
    values = method.parse_options({**OWN_COUNTS.get(name, {}), **options})
    stages = ADAPTERS[name].model_stages(method.stages(config, where, values))
    teacher = randomize(PrunedViT(config), seed=7)
    return Setup(config, method, where, values, recipe, teacher), randomize(PrunedViT(config, stages))


def batch(epoch: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3]), epoch)


def test_every_method_has_an_adapter_and_recipes() -> None:
    assert set(ADAPTERS) == set(METHODS)
    for recipes in (DIGITS_RECIPES, FOLDER_RECIPES):
        assert all((method, True) in recipes for method in METHODS)
        assert set(recipes.values()) <= set(PRESETS)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_scalars_with_gradient(name: str) -> None:
    made, model = setup(name)
    result = ADAPTERS[name](made).losses(model, batch())
    parts = result.losses
    assert result.logits.shape == (4, CONFIG.num_classes)
    assert all(part.ndim == 0 and part.isfinite() and part.requires_grad for part in parts.values())


@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("evit", {}), ("evit", {"fuse": "false"})])
def test_hard_gather_trains_what_inference_runs(name: str, options: dict[str, str]) -> None:
    made, model = setup(name, **options)
    parts = ADAPTERS[name](made).losses(model, batch()).losses
    expected = losses.classification(model(batch().images), batch().labels)
    assert list(parts) == ["classification"]
    assert parts["classification"].item() == expected.item()


def test_evit_gradient_flows_through_the_fused_weights() -> None:
    made, model = setup("evit")
    fused = with_stages(model, [s for s in model.stages if s.index == 0])
    grads = {}
    for fuse in (True, False):
        stages = fused.stages if fuse else setup("evit", fuse="false")[1].stages[:1]
        model.zero_grad()
        with_stages(model, stages)(batch().images).square().sum().backward()
        grads[fuse] = model.blocks[stages[0].block].attn.qkv.weight.grad.clone()
    assert not torch.allclose(grads[True], grads[False])
    assert made.options["fuse"] is True


def test_keep_rate_falls_as_a_cosine() -> None:
    assert closed_share(0, (0, 0)) == 1
    assert closed_share(9.9, (10, 100)) == 0
    assert closed_share(60, (10, 100)) == pytest.approx(0.5)
    assert closed_share(110, (10, 100)) == 1
    assert closed_share(35, (10, 100)) == pytest.approx((1 - 0.5**0.5) / 2)


def test_keep_rate_warm_up_starts_dense_and_ends_at_the_target() -> None:
    recipe = Recipe(source="test", epochs=9, batch_size=4, lr=1e-3, keep_warmup=(1.0, 4.0))
    made, model = setup("evit", recipe=recipe)
    adapter = ADAPTERS["evit"](made)
    kept = [[s.counts.kept for s in adapter.stages(epoch)] for epoch in (0, 3, 5, 8)]  # type: ignore[union-attr]
    assert kept[0] == []
    assert len(kept[1]) == 3
    assert all(a > b for a, b in zip(kept[1], kept[2], strict=True))
    assert kept[2] == kept[3] == [s.counts.kept for s in model.stages]


def test_training_leaves_the_stages_of_the_model_alone() -> None:
    made, model = setup("random")
    before = model.stages
    RandomGather(made).losses(model, batch())
    assert model.stages == before


def test_random_keeps_other_tokens_for_every_image_and_step() -> None:
    made, model = setup("random")
    first, second = (
        with_stages(model, RandomGather(made).batch_stages(replace(batch(), step=step)))
        .run(batch().images).kept[0].sort(1).values
        for step in range(2)
    )  # fmt: skip
    assert first.shape == (4, model.stages[0].counts.kept)
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 8


def test_dynamicvit_adds_up_its_four_losses() -> None:
    recipe = Recipe(
        source="t", epochs=1, batch_size=4, lr=1e-3, label_smoothing=0.1, ratio_weight=3, distill_weight=0.25,
        token_weight=0.125,
    )  # fmt: skip
    made, model = setup("dynamicvit", recipe=recipe)
    parts = ADAPTERS["dynamicvit"](made).losses(model, batch()).losses
    with torch.no_grad():
        out = masked_forward(model, batch().images, gumbel_decision(batch().uniform))
        assert made.teacher is not None
        dense = made.teacher(batch().images)
        features = masked_forward(made.teacher, batch().images).features
    expected = {
        "classification": losses.classification(out.logits, batch().labels, 0.1),
        "distillation": 0.25 * losses.distillation(out.logits, dense),
        "ratio": 3 * losses.ratio(out.decisions, [0.6, 0.36, 0.216]),
        "tokens": 0.125 * losses.token_distillation(out.features, features, out.decisions[-1]),
    }
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-4
    )


def test_dynamicvit_with_an_aux_head_reads_cls_and_tokens_apart() -> None:
    made, model = setup("dynamicvit", config=tiny_lvvit(depth=6))
    parts = ADAPTERS["dynamicvit"](made).losses(model, batch()).losses
    with torch.no_grad():
        assert made.teacher is not None
        out = masked_forward(model, batch().images, gumbel_decision(batch().uniform))
        dense = masked_forward(made.teacher, batch().images)
    assert out.token_logits is not None and dense.token_logits is not None
    keep = out.decisions[-1]
    expected = {
        "classification": losses.classification(out.class_logits, batch().labels),
        "distillation": 0.5 * losses.distillation(out.class_logits, dense.class_logits),
        "ratio": 2 * losses.ratio(out.decisions, [0.6, 0.36, 0.216]),
        "tokens": 0.5 * losses.token_class_distillation(out.token_logits, dense.token_logits, keep),
    }
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-4
    )
    torch.stack(list(parts.values())).sum().backward()
    assert model.aux_head.weight.grad is not None and model.aux_head.weight.grad.abs().max() > 0


def test_rates_follow_stages_that_were_left_out() -> None:
    method = get_method("dynamicvit")
    where = StageRequest(1.0, (1, 3, 4), (1.0, 0.5, 0.25))
    stages = method.stages(CONFIG, where, {})
    made = Setup(CONFIG, method, where, {}, RECIPE, randomize(PrunedViT(CONFIG)))
    assert [s.index for s in stages] == [1, 2]
    model = randomize(PrunedViT(CONFIG, stages))
    parts = ADAPTERS["dynamicvit"](made).losses(model, batch()).losses
    out = masked_forward(model, batch().images, gumbel_decision(batch().uniform))
    assert parts["ratio"].item() == pytest.approx(2 * losses.ratio(out.decisions, [0.5, 0.25]).item(), rel=1e-5)


def test_teacher_gets_no_gradient() -> None:
    made, model = setup("dynamicvit")
    assert made.teacher is not None
    torch.stack(list(ADAPTERS["dynamicvit"](made).losses(model, batch()).losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in made.teacher.parameters())


def test_random_numbers_of_a_row_do_not_depend_on_how_the_batch_is_divided() -> None:
    whole = Batch(torch.zeros(8, 1), torch.zeros(8), 0.0, seed=3, step=7)
    part = Batch(torch.zeros(3, 1), torch.zeros(3), 0.0, seed=3, step=7, first_row=4)
    numbers = whole.uniform(5, 2, tag=1)
    assert numbers.shape == (8, 5, 2)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert torch.equal(numbers[4:7], part.uniform(5, 2, tag=1))
    for other in (
        whole.uniform(5, 2),
        replace(whole, step=8).uniform(5, 2, tag=1),
        replace(whole, seed=4).uniform(5, 2, tag=1),
    ):
        assert not torch.equal(numbers, other)


def test_operations_of_a_dense_model_are_the_formulas() -> None:
    assert gmacs(CONFIG, (), ()) == pytest.approx(dense_macs(CONFIG) / 1e9)
    made, model = setup("evit")
    result = ADAPTERS["evit"](made).losses(model, batch())
    assert result.macs is not None and result.macs < dense_macs(CONFIG) / 1e9
    assert result.kept == model.stages[-1].counts.tokens_out


def test_cropr_adds_a_loss_per_module_and_stops_its_gradient() -> None:
    recipe = replace(RECIPE, aux_weight=0.5)
    made, model = setup("cropr", recipe=recipe)
    result = ADAPTERS["cropr"](made).losses(model, batch())
    out = model.run(batch().images, keep_inputs=True)
    assert out.inputs is not None and [x.shape[1] for x in out.inputs] == [17, 14, 12, 10]
    expected = sum(
        losses.classification(model.scorer_module(s).predict(x), batch().labels)
        for s, x in zip(model.stages, out.inputs, strict=True)
    )
    assert result.losses["auxiliary"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    result.losses["auxiliary"].backward(retain_graph=True)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("prune."))
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("prune."))
    model.zero_grad(set_to_none=True)
    result.losses["classification"].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("prune."))


def test_cropr_may_remove_more_and_more() -> None:
    made, _ = setup("cropr", recipe=replace(RECIPE, epochs=4, keep_warmup=(0.0, 2.0)))
    adapter = ADAPTERS["cropr"](made)
    assert [adapter.stages(e)[1].counts.kept if len(adapter.stages(e)) > 1 else 15 for e in (0, 1, 2, 3)] == [
        15, 13, 11, 11,
    ]  # fmt: skip


def test_sait_takes_turns_between_dense_and_sparse_epochs() -> None:
    made, model = setup("sait", 1.0, mass="0.5")
    adapter = ADAPTERS["sait"](made)
    odd, even = adapter.losses(model, batch(0.5)), adapter.losses(model, batch(1.5))
    dense = with_stages(model, ())(batch().images)
    torch.testing.assert_close(odd.logits, dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(even.logits, model(batch().images), rtol=0, atol=1e-6)
    assert float(odd.kept) == 16 and float(even.kept) < 16
    assert {"classification", "distillation", "attention"} == set(odd.losses)
    assert odd.losses["attention"].item() == pytest.approx(even.losses["attention"].item(), rel=1e-4)


def test_sait_draws_scores_to_the_teachers_attention() -> None:
    made, model = setup("sait", 1.0)
    result = ADAPTERS["sait"](made).losses(model, batch())
    teacher = made.teacher
    assert teacher is not None
    wanted, logits = last_class_attention(teacher, batch().images)
    torch.testing.assert_close(logits, teacher(batch().images))
    torch.testing.assert_close(wanted.sum(1), torch.ones(4))
    scores = model.run(batch().images).scores[0]
    expected = (wanted * (wanted.log() - scores.log())).sum(1).mean()
    assert result.losses["attention"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_asvit_budget_is_of_blocks_and_embedding() -> None:
    assert reference_gmacs(get_model_config("deit_small_patch16_224")) == pytest.approx(4.573643, abs=1e-6)
    recipe = replace(RECIPE, budget=0.5, budget_weight=3.0, threshold_temperature=1e-2)
    made, model = setup("asvit", 1.0, recipe)
    for module in model.prune.values():
        module.keep_threshold.data.fill_(0.05)
    result = ADAPTERS["asvit"](made).losses(model, batch())
    head = CONFIG.num_classes * CONFIG.embed_dim / 1e9
    expected = 3 * abs(float(result.macs) - head - 0.5 * reference_gmacs(CONFIG))
    assert result.losses["budget"].item() == pytest.approx(expected, rel=1e-4)
    torch.stack(list(result.losses.values())).sum().backward()
    assert all(module.keep_threshold.grad.item() != 0 for module in model.prune.values())


def test_ats_and_tome_train_what_inference_runs() -> None:
    for name in ("ats", "tome"):
        made, model = setup(name, 1.0)
        result = ADAPTERS[name](made).losses(model, batch())
        expected = losses.classification(model(batch().images), batch().labels)
        assert result.losses["classification"].item() == expected.item()
        result.losses["classification"].backward()
        assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()
