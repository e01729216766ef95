"""LV-ViT: what its official files hold and how its heads and its stem compute."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from edgeprune.errors import InputError
from edgeprune.models.checkpoint import Checkpoint, load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.models.vit import VisionTransformer
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from tests.helpers.reference_vit import randomize, tiny, tiny_lvvit

# Keys and shapes of DynamicViT on LV-ViT-S, as its official class has them; {i} is a block, {s} a stage.
OFFICIAL_KEYS = {
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 197, 384),
    "patch_embed.conv1.weight": (64, 3, 7, 7),
    **{f"patch_embed.conv{n}.weight": (64, 64, 3, 3) for n in (2, 3)},
    **{f"patch_embed.bn{n}.{k}": (64,) for n in (1, 2, 3) for k in ("weight", "bias", "running_mean", "running_var")},
    **{f"patch_embed.bn{n}.num_batches_tracked": () for n in (1, 2, 3)},
    "patch_embed.proj.weight": (384, 64, 8, 8),
    "patch_embed.proj.bias": (384,),
    **{f"blocks.{{i}}.{n}.{k}": (384,) for n in ("norm1", "norm2") for k in ("weight", "bias")},
    "blocks.{i}.attn.qkv.weight": (1152, 384),
    "blocks.{i}.attn.proj.weight": (384, 384),
    "blocks.{i}.attn.proj.bias": (384,),
    "blocks.{i}.mlp.fc1.weight": (1152, 384),
    "blocks.{i}.mlp.fc1.bias": (1152,),
    "blocks.{i}.mlp.fc2.weight": (384, 1152),
    "blocks.{i}.mlp.fc2.bias": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
    **{f"{n}.weight": (1000, 384) for n in ("head", "aux_head")},
    **{f"{n}.bias": (1000,) for n in ("head", "aux_head")},
    **{f"score_predictor.{{s}}.in_conv.0.{k}": (384,) for k in ("weight", "bias")},
    "score_predictor.{s}.in_conv.1.weight": (384, 384),
    "score_predictor.{s}.in_conv.1.bias": (384,),
    "score_predictor.{s}.out_conv.0.weight": (192, 384),
    "score_predictor.{s}.out_conv.0.bias": (192,),
    "score_predictor.{s}.out_conv.2.weight": (96, 192),
    "score_predictor.{s}.out_conv.2.bias": (96,),
    "score_predictor.{s}.out_conv.4.weight": (2, 96),
    "score_predictor.{s}.out_conv.4.bias": (2,),
}


def official_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in OFFICIAL_KEYS.items():
        numbers = range(16) if "{i}" in key else range(3)
        shapes |= {re.sub(r"\{[is]\}", str(n), key): shape for n in numbers}
    return shapes


def pruned(name: str, keep_rate: float = 0.7) -> PrunedViT:
    config, method = get_model_config(name), get_method("dynamicvit")
    with torch.device("meta"):
        return PrunedViT(config, method.stages(config, StageRequest(keep_rate), {}))


def small_pruned(**fields: object) -> PrunedViT:
    config, method = tiny_lvvit(depth=4, **fields), get_method("dynamicvit")
    return PrunedViT(config, method.stages(config, StageRequest(0.5), {}))


def images(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ the official model


def test_keys_and_shapes_of_dynamicvit_are_the_official_ones() -> None:
    model, prefixes = pruned("lvvit_s"), get_method("dynamicvit").key_prefixes
    (official, ours), *_ = prefixes.items()
    state = {k.replace(ours, official) if k.startswith(ours) else k: v for k, v in model.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in state.items()} == official_shapes()
    assert len(state) == 234
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(26.88, abs=0.005)


@pytest.mark.parametrize(("name", "blocks"), [("lvvit_s", [4, 8, 12]), ("lvvit_m", [5, 10, 15])])
def test_stages_stand_where_the_official_ones_do(name: str, blocks: list[int]) -> None:
    stages = pruned(name).stages
    assert [s.block for s in stages] == blocks
    assert [s.counts.kept for s in stages] == [137, 96, 67]


@pytest.mark.parametrize(("name", "crop_pct"), [("lvvit_s", 0.9), ("lvvit_m", 1.0)])
def test_preprocessing_is_the_published_one(name: str, crop_pct: float) -> None:
    config = get_model_config(name)
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.std == (0.229, 0.224, 0.225)
    assert (config.crop_pct, config.interpolation) == (crop_pct, "bicubic")


def test_every_norm_has_the_epsilon_of_torch() -> None:
    modules = pruned("lvvit_s").modules()
    norms = [m for m in modules if isinstance(m, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))]
    assert len(norms) == 2 * 16 + 1 + 3 + 3
    assert {m.eps for m in norms} == {1e-5}


# ------------------------------------------------------------------------------------------------ heads


def test_aux_head_adds_half_of_the_best_patch() -> None:
    model = randomize(VisionTransformer(tiny_lvvit(reg_tokens=1)))
    tokens = torch.randn(2, 18, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normed = model.norm(tokens)
        best = torch.stack([model.aux_head(normed[:, i]) for i in range(2, 18)]).amax(0)
        torch.testing.assert_close(model.classify(tokens), model.head(normed[:, 0]) + 0.5 * best)


HEADS = {
    "aux head": {"aux_head": True},
    "average": {"global_pool": "avg"},
    "average, fc_norm": {"global_pool": "avg", "fc_norm": True},
    "average over the prefix too": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "class token": {},
}


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_invalid_tokens_are_as_good_as_gone(fields: dict[str, object], kind: torch.dtype) -> None:
    config = tiny(**fields)
    model, P = randomize(VisionTransformer(config)), config.num_prefix_tokens
    tokens = torch.randn(2, P + 6, 32, generator=torch.Generator().manual_seed(0)) * 3
    valid = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).to(kind)
    with torch.no_grad():
        logits = model.classify(tokens, valid)
        for b in range(2):
            rows = [*range(P), *(P + i for i in range(6) if valid[b, i])]
            torch.testing.assert_close(logits[b : b + 1], model.classify(tokens[b : b + 1, rows]))
        torch.testing.assert_close(model.classify(tokens, torch.ones(2, 6, dtype=kind)), model.classify(tokens))


def test_aux_head_adds_nothing_when_no_token_is_valid() -> None:
    model = randomize(VisionTransformer(tiny_lvvit()))
    tokens = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model.classify(tokens, torch.zeros(1, 16, dtype=torch.bool))
    torch.testing.assert_close(logits, model.head(model.norm(tokens[:, 0])))
    logits.sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ files


def test_official_file_is_loaded(tmp_path) -> None:
    """TokenLabeling publishes a flat dictionary, batch counters included."""
    source = randomize(VisionTransformer(tiny_lvvit()), seed=3)
    for norm in (source.patch_embed.bn1, source.patch_embed.bn2, source.patch_embed.bn3):
        norm.num_batches_tracked.fill_(1250)
    torch.save(source.state_dict(), tmp_path / "lvvit.pth.tar")
    model = VisionTransformer(tiny_lvvit()).eval()
    report = load_into(model, load_checkpoint(tmp_path / "lvvit.pth.tar"))
    assert report.matched == len(source.state_dict())
    assert model.patch_embed.bn2.num_batches_tracked.item() == 1250
    assert model.patch_embed.bn2.num_batches_tracked.dtype == torch.int64
    with torch.no_grad():
        torch.testing.assert_close(model(images()), source(images()))


def test_official_file_of_dynamicvit_is_loaded(tmp_path) -> None:
    source = randomize(small_pruned(), seed=3)
    tensors = {k.replace("prune.", "score_predictor."): v for k, v in source.state_dict().items()}
    torch.save({"model": tensors}, tmp_path / "w.pth")
    model = small_pruned().eval()
    load_into(model, load_checkpoint(tmp_path / "w.pth"), key_prefixes=get_method("dynamicvit").key_prefixes)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), source(images()))


def test_half_precision_file_keeps_its_counters(tmp_path) -> None:
    source = randomize(VisionTransformer(tiny_lvvit()), seed=3).half()
    model = VisionTransformer(tiny_lvvit())
    load_into(model, Checkpoint(source.state_dict(), "w.pth", None, None))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.patch_embed.bn1.running_var.dtype == torch.float32
    assert model.patch_embed.bn1.num_batches_tracked.dtype == torch.int64


def test_position_embedding_is_resized_for_a_larger_image() -> None:
    source = randomize(VisionTransformer(tiny_lvvit()), seed=3)
    model = VisionTransformer(tiny_lvvit(image_size=(64, 64))).eval()
    report = load_into(model, Checkpoint(source.state_dict(), "w.pth", None, None))
    assert report.resized == ("pos_embed 4x4 -> 8x8",)
    assert model(images((64, 64))).shape == (2, 5)


def refused(model: VisionTransformer, other: VisionTransformer, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_into(model, Checkpoint(other.state_dict(), "w.pth", None, None))
    assert caught.value.code == code
    return caught.value


def test_file_for_another_model_names_lvvit() -> None:
    with torch.device("meta"):
        deit = VisionTransformer(get_model_config("deit_small_patch16_224"))
        lvvit = VisionTransformer(get_model_config("lvvit_s"))
    error = refused(deit, lvvit, "checkpoint-shape")
    assert error.hint == "its weights fit --model lvvit_s"
    assert "16 blocks, patches of 16x16, a convolutional stem, a head per token" in error.message
    assert "deit_small_patch16_224" in (refused(lvvit, deit, "checkpoint-shape").hint or "")


def test_unregistered_lvvit_is_recognised() -> None:
    with torch.device("meta"):
        large = get_model_config("lvvit_m", embed_dim=768, depth=24, num_heads=12)
        lvvit, other = VisionTransformer(get_model_config("lvvit_s")), VisionTransformer(large)
    assert "an LV-ViT" in (refused(lvvit, other, "checkpoint-shape").hint or "")


def test_other_classes_of_both_heads_name_the_option() -> None:
    model, other = (VisionTransformer(tiny_lvvit(num_classes=n)) for n in (5, 21))
    assert refused(model, other, "checkpoint-shape").hint == "add --num-classes 21"
