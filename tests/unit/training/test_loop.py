from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgeprune.errors import BuildError
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.adapters import ADAPTERS, Setup
from edgeprune.training.init import init_from_scratch, sine_positions
from edgeprune.training.loop import difficulty_at, learning_rate, parameter_groups, top1, train
from edgeprune.training.recipes import DIGITS_RECIPES, FOLDER_RECIPES, Recipe
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
        self, size: int, info: PreprocessInfo, *, epoch: int = 0, seed: int = 0, difficulty: float = 1.0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.difficulties.append(difficulty)
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        for at in range(0, len(self), size):
            yield self.images[order[at : at + size]], self.targets[order[at : at + size]]


def run(name: str, seed: int = 0, recipe: Recipe = RECIPE, count: int = 160) -> tuple[PrunedViT, list[float]]:
    """Train two short epochs and return the model and the sum of the losses per epoch."""
    method = get_method(name)
    where, options = StageRequest(0.5), method.parse_options({})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, teacher = PrunedViT(CONFIG, method.stages(CONFIG, where, options)), PrunedViT(CONFIG).eval()
        init_from_scratch(model)
    adapter = ADAPTERS[name](Setup(CONFIG, method, where, options, recipe, teacher))
    log = train(model, adapter, Halves(count), recipe, INFO, seed=seed)  # type: ignore[arg-type]
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
    assert data.difficulties == pytest.approx([0, 2 / 3, 1])


def test_divergence_is_an_error_and_not_a_model() -> None:
    adapter = SimpleNamespace(
        needs_teacher=False, losses=lambda model, batch: {"classification": model(batch.images).sum() * math.inf}
    )
    with pytest.raises(BuildError, match="epoch 1") as error:
        train(PrunedViT(CONFIG), adapter, Halves(16), RECIPE, INFO)  # type: ignore[arg-type]
    assert error.value.code == "training-diverged"


def test_progress_names_the_epoch_and_ends_at_one() -> None:
    seen: list[tuple[str, float]] = []
    adapter = ADAPTERS["dense"](Setup(CONFIG, get_method("dense"), StageRequest(), {}, RECIPE))
    train(PrunedViT(CONFIG), adapter, Halves(16), RECIPE, INFO, progress=lambda what, share: seen.append((what, share)))  # type: ignore[arg-type]
    assert seen[0][0].startswith("epoch 1/2, loss ")
    assert [share for _, share in seen] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_sine_positions_differ_and_neighbours_are_alike() -> None:
    positions = sine_positions(4, 6, 32)
    assert positions.shape == (24, 32)
    nearness = positions @ positions.T
    assert (nearness.argmax(1) == torch.arange(24)).all()
    assert nearness[8, 9] > nearness[8, 11]
    assert nearness[8, 14] > nearness[8, 20]


def test_recipes_name_their_source() -> None:
    recipes = [*DIGITS_RECIPES.values(), *FOLDER_RECIPES.values()]
    assert all(recipe.source and recipe.epochs > recipe.warmup_epochs for recipe in recipes)
    official = FOLDER_RECIPES["dynamicvit", True]
    assert (official.ratio_weight, official.distill_weight, official.token_weight) == (2.0, 0.5, 0.5)
    assert (official.backbone_lr_scale, official.backbone_freeze_epochs) == (0.01, 5)
    assert official.frozen == ("cls_token", "pos_embed")
