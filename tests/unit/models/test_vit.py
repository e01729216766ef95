from __future__ import annotations

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.models.registry import MODELS, get_model_config
from edgeprune.models.vit import VisionTransformer, policy_softmax
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from tests.helpers import reference_vit
from tests.helpers.reference_vit import randomize, tiny, tiny_lvvit

VARIANTS = {
    "class token": tiny(),
    "distilled": tiny(distilled=True),
    "registers": tiny(reg_tokens=3),
    "registers without position": tiny(reg_tokens=2, no_embed_class=True),
    "average pooling": tiny(class_token=False, global_pool="avg"),
    "average pooling beside a class token": tiny(global_pool="avg", fc_norm=True),
    "registers, average pooling, fc_norm": tiny(
        class_token=False, global_pool="avg", fc_norm=True, reg_tokens=4, no_embed_class=True
    ),
    "token pooling with fc_norm": tiny(fc_norm=True),
    "layer scale, no qkv bias": tiny(layer_scale=True, qkv_bias=False),
    "oblong image and patches": tiny(image_size=(16, 48), patch_size=(8, 4), in_chans=1),
    "average over the prefix too": tiny(global_pool="avg", fc_norm=True, pool_include_prefix=True, reg_tokens=1),
    "LV-ViT": tiny_lvvit(),
    "LV-ViT, oblong, grey, registers": tiny_lvvit(image_size=(16, 48), patch_size=(8, 4), in_chans=1, reg_tokens=2),
    "convolutional stem alone": tiny(stem="lvvit"),
    "aux head alone": tiny(aux_head=True),
    "residual scale that is no power of two": tiny(residual_scale=3.0),
}


def on_meta(name: str, method: str = "dense", keep_rate: float = 1.0) -> PrunedViT:
    config, m = get_model_config(name), get_method(method)
    with torch.device("meta"):
        return PrunedViT(config, m.stages(config, StageRequest(keep_rate=keep_rate), m.parse_options({})))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_forward_equals_formula(config):
    model = randomize(VisionTransformer(config))
    images = torch.randn(3, config.in_chans, *config.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(images)
    expected = reference_vit.logits(config, model.state_dict(), images)
    assert ours.shape == (3, config.num_classes)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "millions", "keys"),
    [
        ("deit_tiny_patch16_224", 5.717, 152),
        ("deit_small_patch16_224", 22.051, 152),
        ("deit_base_patch16_224", 86.568, 152),
        ("deit_base_patch16_384", 86.859, 152),
        ("deit_small_distilled_patch16_224", 22.436, 155),
        ("vit_large_patch16_224", 304.327, 296),
        ("vit_base_patch16_reg4_gap_256", 86.615, 152),
        ("vit_base_patch16_gap_224", 86.567, 151),
        ("vit_large_patch16_224.mae", 304.327, 296),
        ("lvvit_s", 26.152, 204),
        ("lvvit_m", 55.831, 248),
    ],
)
def test_registered_model_has_published_parameters(name, millions, keys):
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=2e-3)
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_registered_model_builds_under_its_name(name):
    model = on_meta(name)
    assert model.config.name == name
    assert model.pos_embed.shape == (1, model.config.num_pos_tokens, model.config.embed_dim)


def test_dynamicvit_adds_thirty_keys():
    dense, pruned = (on_meta("deit_small_patch16_224", m, 0.7) for m in ("dense", "dynamicvit"))
    added = set(pruned.state_dict()) - set(dense.state_dict())
    assert len(pruned.state_dict()) == 182
    assert {k.split(".")[0] for k in added} == {"prune"}
    assert sum(p.numel() for p in pruned.parameters()) / 1e6 == pytest.approx(22.77, abs=0.01)


@pytest.mark.parametrize("method", ["evit", "random"])
def test_method_without_weights_adds_no_keys(method):
    assert len(on_meta("deit_small_patch16_224", method, 0.7).state_dict()) == 152


def test_qkv_rows_are_query_key_value_by_head():
    attn = VisionTransformer(tiny()).blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.qkv.bias.copy_(torch.arange(96.0))
    q, k, v = attn.heads(torch.zeros(1, 4, 32))
    assert q[0, :, 0].tolist() == [list(range(16)), list(range(16, 32))]
    assert k[0, 1, 3].tolist() == list(range(48, 64))
    assert v[0, 0, 2].tolist() == list(range(64, 80))


def test_distilled_logits_are_mean_of_both_heads():
    model = randomize(VisionTransformer(tiny(distilled=True)))
    tokens = torch.randn(2, 18, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normed = model.norm(tokens)
        expected = (model.head(normed[:, 0]) + model.head_dist(normed[:, 1])) / 2
        torch.testing.assert_close(model.classify(tokens), expected)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 96)])
def test_image_size_sets_patch_tokens(size):
    config = tiny(image_size=size)
    tokens = VisionTransformer(config).embed(torch.zeros(1, 3, *size))
    assert tokens.shape == (1, 1 + size[0] * size[1] // 64, 32)


def test_average_that_includes_the_prefix_is_the_mean_of_every_row():
    model = randomize(VisionTransformer(tiny(global_pool="avg", fc_norm=True, pool_include_prefix=True)))
    tokens = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.head(model.fc_norm(tokens.mean(1)))
        torch.testing.assert_close(model.classify(tokens), expected)


def test_average_pooling_leaves_prefix_out():
    model = randomize(VisionTransformer(tiny(reg_tokens=2, global_pool="avg")))
    tokens = torch.randn(1, 19, 32, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, :3] = 7.0
    assert torch.equal(model.classify(tokens), model.classify(other))


def test_policy_of_ones_is_softmax():
    scores = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy_softmax(scores, torch.ones(2, 5)), scores.softmax(-1), rtol=0, atol=1e-5)


def test_policy_removes_dropped_keys_but_keeps_self():
    scores = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    attention = policy_softmax(scores, torch.tensor([[1.0, 1.0, 0.0, 1.0]]), eps=0.0)
    assert attention[0, 0, :, 2].tolist()[:2] == [0.0, 0.0]
    assert attention[0, 0, 2, 2] > 0
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 1, 4))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"image_size": (30, 32)}, "30x32"),
        ({"patch_size": (0, 8)}, "0x8"),
        ({"num_heads": 5}, "5 heads"),
        ({"global_pool": "map"}, "map"),
        ({"class_token": False}, "class token"),
        ({"distilled": True, "reg_tokens": 1}, "registers"),
        ({"distilled": True, "global_pool": "avg"}, "average"),
        ({"reg_tokens": -1}, "reg_tokens"),
        ({"mlp_ratio": 0.0}, "mlp_dim"),
        ({"pool_include_prefix": True}, "pool_include_prefix"),
        ({"aux_head": True, "global_pool": "avg"}, "aux_head"),
        ({"aux_head": True, "distilled": True}, "aux_head"),
        ({"stem": "conv"}, "conv"),
        ({"stem": "lvvit", "patch_size": (1, 8)}, "1x8"),
        ({"residual_scale": 0.0}, "residual_scale"),
        ({"residual_scale": 2.0, "layer_scale": True}, "layer_scale"),
    ],
)
def test_config_is_refused_when_it_cannot_be_built(fields, word):
    with pytest.raises(InputError) as caught:
        tiny(**fields)
    assert caught.value.code == "model-config"
    assert word in caught.value.message
    assert caught.value.expected


@pytest.mark.parametrize("field", ["num_heads", "embed_dim", "in_chans", "depth", "num_classes"])
@pytest.mark.parametrize("value", [0, -1])
def test_config_names_field_when_it_is_not_positive(field, value):
    with pytest.raises(InputError, match=field):
        tiny(**{field: value})


def test_unknown_model_names_nearest():
    with pytest.raises(InputError) as caught:
        get_model_config("deit_smal_patch16_224")
    assert caught.value.code == "model-unknown"
    assert "deit_small_patch16_224" in caught.value.hint


def test_overrides_leave_registered_model_alone():
    assert get_model_config("deit_small_patch16_224", num_classes=7, depth=None).num_classes == 7
    assert MODELS["deit_small_patch16_224"].num_classes == 1000
