from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.errors import BuildError
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import ADAPTERS, Batch, Setup, StepResult
from edgeprune.training.ema import Ema
from edgeprune.training.init import init_from_scratch, sine_positions
from edgeprune.training.loop import difficulty_at, learning_rate, parameter_groups, set_drop_path, top1, train
from edgeprune.training.recipes import PRESETS, Recipe, default_recipe
from tests.helpers.reference_vit import tiny

CONFIG = tiny(depth=4, num_classes=2)
INFO = PreprocessInfo(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic")
RECIPE = Recipe(source="test", epochs=2, batch_size=8, lr=2e-3, label_smoothing=0.0)


class Halves:
    """Images with a bright left or right half, and noise."""

    labels = ("left", "right")

    def __init__(self, count: int = 160) -> None:
        self.difficulties: list[float] = []
        rng = np.random.default_rng(0)
        self.targets = rng.integers(0, 2, count)
        self.images = rng.normal(0, 0.3, (count, 3, 32, 32)).astype(np.float32)
        for image, target in zip(self.images, self.targets, strict=True):
            image[:, :, 16 * target : 16 * target + 16] += 1

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, size: int, info: PreprocessInfo, *, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in range(0, len(self), size):
            yield self.images[at : at + size], self.targets[at : at + size]

    def batch(
        self,
        number: int,
        size: int,
        info: PreprocessInfo,
        *,
        epoch: int,
        seed: int,
        difficulty: float = 1.0,
        rows: slice = slice(None),
    ) -> tuple[np.ndarray, np.ndarray]:
        self.difficulties.append(difficulty)
        order = np.random.default_rng((seed, epoch)).permutation(len(self))[number * size : (number + 1) * size][rows]
        return self.images[order], self.targets[order]


def run(name: str, seed: int = 0, recipe: Recipe = RECIPE, count: int = 160) -> tuple[PrunedViT, list[float]]:
    """Train two short epochs and return the model and the sum of the losses per epoch."""
    method = get_method(name)
    where = StageRequest(1.0 if method.rule is None else 0.5)
    options = method.parse_options({"cropr": {"tokens_per_block": "3"}, "tome": {"r": "3"}}.get(name, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = ADAPTERS[name].model_stages(method.stages(CONFIG, where, options))
        model, teacher = PrunedViT(CONFIG, stages), PrunedViT(CONFIG).eval()
        init_from_scratch(model)
    adapter = ADAPTERS[name](Setup(CONFIG, method, where, options, recipe, teacher))
    log, _ = train(model, adapter, Halves(count), recipe, INFO, seed=seed)  # type: ignore[arg-type]
    return model, [sum(entry.losses.values()) for entry in log]


@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_lower_the_loss(name: str) -> None:
    model, losses = run(name)
    assert losses[1] < 0.8 * losses[0]
    if name != "random":
        assert top1(model, Halves(), INFO) > 0.8  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_training_repeats_by_seed_whatever_torch_did_before(name: str) -> None:
    recipe = replace(RECIPE, epochs=1)
    first = run(name, 0, recipe, count=16)[0].state_dict()
    torch.rand(7)
    again, other = (run(name, seed, recipe, count=16)[0].state_dict() for seed in (0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_training_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run("random", recipe=replace(RECIPE, epochs=1), count=16)
    assert torch.equal(torch.rand(3), expected)


def test_backbone_waits_and_frozen_weights_never_move() -> None:
    recipe = replace(RECIPE, epochs=1, backbone_freeze_epochs=1, frozen=("cls_token",))
    method = get_method("dynamicvit")
    torch.manual_seed(0)
    model = PrunedViT(CONFIG, method.stages(CONFIG, StageRequest(0.5), {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = ADAPTERS["dynamicvit"](Setup(CONFIG, method, StageRequest(0.5), {}, recipe, PrunedViT(CONFIG).eval()))
    train(model, adapter, Halves(16), recipe, INFO)  # type: ignore[arg-type]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith("prune.")}
    train(model, adapter, Halves(16), replace(recipe, epochs=2), INFO)  # type: ignore[arg-type]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(before) - {"cls_token"}


def test_parameter_groups_scale_the_backbone_and_spare_vectors_from_decay() -> None:
    model = PrunedViT(CONFIG, get_method("dynamicvit").stages(CONFIG, StageRequest(0.5), {}))
    recipe = replace(RECIPE, backbone_lr_scale=0.01, backbone_freeze_epochs=5, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, recipe):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr_scale"], group["freeze_epochs"], group["weight_decay"])
    assert set(found) == set(names.values())
    assert found["prune.0.in_conv.1.weight"] == (1.0, 0, 0.05)
    assert found["prune.0.in_conv.1.bias"] == (1.0, 0, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (0.01, 5, 0.05)
    assert found["pos_embed"] == found["cls_token"] == found["norm.weight"] == (0.01, 5, 0.0)


def test_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    recipe = Recipe(source="t", epochs=10, batch_size=1, lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(step / 4, 0.25, recipe) for step in range(40)]
    assert all(a < b for a, b in pairwise(rates[:9]))
    assert rates[8] == pytest.approx(1.0)
    assert rates[24] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[8:]))
    assert rates[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 31 / 32)) / 2)


def test_difficulty_rises_between_the_shares_of_the_curriculum() -> None:
    assert difficulty_at(0.0, (0.0, 0.0)) == 1
    assert [difficulty_at(share, (0.2, 0.6)) for share in (0.0, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_curriculum_reaches_the_data() -> None:
    data, recipe = Halves(16), replace(RECIPE, epochs=3, curriculum=(0.0, 0.5))
    adapter = ADAPTERS["dense"](Setup(CONFIG, get_method("dense"), StageRequest(), {}, recipe))
    train(PrunedViT(CONFIG), adapter, data, recipe, INFO)  # type: ignore[arg-type]
    assert data.difficulties == pytest.approx([0, 0, 2 / 3, 2 / 3, 1, 1])


def adapter_of(loss: Callable[[PrunedViT, Batch], torch.Tensor], **fields: Any) -> Any:
    def losses(model: PrunedViT, batch: Batch) -> StepResult:
        return StepResult({"classification": loss(model, batch)}, torch.zeros(len(batch.images), 2))

    return SimpleNamespace(**{"needs_teacher": False, "without_gradient": (), "losses": losses, **fields})


def test_divergence_is_an_error_and_not_a_model() -> None:
    adapter = adapter_of(lambda model, batch: model(batch.images).sum() * math.inf)
    with pytest.raises(BuildError, match="epoch 1") as error:
        train(PrunedViT(CONFIG), adapter, Halves(16), RECIPE, INFO)  # type: ignore[arg-type]
    assert error.value.code == "training-diverged"


class Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * math.inf


def test_gradient_that_is_no_number_is_an_error() -> None:
    adapter = adapter_of(lambda model, batch: Exploding.apply(model(batch.images)).square().sum())
    with pytest.raises(BuildError, match="norm of the gradient") as error:
        train(PrunedViT(CONFIG), adapter, Halves(16), RECIPE, INFO)  # type: ignore[arg-type]
    assert error.value.code == "training-diverged"


def test_parameter_without_gradient_is_named_unless_the_adapter_allows_it() -> None:
    def loss(model: PrunedViT, batch: Batch) -> torch.Tensor:
        return model.embed(batch.images).square().mean()

    with pytest.raises(BuildError, match=r"blocks\.0\.norm1\.weight") as error:
        train(PrunedViT(CONFIG), adapter_of(loss), Halves(16), RECIPE, INFO)  # type: ignore[arg-type]
    assert error.value.code == "training-no-gradient"
    assert not any(name.startswith("patch_embed") for name in error.value.details["parameters"])
    allowed = adapter_of(loss, without_gradient=("blocks.", "norm.", "head."))
    train(PrunedViT(CONFIG), allowed, Halves(16), RECIPE, INFO)  # type: ignore[arg-type]


def test_average_follows_the_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.9)
    for value in (2.0, 3.0):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model)
    assert ema.tensors["weight"].item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)
    with ema.applied(model):
        assert model.weight.item() == ema.tensors["weight"].item()
    assert model.weight.item() == 3.0


def test_layer_decay_slows_the_lower_layers() -> None:
    model = PrunedViT(CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, replace(RECIPE, layer_decay=0.5))
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales["head.weight"] == scales["norm.weight"] == 1
    assert scales["blocks.3.attn.qkv.weight"] == 0.5
    assert scales["blocks.0.attn.qkv.weight"] == 0.5**4
    assert scales["patch_embed.proj.weight"] == scales["cls_token"] == scales["pos_embed"] == 0.5**5


def test_learning_rate_scales_with_the_batch() -> None:
    recipe = Recipe(source="t", epochs=1, batch_size=128, lr=1e-3, lr_batch=1024, min_lr=8e-6)
    assert (recipe.scaled().lr, recipe.scaled().min_lr) == pytest.approx((1.25e-4, 1e-6))
    assert recipe.scaled().scaled() == recipe.scaled()


def test_stochastic_depth_keeps_the_mean_and_spares_the_first_block() -> None:
    model = PrunedViT(CONFIG)
    set_drop_path(model, Batch(torch.zeros(4000, 1), torch.zeros(4000), 0.0), 0.4)
    first, last = model.blocks[0].branch_scale, model.blocks[-1].branch_scale
    assert all((factor == 1).all() for factor in first)
    for factor in last:
        assert factor.unique().tolist() == pytest.approx([0, 1 / 0.6])
        assert factor.mean().item() == pytest.approx(1, abs=0.06)


def test_stochastic_depth_ends_with_the_training() -> None:
    recipe = replace(RECIPE, epochs=1, drop_path=0.3)
    model, _ = run("evit", recipe=recipe, count=16)
    assert all(block.branch_scale is None for block in model.blocks)


def test_progress_names_the_epoch_and_ends_at_one() -> None:
    seen: list[tuple[str, float]] = []
    adapter = ADAPTERS["dense"](Setup(CONFIG, get_method("dense"), StageRequest(), {}, RECIPE))
    train(PrunedViT(CONFIG), adapter, Halves(16), RECIPE, INFO, progress=lambda what, share: seen.append((what, share)))  # type: ignore[arg-type]
    assert seen[0][0].startswith("epoch 1/2, loss ")
    assert {"accuracy", "GMACs", "left"} <= set(seen[0][0].replace(",", "").split())
    assert [share for _, share in seen] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_sine_positions_differ_and_neighbours_are_alike() -> None:
    positions = sine_positions(4, 6, 32)
    assert positions.shape == (24, 32)
    nearness = positions @ positions.T
    assert (nearness.argmax(1) == torch.arange(24)).all()
    assert nearness[8, 9] > nearness[8, 11]
    assert nearness[8, 14] > nearness[8, 20]


def test_recipes_name_their_source() -> None:
    assert all(recipe.source and recipe.epochs > recipe.warmup_epochs for recipe in PRESETS.values())
    official = PRESETS["dynamicvit"]
    assert (official.ratio_weight, official.distill_weight, official.token_weight) == (2.0, 0.5, 0.5)
    assert (official.backbone_lr_scale, official.backbone_freeze_epochs) == (0.01, 5)
    assert official.frozen == ("cls_token", "pos_embed")


def test_preset_follows_method_model_and_data() -> None:
    def name(method: str, model: str = "deit_small_patch16_224", digits: bool = False, checkpoint: bool = True) -> Any:
        return default_recipe(method, model, digits=digits, checkpoint=checkpoint)

    assert name("dynamicvit") == "dynamicvit"
    assert name("dynamicvit", "deit_base_patch16_224") == "dynamicvit-base"
    assert name("dynamicvit", digits=True) == "digits-dynamicvit"
    assert name("dynamicvit", checkpoint=False) is None
    assert (name("evit"), name("evit", checkpoint=False)) == ("evit-finetune", "evit-scratch")
    assert "patent" in PRESETS[name("sait")].note and "patent" in PRESETS[name("sait", digits=True)].note
    for method in ("ats", "asvit", "sait", "cropr", "tome"):
        assert name(method) in PRESETS and name(method, digits=True) in PRESETS
